"""What `explain` says: where every array lies, which rule put it there, what it costs. Traced, never run.

`explain(experiment, devices)` is a pure function of the config: it builds the model without arrays, asks the rules for
every layout and traces the step on a mesh of devices that are not there. A run that is about to start asks
`explain_step` of the step it has.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.assemble import train_step
from experiments.config import Experiment
from sharding.errors import InputError
from sharding.layout import Layout
from sharding.partitioner import Auto, Manual
from sharding.rule import PARAM_ROLES, Rules

if TYPE_CHECKING:
    from sharding.region import Tap
    from sharding.step import TrainStep

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Placed:
    """One dim split over one axis: the rule that did it, where that rule is written, the devices of the axis."""

    name: str
    axis: str
    size: int
    rule: str
    source: str


@dataclass(frozen=True)
class Line:
    """One array and where it lies: a parameter, its gradient or optimizer state, a batch entry, an activation."""

    kind: str
    path: str
    """A parameter's or entry's path; for an activation the named op that makes it."""
    role: str
    shape: tuple[int, ...]
    """Global."""
    dtype: str
    names: tuple[str, ...]
    dims: tuple[tuple[str, ...], ...]
    """The axes that split each dim, of those with more than one device."""
    layout: str
    bytes_per_device: int
    placed: tuple[Placed, ...]
    whole: str
    """Why every device has all of it, "" when it is split."""
    notes: tuple[str, ...] = ()
    """What a rule left out because another had taken the dim or the axis."""
    copies: int = 1
    """Arrays of this shape that it stands for: AdamW's state has two of each parameter's."""
    in_use: str = ""
    """The layout that the layers use, where it is another than at rest."""
    gathered: tuple[str, ...] = ()
    """Axes over which it is gathered for that."""
    source: str = ""
    """file:line of the op, for an activation."""


@dataclass(frozen=True)
class Explanation:
    """Everything that `explain` knows; bytes are per device."""

    name: str
    mesh: dict[str, int]
    devices: int
    rules: str
    chain: tuple[tuple[str, str], ...]
    """Each rule's call and its file:line, in the order they are asked."""
    partitioner: str
    parameters: int
    lines: tuple[Line, ...]
    collectives: tuple[dict[str, Any], ...]
    """Per axis and kind: how many in one step and the bytes each device sends. Empty under XLA's partitioner."""
    forward_flops: int
    tokens: int
    bytes_per_device: dict[str, int]
    """Kind of line -> bytes of all its arrays, for what lies on a device at once (activations do not)."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def of(self, kind: str) -> tuple[Line, ...]:
        """The lines of a kind."""
        return tuple(line for line in self.lines if line.kind == kind)


HELD = ("parameter", "gradient", "optimizer", "batch")


def explain(experiment: Experiment, devices: int) -> Explanation:
    """Explain an experiment on `devices` devices that need not be there: no backend of jax is started.

    Traced as it would run on the CPU for pretend devices and on an accelerator otherwise (models may unroll their
    layers on one and scan them on the other). Raises InputError for whatever cannot be laid out.
    """
    import jax

    made: list[Explanation] = []

    def make() -> None:
        made.append(explain_step(experiment, train_step(experiment, devices)))

    # Inside a trace no operation runs: optax makes its counters when it is asked for the state's structure, and outside
    # one that alone would start a backend.
    jax.eval_shape(make)
    return made[0]


def explain_step(experiment: Experiment, step: TrainStep) -> Explanation:
    """Explain a step that was made already: on a mesh of real devices its first call finds this trace."""
    import jax

    from sharding.ledger import collectives, flops, per_axis
    from sharding.plain import check_reductions

    layouts, sizes = step.split.layouts, step.split.layouts.sizes
    state, batch = step.abstract_state(), step.abstract_batch(experiment.batch)
    taps: list[Tap] = []
    forward = _forward(step, state["params"], batch, taps)
    _check_divides(taps, step)
    if isinstance(experiment.partitioner, Manual):
        check_reductions(forward, jax.make_jaxpr(step.evaluation)(state["params"], batch))
    lines = [*_parameters(step, state), *_inputs(step, batch), *_activations(taps, step)]
    found: list[dict[str, Any]] = []
    if isinstance(experiment.partitioner, Manual):
        for axes, kinds in per_axis(collectives(_update(step, state, batch), sizes)).items():
            found += [
                {"axes": axes, "kind": kind, "per_step": count, "bytes_sent_per_device": sent}
                for kind, (count, sent) in kinds.items()
            ]
    layouts.check_used()
    return Explanation(
        name=experiment.name,
        mesh={a: n for a, n in sizes.items() if n > 1},
        devices=math.prod(sizes.values()),
        rules=repr(experiment.rules),
        chain=tuple((r.call, _short(r.source)) for r in experiment.rules.chain),
        partitioner=repr(experiment.partitioner),
        parameters=sum(s.size for s in step.tree.values()),
        lines=tuple(lines),
        collectives=tuple(found),
        forward_flops=flops(forward),
        tokens=math.prod(batch["labels"].shape),
        bytes_per_device={
            kind: sum(line.bytes_per_device for line in lines if line.kind == kind) for kind in HELD
        },
    )


def _update(step: TrainStep, state: Any, batch: Any) -> Any:
    """The jaxpr of one update. On real devices it is traced as the compiled step will be called, and kept by jax."""
    import jax
    from jax.sharding import Mesh

    if not isinstance(step.split.mesh, Mesh):
        return jax.make_jaxpr(step.update)(state, batch)
    lies = step.batch_shardings()
    put = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies[k]) for k, x in batch.items()}
    return step.step.trace(state, put).jaxpr


def _check_divides(taps: list[Any], step: TrainStep) -> None:
    """Refuse an activation that the rules split into parts that are not equal."""
    layouts = step.split.layouts
    for tap in taps:
        lies = layouts.activation(tap.names)
        for name, n, axes in zip(tap.names, tap.shape, lies.dims, strict=True):
            parts = math.prod(layouts.sizes[a] for a in axes)
            if n % parts:
                raise InputError(
                    f"{_short(tap.source)}: the rules {layouts.rules!r} split {name} = {n} of an activation "
                    f"({' '.join(tap.names)}) into {parts} parts ({' x '.join(f'{a}={layouts.sizes[a]}' for a in axes)}), "
                    f"which does not divide. Make {name} a multiple of {parts}, or these axes smaller."
                )


def _forward(step: TrainStep, params: Any, batch: Any, taps: list[Any] | None) -> Any:
    """The jaxpr of the forward pass on global shapes, without a mesh: what the arrays are."""
    import jax

    from sharding.region import enter

    region = step.region(taps)
    region.mesh, region.partitioner = None, Auto()
    with enter(region):
        return jax.make_jaxpr(lambda p, b: step.evaluate_sums(p, b))(params, batch)


def _parameters(step: TrainStep, state: Any) -> list[Line]:
    moments, lines = _moments(state, step.tree), []
    for path, spec in step.tree.items():
        lies, what = step.layouts[path], (path, spec.shape, str(spec.dtype))
        gathered = tuple(a for a in lies.param.axes if a not in lies.compute.axes)
        used = lies.compute.text() if lies.compute.dims != lies.param.dims else ""
        lines.append(_line("parameter", "param", *what, lies.param, step, in_use=used, gathered=gathered))
        lines.append(_line("gradient", "gradient", *what, lies.gradient, step))
        if moments[path]:
            lines.append(_line("optimizer", "optimizer", *what, lies.optimizer, step, copies=moments[path]))
    return lines


def _moments(state: Any, tree: dict[str, Any]) -> dict[str, int]:
    """How many arrays of optimizer state each parameter has."""
    import jax

    count = dict.fromkeys(tree, 0)
    for keys, _ in jax.tree_util.tree_flatten_with_path(state["optimizer"])[0]:
        last = str(getattr(keys[-1], "key", "")) if keys else ""
        if last in count:
            count[last] += 1
    return count


def _inputs(step: TrainStep, batch: dict[str, Any]) -> list[Line]:
    return [
        _line("batch", "activation", k, tuple(x.shape), str(x.dtype), step.inputs[k], step)
        for k, x in batch.items()
    ]


def _activations(taps: list[Tap], step: TrainStep) -> list[Line]:
    """Each named op's result once, however many layers or micro-batches repeat it."""
    once = {(t.op, t.names, t.shape, t.source): t for t in taps if t.names}
    return [
        _line("activation", "activation", t.op, t.shape, t.dtype, step.split.layouts.activation(t.names), step,
              source=_short(t.source))
        for t in once.values()
    ]  # fmt: skip


