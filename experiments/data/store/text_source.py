"""What the text sources have in common: a length, a tokenizer, and a corpus that each defines for itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sharding.errors import InputError

if TYPE_CHECKING:
    from experiments.data.store.corpus import Corpus
    from experiments.data.store.windows import WindowDataset


Documents = Literal["run on", "packed"]
"""How documents become rows: one after the other, cut wherever a row ends, or packed, each apart from the others."""


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Base of the text sources: `class Mine(TextSource)` with a frozen dataclass decorator and `corpus()`.

    `length` is in tokens; `tokenizer` is "bytes" or the path of a tokenizer.json. `documents` is "run on" (a row is a
    window over the documents one after the other) or "packed" (rows of documents that do not see each other, with the
    entries `segments` and `positions`), which the model's config says too.
    """

    length: int = 256
    tokenizer: str = "bytes"
    documents: Documents = dataclasses.field(default="run on", kw_only=True)

    def corpus(self) -> Corpus:
        """The files to read. InputError when they are not there."""
        raise NotImplementedError(f"{type(self).__name__} must define corpus()")

    def open(self, cache: Path) -> WindowDataset:
        """Tokenize into `cache` unless that is done, and open. InputError when the text is missing or bad."""
        from experiments.data.store.prepare import cached
        from experiments.data.store.tokenizer import load_tokenizer

        folder = cached(self.corpus(), load_tokenizer(self.tokenizer), Path(cache))
        return open_rows(folder, self.length, self.documents, folder)


def open_rows(folder: Path, length: int, documents: Documents, rows_in: Path) -> WindowDataset:
    """The token files of `folder` in rows of `length` tokens; packed ones are kept in the folder `rows_in`. InputError
    for a bad folder, and for another word than those of `Documents`.
    """
    from experiments.data.store.packed import PackedDataset
    from experiments.data.store.windows import WindowDataset

    if documents not in ("run on", "packed"):
        raise InputError(
            f"The text's documents are {documents!r}; they are 'run on' or 'packed'. Set data.documents."
        )
    return WindowDataset(folder, length) if documents == "run on" else PackedDataset(folder, length, rows_in)
