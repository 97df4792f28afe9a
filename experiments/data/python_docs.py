"""Debian's python3.11-doc: the Python 3.11 documentation as reStructuredText: 497 files, 11.0 MB."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from experiments.data.store.debian import DebianText


@dataclasses.dataclass(frozen=True)
class PythonDocs(DebianText):
    """The Python 3.11 documentation as reStructuredText. Read when the package is installed."""

    name: ClassVar[str] = "python_docs"
    package: ClassVar[str] = "python3.11-doc"
    licence: ClassVar[str] = "PSF-2.0"
    folder: ClassVar[str] = "usr/share/doc/python3.11/html/_sources"
    pattern: ClassVar[str] = "**/*.rst.txt"
