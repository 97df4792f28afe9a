"""Text out of an installed Debian package."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path
from typing import ClassVar, Self

from experiments.data.store.corpus import Corpus, list_files
from experiments.data.store.text_source import TextSource
from sharding.errors import InputError


@dataclasses.dataclass(frozen=True)
class DebianText(TextSource):
    """Files that a Debian package installs. `root` is "/" or where the package was unpacked (`dpkg-deb -x`)."""

    root: str = "/"

    name: ClassVar[str]
    package: ClassVar[str]
    licence: ClassVar[str]
    folder: ClassVar[str]  # below the root
    pattern: ClassVar[str]
    encoding: ClassVar[str] = "utf-8"

    def corpus(self) -> Corpus:
        """The package's text files; InputError that names the package when they are not there."""
        folder = Path(self.root) / self.folder
        files = list_files(folder.glob(self.pattern), folder)
        if not files:
            raise InputError(
                f"The corpus {self.name} needs the Debian package {self.package}: no file matches "
                f"{folder / self.pattern}. Install it (`apt-get install {self.package}`), or unpack it with "
                f"`dpkg-deb -x {self.package}_*.deb DIR` and set root to DIR."
            )
        return Corpus(self.name, self.licence, files, encoding=self.encoding)

    @classmethod
    def example(cls, folder: Path) -> Self:
        """A small instance over files laid out as the package lays out its own, for the contract test."""
        for number in range(2 if "*" in cls.pattern else 1):
            path = folder / cls.folder / cls.pattern.replace("**/", "").replace("*", f"page{number}")
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "\n\n".join(f"Entry {i} of file {number}: {i * i}." for i in range(600)).encode()
            path.write_bytes(gzip.compress(text) if path.suffix in (".gz", ".dz") else text)
        return cls(root=str(folder), length=32)
