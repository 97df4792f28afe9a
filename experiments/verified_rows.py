"""What a verification feeds every case: the fewest rows that all can split, with weights and indices drawn anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.config import Experiment
from experiments.data.contract import Dataset
from sharding.params import declare
from sharding.step import TrainStep


def fewest_rows(experiment: Experiment, steps: Sequence[TrainStep]) -> int:
    """Rows of a batch that every case can split: the fewest, since rows do not touch each other; at most the config's."""
    needed = 1
    for step in steps:
        for layout in step.inputs.values():
            axes = layout.dims[layout.names.index("batch")] if "batch" in layout.names else ()
            parts = math.prod(step.split.layouts.sizes[a] for a in axes)
            needed = math.lcm(needed, parts * experiment.accumulate)
    return needed if needed >= 4 and experiment.batch % needed == 0 else experiment.batch


def batches(
    experiment: Experiment, dataset: Dataset, rows: int, steps: int, indices: Mapping[str, int]
) -> list[dict[str, np.ndarray]]:
    """Training rows with weights drawn anew: rows, positions and shards that all weighed the same would hide a mean of
    means. After the first update, whose gradients are compared and must see every device, an eighth of the rows, one at
    least, weighs nothing: in each update another one. `indices`: entries drawn anew as well (`_drawn`).
    """
    draw = np.random.default_rng(experiment.seed)
    made, empty = [], max(rows // 8, min(rows - 1, 1))
    for step in range(steps):
        batch = dataset.rows("train", experiment.seed, step, rows, 0, rows)
        factor = draw.uniform(0.1, 2.0, batch["weights"].shape).astype(np.float32)
        if step and empty:
            at = (step - 1) % (rows // empty) * empty
            factor[at : at + empty] = 0.0
        drawn = {k: _drawn(draw, batch[k], below) for k, below in indices.items()}
        made.append({**batch, **drawn, "weights": batch["weights"] * factor})
    return made


def indices_of(model: Any) -> dict[str, int]:
    """Entry -> how many indices there are, for the entries of a batch that index a dim of some parameter."""
    sizes = {
        n: size for spec in declare(model).values() for n, size in zip(spec.names, spec.shape, strict=True)
    }
    return {k: sizes[entry.indexes] for k, entry in model.inputs.items() if entry.indexes in sizes}


def _drawn(draw: np.random.Generator, ids: np.ndarray, below: int) -> np.ndarray:
    """Indices drawn evenly from all of them, first and last of every part of 8 among the last rows where they have room:
    text uses few of its vocabulary's tokens, and rows that nobody looks up hide what is wrong with them.
    """
    made = draw.integers(0, below, ids.size).astype(ids.dtype)
    edges = np.unique(
        [e for part in np.array_split(np.arange(below), 8) if part.size for e in (part[0], part[-1])]
    )
    room = min(edges.size, ids.size // 2)
    made[ids.size - room :] = draw.permutation(edges)[:room]
    return made.reshape(ids.shape)
