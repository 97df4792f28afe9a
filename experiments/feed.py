"""Batches onto the mesh: every process reads only the rows that its own devices hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.data.contract import Dataset, Split

if TYPE_CHECKING:
    import jax


def global_batch(
    dataset: Dataset,
    split: Split,
    seed: int,
    step: int,
    rows: int,
    shardings: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """The batch of `step` as global arrays, a pure function of (seed, step) whatever the mesh.

    Each entry is made from the row ranges that this process's devices hold; a range is read once for all entries.
    """
    import jax

    read: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def part(entry: str, index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(rows)
        if (first, last) not in read:
            read[first, last] = dataset.rows(split, seed, step, rows, first, last)
        return read[first, last][entry][(slice(None), *index[1:])]

    batch: dict[str, Any] = {}
    for entry, sharding in shardings.items():
        shape = (rows, *dataset.inputs[entry].shape)
        batch[entry] = jax.make_array_from_callback(shape, sharding, lambda index, e=entry: part(e, index))
    return batch
