"""A dataset of rows that documents were packed into, each document apart from the others in its row."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.data.contract import RowSpec, Split
from experiments.data.store.packing import Rows, spread
from experiments.data.store.row_file import packed_rows
from experiments.data.store.windows import WindowDataset


class PackedDataset(WindowDataset):
    """Rows of whole documents, by best fit; a document longer than a row is cut (`packing.pack`). Beside `tokens`,
    `labels` and `weights` a row has `segments` (0 in padding, else which of the row's documents, from 1) and `positions`
    (from 0 in each).

    A document begins with a separator as its first input and ends with one as its last label. So every token of the
    file is a label once in an epoch, no label is of another document, and none is lost; only padding weighs 0. A rest of
    a cut document begins with the token before it as its first input, and counts its positions from 0 as well.
    """

    def __init__(self, folder: Path, length: int, rows_in: Path):
        """Open `folder` as written by `prepare`, packed into rows of `length` tokens. The rows are looked for in the
        folder `rows_in`, and packed into it when they are not there. InputError for a bad folder.
        """
        self.packed: dict[str, Rows] = {}
        self._sha256: dict[str, str] = {}
        self._rows_in = Path(rows_in)
        super().__init__(folder, length)
        self.inputs = dict(self.inputs) | {
            "segments": RowSpec((length,), "int32"),
            "positions": RowSpec((length,), "int32"),
        }
        self.facts = dict(self.facts) | {"documents": "packed"}
        for split, rows in self.packed.items():
            held = self.files[split].header.tokens
            self.facts[f"{split}_rows"] = len(rows)
            self.facts[f"{split}_rows_sha256"] = self._sha256[split]
            self.facts[f"{split}_padding_share"] = 1 - held / (len(rows) * length)

    def gather(self, split: Split, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `indices` of a split: weights float32, the other entries int32, each [n, length]."""
        source, segments, positions = spread(self.packed[split], indices, self.length)
        stored, padding = self.files[split].tokens, source < 0
        labels = np.where(padding, self.separator, stored[np.maximum(source, 0)])
        tokens = np.where(source > 0, stored[np.maximum(source - 1, 0)], self.separator)
        made = {"tokens": tokens, "labels": labels, "segments": segments, "positions": positions}
        weights = (~padding).astype(np.float32)
        return {name: array.astype(np.int32) for name, array in made.items()} | {"weights": weights}

    def heldout_labels(self, rows: int) -> list[np.ndarray]:
        """The labels of the first `rows` held-out rows in the order of the text, each (n,): pieces that follow one another
        there are one stretch, so that a character that a row's end cuts in two is whole again.
        """
        packed, stored = self.packed["heldout"], self.files["heldout"].tokens
        last = int(packed.first[rows])
        order = np.argsort(packed.starts[:last])
        starts = packed.starts[:last][order].astype(np.int64)
        ends = starts + packed.lengths[:last][order]
        begins = np.flatnonzero(np.append(True, starts[1:] != ends[:-1]))  # the first piece of each stretch
        stops = ends[np.append(begins[1:], len(ends)) - 1]
        return [
            stored[start:stop] for start, stop in zip(starts[begins].tolist(), stops.tolist(), strict=True)
        ]

    def _count(self, split: str) -> int:
        self.packed[split], self._sha256[split] = packed_rows(self.files[split], self.length, self._rows_in)
        return len(self.packed[split])
