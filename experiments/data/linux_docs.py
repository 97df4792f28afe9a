"""Debian's linux-doc-6.1: the Linux 6.1 documentation as reStructuredText: 3,184 files, 24.2 MB."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from experiments.data.store.debian import DebianText


@dataclasses.dataclass(frozen=True)
class LinuxDocs(DebianText):
    """The Linux 6.1 documentation as reStructuredText. Read when the package is installed."""

    name: ClassVar[str] = "linux_docs"
    package: ClassVar[str] = "linux-doc-6.1"
    licence: ClassVar[str] = "GPL-2.0 (never redistribute as part of this project)"
    folder: ClassVar[str] = "usr/share/doc/linux-doc-6.1/Documentation"
    pattern: ClassVar[str] = "**/*.rst.gz"
