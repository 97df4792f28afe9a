"""Debian's dict-gcide: the GNU Collaborative International Dictionary of English: one file, 40.0 MB."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from experiments.data.store.debian import DebianText


@dataclasses.dataclass(frozen=True)
class GCIDE(DebianText):
    """The GNU Collaborative International Dictionary of English. Read when the package is installed."""

    name: ClassVar[str] = "gcide"
    package: ClassVar[str] = "dict-gcide"
    licence: ClassVar[str] = "GPL-2.0-or-later (never redistribute as part of this project)"
    folder: ClassVar[str] = "usr/share/dictd"
    pattern: ClassVar[str] = "gcide.dict.dz"
    encoding: ClassVar[str] = "cp1252"  # three bytes of it are not UTF-8
