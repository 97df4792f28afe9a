"""What a verification feeds every case: the fewest rows that all can split, with weights, indices and documents drawn anew."""

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
            needed = math.lcm(needed, parts * step.split.micro_batches)
    return needed if needed >= 4 and experiment.batch % needed == 0 else experiment.batch


def batches(
    experiment: Experiment,
    dataset: Dataset,
    rows: int,
    steps: int,
    indices: Mapping[str, int],
    documents: Mapping[str, str] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Training rows with weights drawn anew: rows, positions and shards that all weighed the same would hide a mean of
    means. After the first update, whose gradients are compared and must see every device, an eighth of the rows, one at
    least, weighs nothing: in each update another one. `indices`: entries drawn anew as well (`_drawn`). `documents`: entries
    that say which document a position is in, or which place of it, with which of the two; none: rows are not cut (`_cut`).
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
        batch |= drawn
        if documents:
            batch |= _cut(draw, batch, documents)
        made.append({**batch, "weights": batch["weights"] * factor})
    return made


def indices_of(model: Any) -> dict[str, int]:
    """Entry -> how many indices there are, for the entries of a batch that index a dim of some parameter."""
    sizes = {
        n: size for spec in declare(model).values() for n, size in zip(spec.names, spec.shape, strict=True)
    }
    return {k: sizes[entry.indexes] for k, entry in model.inputs.items() if entry.indexes in sizes}


def documents_of(model: Any) -> dict[str, str]:
    """Entry -> "number" or "place", for the entries of a batch that say where the documents of a row are."""
    return {k: entry.documents for k, entry in model.inputs.items() if entry.documents}


MANY = 8
"""Documents of a row at most."""


def _cut(
    draw: np.random.Generator, batch: Mapping[str, np.ndarray], documents: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """The entries that say where documents are, (rows, length), and weights to match: rows of 1, 2, 3 and more documents, cut
    anywhere, of which a quarter end in padding. A small model's rows are one document long, and who ignores that there are
    several is right then.

    Padding weighs nothing. What was padding and is none any more weighs 1, as the tokens of packed documents do.
    """
    number = next((k for k, said in documents.items() if said == "number"), "")
    rows, length = batch[number or next(iter(documents))].shape
    kinds, pads = draw.permutation(rows) % 4, draw.permutation(rows) % 4 == 3
    segments, places = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row in range(rows):
        held = length - int(draw.integers(1, max(length // 4, 1) + 1)) * int(pads[row] and length > 1)
        many = int(kinds[row]) + 1 if kinds[row] < 3 else int(draw.integers(4, MANY + 1))
        cuts = np.sort(draw.choice(np.arange(1, held), min(many, held) - 1, replace=False))
        starts = np.concatenate([[0], cuts])
        segments[row, :held] = np.searchsorted(starts, np.arange(held), side="right")
        places[row, :held] = np.arange(held) - starts[segments[row, :held] - 1]
    made = {k: segments if said == "number" else places for k, said in documents.items()}
    weights = batch["weights"]
    if number and weights.shape == segments.shape:
        weights = np.where(batch[number] > 0, weights, 1.0) * (segments > 0)
    made = {k: x.astype(batch[k].dtype) for k, x in made.items()}
    return {**made, "weights": weights.astype(batch["weights"].dtype)}


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
