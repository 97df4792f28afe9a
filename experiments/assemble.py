"""From a config value to the things that run: mesh -> rules -> layouts -> step. Each arrow is one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from experiments.config import Experiment
from experiments.data.contract import Dataset
from experiments.schedules.named import grid_of, written
from sharding.axes import AXES, MeshShape
from sharding.errors import InputError
from sharding.partitioner import Auto, Partitioner
from sharding.rule import Rules

if TYPE_CHECKING:
    from sharding.check import Traced
    from sharding.params import ParamSpec
    from sharding.step import TrainStep

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent

CACHE = Path(".cache")
"""Token files and compiled programs, rebuilt when they are not there."""


def train_step(
    experiment: Experiment, devices: Sequence[Any] | int, model: Any = None, platform: str = ""
) -> TrainStep:
    """The compiled step of an experiment on devices, or on a number of devices that are not there (to trace only).

    `model` stands in for the one that the experiment builds. platform: of devices that are not there, "cpu", "gpu" or "tpu";
    by default what the config's own would be.
    """
    from sharding.mesh import abstract_mesh, device_mesh

    if isinstance(devices, int):
        shape = experiment.mesh.resolve(devices)
        platform = platform or ("cpu" if experiment.devices.kind == "pretend" else "accelerator")
        return _step(
            experiment, model, shape, abstract_mesh(shape, devices), experiment.partitioner, platform
        )
    shape = experiment.mesh.resolve(len(devices))
    return _step(experiment, model, shape, device_mesh(shape, devices), experiment.partitioner)


def look(experiment: Experiment, step: TrainStep) -> Traced:
    """Trace a step, refusing with InputError what would be wrong or fail."""
    from sharding.check import traced

    try:
        return traced(step, experiment.batch)
    except InputError as error:
        raise InputError(str(error).replace(f"{ROOT}/", "")) from error


def near(source: str) -> str:
    """A file, or file:line, with the file as seen from the repository."""
    file, mark, line = source.rpartition(":") if ":" in source else (source, "", "")
    path = Path(file)
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}{mark}{line}" if file else ""


def untouched(make: Callable[[], T]) -> T:
    """`make()` inside a trace, where no operation runs and so no backend of jax is started."""
    import jax

    made: list[T] = []
    jax.eval_shape(lambda: made.append(make()))
    return made[0]


def one_device(experiment: Experiment, model: Any = None) -> TrainStep:
    """The same step in plain jax.numpy on one device, without mesh or collectives: what every split must agree with."""
    return _step(experiment, model, MeshShape(), None, Auto())


def _step(
    experiment: Experiment, model: Any, shape: MeshShape, mesh: Any, by: Partitioner, platform: str = ""
) -> TrainStep:
    from sharding.layout import Layouts
    from sharding.params import declare, matrices
    from sharding.step import Split, TrainStep

    model = experiment.model.build() if model is None else model
    tree = declare(model)
    layouts = Layouts(rules_on(experiment, tree, shape.sizes()), shape.sizes())
    memory: Any = getattr(experiment.optimizer, "memory", "device")  # an optimizer need not know of another
    split = Split(layouts, mesh, by, experiment.accumulate, platform, memory, experiment.pipeline)
    optimizer = experiment.optimizer.build(experiment.steps, matrices(tree))
    made = TrainStep(model, optimizer, split, clip=experiment.optimizer.largest_norm())
    check_batch(experiment, made)
    return made


def rules_on(experiment: Experiment, tree: Mapping[str, ParamSpec], sizes: Mapping[str, int]) -> Rules:
    """The rules of an experiment on a mesh of these sizes: the config's own, and with a pipeline `stages()`, unless they
    have it already: in the order that the schedule asks for.

    Raises InputError for stages without a schedule, and for a schedule that does not fit them.
    """
    from sharding.pipeline.check import require_sound
    from sharding.pipeline.grid import Place
    from sharding.rules.stages import stages

    own = lays_stages(experiment.rules)
    if experiment.pipeline is None:
        if own and sizes["stage"] > 1:
            raise InputError(
                f"The rules {experiment.rules!r} lay the layers on {sizes['stage']} stages, but pipeline is none, so nothing "
                f"says who does what when. Set pipeline to a schedule, such as '1f1b(microbatches=8)', or mesh axis stage to 1."
            )
        return experiment.rules
    grid = grid_of(experiment.pipeline, sizes["stage"])
    require_sound(grid, f"{written(experiment.pipeline)} on {sizes['stage']} stages", sizes["stage"])
    if own or sizes["stage"] == 1:
        return experiment.rules
    depths = {spec.shape[0] for spec in tree.values() if spec.names[:1] == ("layers",)}
    alike = all(depth % sizes["stage"] == 0 for depth in depths)
    in_order = grid.path == tuple(Place(s) for s in range(sizes["stage"]))
    return experiment.rules | (stages() if alike and in_order else stages(order="spread"))


def lays_stages(rules: Rules) -> bool:
    """Whether a chain has the rule `stages` already."""
    return any(r.call.startswith("stages(") for r in rules.chain)


def check_batch(experiment: Experiment, step: TrainStep) -> None:
    """Refuse a batch that the rules split into parts that are not equal, or whose parts cannot be accumulated."""
    for entry, layout in step.inputs.items():
        shape = step.abstract_batch(experiment.batch)[entry].shape
        for name, n, axes in zip(layout.names, shape, layout.dims, strict=True):
            parts = math.prod(step.split.layouts.sizes[a] for a in axes)
            over = " x ".join(f"{a}={step.split.layouts.sizes[a]}" for a in axes) or "nothing"
            many = step.split.micro_batches
            if name == "batch" and n % (parts * many):
                of = f" (accumulate {experiment.accumulate} x pipeline {many // experiment.accumulate})"
                raise InputError(
                    f"A batch of {n} rows does not divide into {parts} parts (the rules split {entry}'s batch over {over}) "
                    f"of {many} micro-batches each{of if experiment.pipeline else ''}. Make batch a multiple of "
                    f"{parts * many}."
                )
            if n % parts:
                raise InputError(
                    f"The rules split {name} = {n} of the batch entry {entry} into {parts} parts ({over}), which does not "
                    f"divide. Make {name} a multiple of {parts}, or these axes smaller."
                )


def check_data(experiment: Experiment, dataset: Dataset, step: TrainStep) -> None:
    """Refuse a dataset whose rows are not what the model reads: entries, dims, vocabulary."""
    inputs: Any = step.model.inputs
    _check_documents(experiment, dataset, step)
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


def _check_documents(experiment: Experiment, dataset: Dataset, step: TrainStep) -> None:
    """Refuse packed documents for a model that would look across them, and running text for one that keeps them apart."""
    reads, given = ("segments" in entries for entries in (step.model.inputs, dataset.inputs))
    model, data = type(step.model).__name__, type(experiment.data).__name__
    if given and not reads:
        raise InputError(
            f"The dataset {data} packs several documents into a row (segments says which), but the model {model} reads "
            f"{', '.join(step.model.inputs)}: each document would see the ones before it in its row. Set model.documents "
            f"to packed, or data.documents to 'run on'."
        )
    if reads and not given:
        raise InputError(
            f"The model {model} keeps the documents of a row apart by their segments, but the dataset {data} has "
            f"{', '.join(dataset.inputs)}: it does not say where a document begins. Set data.documents to packed, or "
            f"model.documents to 'run on'."
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
