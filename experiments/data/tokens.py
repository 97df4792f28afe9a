"""Token files written before by `shardlab tokenize SOURCE --out DIR`: for corpora of any size."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from experiments.data.store.windows import WindowDataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The folder `folder` (train.tokens, heldout.tokens, facts.json) in windows of `length` tokens."""

    folder: str
    length: int = 256

    def open(self, cache: Path) -> WindowDataset:
        """Open the folder; `cache` is not used, since nothing has to be built. InputError for a bad folder."""
        from experiments.data.store.windows import WindowDataset

        return WindowDataset(Path(self.folder).expanduser(), self.length)

    @classmethod
    def example(cls, folder: Path) -> Self:
        """A small folder of token files below `folder`, for the contract test."""
        from experiments.data.store.prepare import prepare
        from experiments.data.store.tokenizer import ByteTokenizer
        from experiments.data.text import Text

        prepare(Text.example(folder).corpus(), ByteTokenizer(), folder / "tokens")
        return cls(folder=str(folder / "tokens"), length=32)
