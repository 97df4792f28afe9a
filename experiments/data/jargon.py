"""Debian's dict-jargon: the Jargon File 4.4.7: one file, 1.4 MB."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from experiments.data.store.debian import DebianText


@dataclasses.dataclass(frozen=True)
class JargonFile(DebianText):
    """The Jargon File 4.4.7. Read when the package is installed."""

    name: ClassVar[str] = "jargon"
    package: ClassVar[str] = "dict-jargon"
    licence: ClassVar[str] = "public domain"
    folder: ClassVar[str] = "usr/share/dictd"
    pattern: ClassVar[str] = "jargon.dict.dz"
