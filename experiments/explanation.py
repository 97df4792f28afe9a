"""What `explain` says: where every array lies, which rule put it there, what it costs. Traced, never run.

`explain(experiment, devices)` is a pure function of the config: it builds the model without arrays, asks the rules for
every layout and traces the step on a mesh of devices that are not there. A run that is about to start asks
`explain_step` of the step it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from experiments.assemble import ROOT, look, near, train_step, untouched
from experiments.config import Experiment
from experiments.pictured import Ordered, inside_attention, orders
from experiments.schedules.named import grid_of, written
from sharding.finding import Finding, Limits
from sharding.layout import Layout
from sharding.paths import ByPath
from sharding.pipeline import clocks
from sharding.rule import PARAM_ROLES, Rules

if TYPE_CHECKING:
    from sharding.check import Traced
    from sharding.region import Tap
    from sharding.step import TrainStep


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
    """`inside`: an array inside attention, which no op returns."""
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
    memory: str = "device"
    """Where it lies between steps; on the "host", `bytes_per_device` are bytes there, for each device."""


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
    sources: tuple[dict[str, Any], ...]
    """The same by the line and op that asked for them, with the rules that split arrays over these axes."""
    findings: tuple[Finding, ...]
    """What the split wastes, the gravest first."""
    forward_flops: int
    tokens: int
    bytes_per_device: dict[str, int]
    """Kind of line -> bytes of all its arrays, for what lies on a device at once (activations do not)."""
    host_bytes_per_device: int
    """The same of what lies in the host's memory, all kinds."""
    orders: tuple[Ordered, ...]
    pipeline: str = ""
    """The schedule with its stages, ticks, bubble and stash, in words; "" without one."""
    """Dims whose positions do not lie in their natural order."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def of(self, kind: str) -> tuple[Line, ...]:
        """The lines of a kind."""
        return tuple(line for line in self.lines if line.kind == kind)


HELD = ("parameter", "gradient", "optimizer", "batch")


def explain(experiment: Experiment, devices: int, limits: Limits = Limits()) -> Explanation:  # noqa: B008
    """Explain an experiment on `devices` devices that need not be there: no backend of jax is started.

    Traced as it would run on the CPU for pretend devices and on an accelerator otherwise (models may unroll their
    layers on one and scan them on the other). Raises InputError for whatever cannot be laid out.
    """
    return untouched(lambda: explain_step(experiment, train_step(experiment, devices), limits))


def explain_step(
    experiment: Experiment,
    step: TrainStep,
    limits: Limits = Limits(),  # noqa: B008
    seen: Traced | None = None,
) -> Explanation:
    """Explain a step that was made already: on a mesh of real devices its first call finds this trace. `seen`: the trace."""
    from sharding.check import findings
    from sharding.ledger import flops

    layouts, sizes = step.split.layouts, step.split.layouts.sizes
    seen = seen or look(experiment, step)
    lines = [*_parameters(step, seen.state), *_inputs(step, seen.batch), *_activations(seen.taps, step)]
    totals, sources = _traffic(seen, step)
    return Explanation(
        name=experiment.name,
        mesh={a: n for a, n in sizes.items() if n > 1},
        devices=math.prod(sizes.values()),
        rules=repr(layouts.rules),
        chain=tuple((r.call, near(r.source)) for r in layouts.rules.chain),
        partitioner=repr(experiment.partitioner),
        pipeline=_pipeline(experiment, sizes),
        parameters=sum(s.size for s in step.tree.values()),
        lines=tuple(lines),
        collectives=totals,
        sources=sources,
        findings=tuple(_near(f) for f in findings(step, seen, limits)),
        forward_flops=flops(seen.forward),
        tokens=counted(seen.batch),
        bytes_per_device={
            kind: sum(line.bytes_per_device for line in lines if (line.kind, line.memory) == (kind, "device"))
            for kind in HELD
        },
        host_bytes_per_device=sum(line.bytes_per_device for line in lines if line.memory == "host"),
        orders=orders(
            step, (d for x in lines for d in zip(x.names, x.shape, strict=True) if "batch" in x.names)
        ),
    )


def counted(batch: dict[str, Any]) -> int:
    """Tokens or examples of a batch: as many as it has labels, or weights where a model's targets have another name."""
    rows = next(iter(batch.values())).shape[:1]
    return math.prod(next((batch[k].shape for k in ("labels", "weights") if k in batch), rows))


def _pipeline(experiment: Experiment, sizes: Mapping[str, int]) -> str:
    if experiment.pipeline is None:
        return ""
    grid = grid_of(experiment.pipeline, sizes["stage"])
    idle = clocks.lockstep(grid, clocks.Costs()).bubble
    kept = " ".join(map(str, clocks.stash(grid)))
    what = "micro-batches" if grid.chunks == 1 else f"micro-batches of a chunk, {grid.chunks} chunks a stage"
    return (
        f"{written(experiment.pipeline)} on {grid.stages} stages: {grid.ticks} ticks, bubble {100 * idle:.3g} % "
        f"(lockstep, F = B = W), stash by stage {kept} {what}"
    )


