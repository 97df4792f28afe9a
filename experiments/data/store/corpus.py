"""A corpus: named text files in a fixed order, read as a stream of documents that each belong to one split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from experiments.data.store.pieces import passages, read_pieces
from experiments.data.store.split import HELDOUT_ONE_IN, heldout_files, is_heldout_passage
from sharding.errors import InputError

PASSAGE_BYTES = 64 << 10
FORMAT = 3  # raise it when the same files would give other tokens or facts: it is part of every cache key


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One text file (gzip when it ends in .gz or .dz). `name` is its path relative to the corpus, with slashes."""

    name: str
    path: Path
    size: int
    mtime_ns: int


@dataclasses.dataclass(frozen=True)
class Document:
    """One document. `pieces()` yields its UTF-8 text in order, in blocks of about 1 MiB that end after a newline."""

    name: str
    split: Literal["train", "heldout"]
    pieces: Callable[[], Iterable[bytes]]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files, sorted by name. Several files are split by file; a single one is cut into passages of about 64 KiB.

    `unreadable` says what happens to a file that is not valid text: "refuse" raises an InputError that names
    file and byte, "skip" leaves it out, and `skipped` (names) counts it in the facts.
    """

    name: str
    licence: str
    files: tuple[SourceFile, ...]
    encoding: str = "utf-8"
    unreadable: Literal["refuse", "skip"] = "refuse"
    skipped: list[str] = dataclasses.field(default_factory=list, compare=False)

    @property
    def split_by(self) -> str:
        return "file" if len(self.files) > 1 else f"passage of one file (1 of each {HELDOUT_ONE_IN})"

    @property
    def bytes_on_disk(self) -> int:
        return sum(file.size for file in self.files)

    def key(self, *more: str) -> str:
        """16 hex digits that change when a file's path, size or time of change does, or one of `more`."""
        listing = [[file.name, str(file.path), file.size, file.mtime_ns] for file in self.files]
        state = [FORMAT, self.name, self.encoding, self.unreadable, listing, *more]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]

    def documents(self) -> Iterator[Document]:
        """Every readable document once, in order. Streams: memory does not grow with the corpus."""
        self.skipped.clear()
        if len(self.files) == 1:
            yield from self._passages(self.files[0])
            return
        heldout = heldout_files([file.name for file in self.files])
        for file in self.files:
            if self.unreadable == "skip" and not self._readable(file):
                self.skipped.append(file.name)
                continue
            yield Document(
                file.name,
                "heldout" if file.name in heldout else "train",
                lambda path=file.path: read_pieces(path, self.encoding),
            )

    def _passages(self, file: SourceFile) -> Iterator[Document]:
        # Small files get smaller passages, so that at least 14 come out and one of them is held out.
        size = file.size
        if self.encoding != "utf-8" and size < 8 * HELDOUT_ONE_IN * PASSAGE_BYTES:
            size = sum(
                map(len, read_pieces(file.path, self.encoding))
            )  # UTF-16 takes twice the bytes of UTF-8
        target = max(1, min(PASSAGE_BYTES, size // (2 * HELDOUT_ONE_IN)))
        for number, text in enumerate(passages(read_pieces(file.path, self.encoding), target)):
            side = "heldout" if is_heldout_passage(file.name, number) else "train"
            yield Document(f"{file.name}#{number}", side, lambda text=text: (text,))

    def _readable(self, file: SourceFile) -> bool:
        try:
            for _ in read_pieces(file.path, self.encoding):
                pass
        except InputError:
            return False
        return True


def list_files(paths: Iterable[Path], root: Path) -> tuple[SourceFile, ...]:
    """The files among `paths` as SourceFiles named relative to `root`, sorted by name, empty files left out."""
    found = {}
    for path in paths:
        if path.is_file() and (state := path.stat()).st_size:
            name = path.relative_to(root).as_posix()
            found[name] = SourceFile(name, path, state.st_size, state.st_mtime_ns)
    return tuple(found[name] for name in sorted(found))