def _line(
    kind: str, role: str, path: str, shape: Any, dtype: str, lies: Layout, step: TrainStep, **more: Any
) -> Line:
    import jax.numpy as jnp

    from sharding.layout import local_shape

    layouts = step.split.layouts
    local = jnp.dtype(dtype).itemsize * math.prod(local_shape(shape, lies.dims, layouts.sizes))
    placed = tuple(Placed(r.name, r.axis, r.size, r.rule, _short(r.source)) for r in lies.reasons)
    return Line(
        kind, path, role, tuple(shape), dtype, lies.names, lies.dims, lies.text(), local * more.get("copies", 1),
        placed, _whole(lies, role, layouts.rules), lies.declined, **more,
    )  # fmt: skip


def _whole(lies: Layout, role: str, rules: Rules) -> str:
    """Why an array that nothing splits is whole on every device."""
    if lies.axes:
        return ""
    if lies.reasons:
        each = dict.fromkeys(f"{r.rule} splits {r.name} over {r.axis}" for r in lies.reasons)
        return f"{' and '.join(each)}, which has one device"
    if not lies.names:
        return "a scalar"
    roles = ("activation",) if role == "activation" else PARAM_ROLES[: PARAM_ROLES.index(role) + 1]
    asked = [r.call for r in rules.chain if any(callable(getattr(r, x)) for x in roles)]
    searched = f", and {' and '.join(asked)} found no dim that divides" if asked else ""
    return f"no rule names {' or '.join(dict.fromkeys(lies.names))}{searched}"


def _short(source: str) -> str:
    file, _, line = source.rpartition(":")
    path = Path(file)
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{line}" if file else ""
