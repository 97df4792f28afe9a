"""What the text sources have in common: a length, a tokenizer, and a corpus that each defines for itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.data.store.corpus import Corpus
    from experiments.data.store.windows import WindowDataset


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Base of the text sources: `class Mine(TextSource)` with a frozen dataclass decorator and `corpus()`.

    `length` is in tokens; `tokenizer` is "bytes" or the path of a tokenizer.json.
    """

    length: int = 256
    tokenizer: str = "bytes"

    def corpus(self) -> Corpus:
        """The files to read. InputError when they are not there."""
        raise NotImplementedError(f"{type(self).__name__} must define corpus()")

    def open(self, cache: Path) -> WindowDataset:
        """Tokenize into `cache` unless that is done, and open. InputError when the text is missing or bad."""
        from experiments.data.store.prepare import cached
        from experiments.data.store.tokenizer import load_tokenizer
        from experiments.data.store.windows import WindowDataset

        return WindowDataset(cached(self.corpus(), load_tokenizer(self.tokenizer), Path(cache)), self.length)
