"""Token files written before by `shardlab tokenize SOURCE --out DIR`: for corpora of any size."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Self

from experiments.data.store.text_source import Documents, open_rows
from sharding.errors import InputError

if TYPE_CHECKING:
    from experiments.data.store.windows import WindowDataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The folder `folder` (train.tokens, heldout.tokens, facts.json) in rows of `length` tokens; `documents` is "run on"
    or "packed", as for every text source.
    """

    folder: str
    length: int = 256
    documents: Documents = "run on"

    def open(self, cache: Path) -> WindowDataset:
        """Open the folder; only packed rows are built, and kept under `cache`. InputError for a bad folder."""
        if not self.folder:
            raise InputError(
                "The folder of token files is empty text. Give one that `shardlab tokenize` wrote ('.' is this one)."
            )
        return open_rows(Path(self.folder).expanduser(), self.length, self.documents, Path(cache) / "packed")

    @classmethod
    def example(cls, folder: Path) -> Self:
        """A small folder of token files below `folder`, for the contract test."""
        from experiments.data.store.prepare import prepare
        from experiments.data.store.tokenizer import ByteTokenizer
        from experiments.data.text import Text

        prepare(Text.example(folder).corpus(), ByteTokenizer(), folder / "tokens")
        return cls(folder=str(folder / "tokens"), length=32)