def _traffic(seen: Traced, step: TrainStep) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    """Every collective of the step summed by axes and kind, and by the line that asked for it, the most bytes first."""
    from sharding.ledger import collectives, per_axis
    from sharding.waste import rules_of

    if seen.update is None:
        return (), ()
    found = collectives(seen.update, step.split.layouts.sizes)
    totals = tuple(
        {"axes": axes, "kind": kind, "per_step": count, "bytes_sent_per_device": sent}
        for axes, kinds in per_axis(found).items()
        for kind, (count, sent) in kinds.items()
    )
    placed, by = rules_of(step.split.layouts), {}
    for c in found:
        key = (near(c.source), c.op, c.axes, c.kind)
        count, sent = by.get(key, (0, 0))
        by[key] = (count + c.times, sent + c.bytes)
    rows = (
        {"source": source, "op": op, "axes": axes, "kind": kind, "per_step": count, "bytes_sent_per_device": sent,
         "rules": tuple(dict.fromkeys(f"{call} {near(at)}" for a in axes for call, at in placed[a]))}
        for (source, op, axes, kind), (count, sent) in by.items()
    )  # fmt: skip
    return totals, tuple(sorted(rows, key=lambda row: -row["bytes_sent_per_device"]))


def _near(finding: Finding) -> Finding:
    """The finding with files as seen from the repository."""
    cut = lambda x: x.replace(f"{ROOT}/", "")
    return replace(
        finding, path=cut(finding.path), says=cut(finding.says), sources=tuple(map(cut, finding.sources))
    )


def _parameters(step: TrainStep, state: Any) -> list[Line]:
    from sharding.check import optimizer_copies

    moments, lines = optimizer_copies(step, state), []
    for path, spec in step.tree.items():
        lies, what = step.layouts[path], (path, spec.shape, str(spec.dtype))
        gathered = tuple(a for a in lies.param.axes if a not in lies.compute.axes)
        used = lies.compute.text() if lies.compute.dims != lies.param.dims else ""
        lines.append(_line("parameter", "param", *what, lies.param, step, in_use=used, gathered=gathered))
        lines.append(_line("gradient", "gradient", *what, lies.gradient, step))
        kinds = tuple(dict.fromkeys(moments[path]))
        memory = step.split.moments if spec.shape else "device"
        each = [
            _line("optimizer", "optimizer", path, spec.shape, kind, lies.optimizer, step,
                  copies=moments[path].count(kind), memory=memory)
            for kind in kinds
        ]  # fmt: skip
        lines.extend(each)
    return lines


def _inputs(step: TrainStep, batch: dict[str, Any]) -> list[Line]:
    return [
        _line("batch", "activation", k, tuple(x.shape), str(x.dtype), step.inputs[k], step)
        for k, x in batch.items()
    ]


def _activations(taps: tuple[Tap, ...], step: TrainStep) -> list[Line]:
    """Each named op's result once, however many layers or micro-batches repeat it."""
    once = {(t.op, t.names, t.shape, t.source): t for t in taps if t.names}
    layouts, sizes = step.split.layouts, {n: s for t in taps for n, s in zip(t.names, t.shape, strict=True)}
    made = [
        _line("activation", "activation", t.op, t.shape, t.dtype, layouts.activation(t.names), step,
              source=near(t.source))
        for t in once.values()
    ]  # fmt: skip
    attention = next((t for t in taps if t.op == "attention"), None)
    if attention is not None:
        made += [
            _line("inside", "activation", attention.op, shape, attention.dtype, layouts.activation(names), step,
                  source=near(attention.source))
            for names, shape in inside_attention(tuple(layouts.asked), sizes)
        ]  # fmt: skip
    return made


def _line(
    kind: str, role: str, path: str, shape: Any, dtype: str, lies: Layout, step: TrainStep, **more: Any
) -> Line:
    import jax.numpy as jnp

    from sharding.layout import local_shape

    layouts = step.split.layouts
    local = jnp.dtype(dtype).itemsize * math.prod(local_shape(shape, lies.dims, layouts.sizes))
    placed = tuple(Placed(r.name, r.axis, r.size, r.rule, near(r.source)) for r in lies.reasons)
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
    searches = lambda placing: callable(placing) and not isinstance(placing, ByPath)
    asked = [r.call for r in rules.chain if any(searches(getattr(r, x)) for x in roles)]
    searched = f", and {' and '.join(asked)} found no dim that divides" if asked else ""
    return f"no rule names {' or '.join(dict.fromkeys(lies.names))}{searched}"
