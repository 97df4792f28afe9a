"""From a config value to the things that run: mesh -> rules -> layouts -> step. Each arrow is one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import Experiment
from experiments.data.contract import Dataset
from sharding.axes import AXES, MeshShape
from sharding.errors import InputError

if TYPE_CHECKING:
    from sharding.step import TrainStep

CACHE = Path(".cache")
"""Token files and compiled programs, rebuilt when they are not there."""


def train_step(experiment: Experiment, devices: Sequence[Any] | int) -> TrainStep:
    """The compiled step of an experiment on devices, or on a number of devices that are not there (to trace only)."""
    from sharding.layout import Layouts
    from sharding.mesh import abstract_mesh, device_mesh
    from sharding.params import declare, matrices
    from sharding.step import Split, TrainStep

    here = isinstance(devices, int)
    count = devices if isinstance(devices, int) else len(devices)
    shape = experiment.mesh.resolve(count)
    layouts = Layouts(experiment.rules, shape.sizes())
    model = experiment.model.build()
    mesh: Any = abstract_mesh(shape, count) if here else device_mesh(shape, devices)  # type: ignore[arg-type]
    platform = ("cpu" if experiment.devices.kind == "pretend" else "accelerator") if here else ""
    split = Split(layouts, mesh, experiment.partitioner, experiment.accumulate, platform)
    optimizer = experiment.optimizer.build(experiment.steps, matrices(declare(model)))
    made = TrainStep(model, optimizer, split, clip=getattr(experiment.optimizer, "clip", math.inf))
    check_batch(experiment, made)
    return made


def check_batch(experiment: Experiment, step: TrainStep) -> None:
    """Refuse a batch that the rules split into parts that are not equal, or whose parts cannot be accumulated."""
    sizes = step.split.layouts.sizes
    for entry, layout in step.inputs.items():
        if "batch" not in layout.names:
            continue
        parts = 1
        for axis in layout.dims[layout.names.index("batch")]:
            parts *= sizes[axis]
        if experiment.batch % (parts * experiment.accumulate):
            raise InputError(
                f"A batch of {experiment.batch} rows does not divide into {parts} parts (the rules split {entry}'s batch "
                f"over {' x '.join(f'{a}={sizes[a]}' for a in layout.dims[layout.names.index('batch')]) or 'nothing'}) "
                f"of {experiment.accumulate} micro-batches each. Make batch a multiple of {parts * experiment.accumulate}."
            )


def check_data(experiment: Experiment, dataset: Dataset, step: TrainStep) -> None:
    """Refuse a dataset whose rows are not what the model reads: entries, dims, vocabulary."""
    inputs: Any = step.model.inputs
    missing = sorted(set(inputs) - set(dataset.inputs))
    if missing:
        raise InputError(
            f"The model {type(step.model).__name__} reads {', '.join(inputs)}, but the dataset "
            f"{type(experiment.data).__name__} has {', '.join(dataset.inputs)}: {', '.join(missing)} is missing. "
            f"Choose a dataset with these entries."
        )
    for name, entry in inputs.items():
        spec = dataset.inputs[name]
        if tuple(spec.shape) != entry.row or spec.dtype != entry.dtype:
            raise InputError(
                f"The model reads {name} as rows of {entry.row} {entry.dtype}, but the dataset's rows are "
                f"{tuple(spec.shape)} {spec.dtype}. Give model and data the same sizes (model.length and data.length)."
            )
    vocab, have = getattr(experiment.model, "vocab", None), dataset.facts.get("vocab")
    if vocab is not None and have is not None and have > vocab:
        raise InputError(
            f"The dataset has {have} tokens, but the model's vocabulary is {vocab}. Set model.vocab to at least {have}."
        )


def check_axes(overrides: Sequence[str]) -> None:
    """Refuse command-line overrides that give a mesh axis twice: which of the two was meant is not ours to guess."""
    from experiments.overrides import groups, plain

    pairs = []
    for group in groups(overrides):
        part, _, axis = plain(group[0]).partition(".")
        size = group[0].partition("=")[2] or "".join(group[1:])
        if part == "mesh" and axis in AXES:
            try:
                pairs.append((axis, int(size)))
            except (
                ValueError
            ):  # of a flag given twice only the last is parsed, so nothing else refuses the first
                raise InputError(
                    f"--mesh.{axis} {size} cannot be read: a mesh axis has a whole number of devices, or -1 to fill. "
                    f"Give each axis once."
                ) from None
    MeshShape.of(*pairs)
