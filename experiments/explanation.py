"""What `explain` says: where every array lies, which rule put it there, what it costs. Traced, never run.

`explain(experiment, devices)` is a pure function of the config: it builds the model without arrays, asks the rules for
every layout and traces the step on a mesh of devices that are not there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.assemble import train_step
from experiments.config import Experiment
from sharding.layout import Layout
from sharding.partitioner import Auto, Manual

if TYPE_CHECKING:
    from sharding.step import TrainStep

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Line:
    """One array: a parameter at rest, its optimizer state, a batch entry or an activation, and where it lies."""

    kind: str
    path: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    names: tuple[str, ...]
    layout: str
    bytes_per_device: int
    placed: tuple[str, ...]
    """For each split dim: name/axis, the rule and its file:line."""
    notes: tuple[str, ...]
    """What stayed whole and why; how it differs in use."""
    source: str = ""


@dataclass(frozen=True)
class Explanation:
    """Everything that `explain` knows; bytes are per device."""

    name: str
    mesh: dict[str, int]
    devices: int
    rules: str
    partitioner: str
    parameters: int
    lines: tuple[Line, ...]
    collectives: tuple[dict[str, Any], ...]
    """Per axis and kind: how many in one step and the bytes each device sends. Empty under XLA's partitioner."""
    forward_flops: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def bytes_at_rest(self, kind: str) -> int:
        """Bytes per device of all lines of a kind."""
        return sum(line.bytes_per_device for line in self.lines if line.kind == kind)


def explain(experiment: Experiment, devices: int) -> Explanation:
    """Explain an experiment on `devices` devices. Raises InputError for whatever could not be laid out."""
    import jax

    from sharding.ledger import collectives, flops, per_axis
    from sharding.region import Tap

    step = train_step(experiment, devices)
    layouts, sizes = step.split.layouts, step.split.layouts.sizes
    state, batch = step.abstract_state(), step.abstract_batch(experiment.batch)
    taps: list[Tap] = []
    forward = _forward(step, state["params"], batch, taps)
    lines = [*_parameters(step, state), *_inputs(step, batch), *_activations(taps, layouts, sizes)]
    found: list[dict[str, Any]] = []
    if isinstance(experiment.partitioner, Manual):
        jaxpr = jax.make_jaxpr(step.update)(state, batch)
        for axes, kinds in per_axis(collectives(jaxpr, sizes)).items():
            found += [
                {"axes": axes, "kind": kind, "per_step": count, "bytes_sent_per_device": sent}
                for kind, (count, sent) in kinds.items()
            ]
    layouts.check_used()
    return Explanation(
        name=experiment.name,
        mesh={a: n for a, n in sizes.items() if n > 1},
        devices=devices,
        rules=repr(experiment.rules),
        partitioner=repr(experiment.partitioner),
        parameters=sum(s.size for s in step.tree.values()),
        lines=tuple(lines),
        collectives=tuple(found),
        forward_flops=flops(forward),
        tokens=_tokens(batch),
    )


def _forward(step: TrainStep, params: Any, batch: Any, taps: list[Any] | None) -> Any:
    """The jaxpr of the forward pass on global shapes, without a mesh: what the arrays are."""
    import jax

    from sharding.region import enter

    region = step.region(taps)
    region.mesh, region.partitioner = None, Auto()
    with enter(region):
        return jax.make_jaxpr(lambda p, b: step.evaluate_sums(p, b))(params, batch)


def forward_flops(step: TrainStep, rows: int) -> int:
    """FLOPs of all matrix products in one forward pass over a global batch of `rows` rows."""
    from sharding.ledger import flops

    params = {p: s.abstract() for p, s in step.tree.items()}
    return flops(_forward(step, params, step.abstract_batch(rows), None))


def _tokens(batch: dict[str, Any]) -> int:
    """Positions that carry a label in one global batch: tokens of a language model, rows of a classifier."""
    size = 1
    for n in batch["labels"].shape:
        size *= n
    return size


def _parameters(step: Any, state: Any) -> list[Line]:
    moments = _moments(state, step.tree)
    lines = []
    for path, spec in step.tree.items():
        lies = step.layouts[path]
        used = () if lies.compute.dims == lies.param.dims else (f"in use: {lies.compute.text()}",)
        lines.append(
            _line("parameter", path, "param", spec.shape, str(spec.dtype), lies.param, step, extra=used)
        )
        if moments.get(path):
            line = _line("optimizer", path, "optimizer", spec.shape, str(spec.dtype), lies.optimizer, step)
            lines.append(_times(line, moments[path]))
    return lines


def _moments(state: Any, tree: dict[str, Any]) -> dict[str, int]:
    """How many arrays of optimizer state each parameter has."""
    import jax

    count = dict.fromkeys(tree, 0)
    for keys, _ in jax.tree_util.tree_flatten_with_path(state["optimizer"])[0]:
        last = str(getattr(keys[-1], "key", ""))
        if last in count:
            count[last] += 1
    return count


def _times(line: Line, n: int) -> Line:
    return Line(
        **{**line.__dict__, "bytes_per_device": line.bytes_per_device * n, "dtype": f"{n} x {line.dtype}"}
    )


def _inputs(step: Any, batch: dict[str, Any]) -> list[Line]:
    return [
        _line("batch", k, "activation", tuple(x.shape), str(x.dtype), step.inputs[k], step)
        for k, x in batch.items()
    ]


def _activations(taps: list[Any], layouts: Any, sizes: dict[str, int]) -> list[Line]:
    seen: dict[tuple[Any, ...], Line] = {}
    for tap in taps:
        key = (tap.op, tap.names, tap.shape, tap.source)
        if tap.names and key not in seen:
            lies = layouts.activation(tap.names)
            local = _local_bytes(tap.shape, tap.dtype, lies, sizes)
            seen[key] = Line(
                "activation", tap.op, "activation", tap.shape, tap.dtype, tap.names, lies.text(), local,
                _placed(lies), _notes(lies), _short(tap.source),
            )  # fmt: skip
    return list(seen.values())


def _line(
    kind: str, path: str, role: str, shape: Any, dtype: str, lies: Layout, step: Any, extra: Any = ()
) -> Line:
    local = _local_bytes(shape, dtype, lies, step.split.layouts.sizes)
    return Line(
        kind, path, role, shape, dtype, lies.names, lies.text(), local, _placed(lies), (*extra, *_notes(lies))
    )


def _local_bytes(shape: tuple[int, ...], dtype: str, lies: Layout, sizes: dict[str, int]) -> int:
    import jax.numpy as jnp

    from sharding.layout import local_shape

    size = jnp.dtype(dtype).itemsize
    for n in local_shape(shape, lies.dims, sizes):
        size *= n
    return size


def _placed(lies: Layout) -> tuple[str, ...]:
    return tuple(
        f"{r.name}/{r.axis} by {r.rule} ({_short(r.source)})" + ("" if r.size > 1 else ", one device")
        for r in lies.reasons
    )


def _notes(lies: Layout) -> tuple[str, ...]:
    if lies.axes:
        return lies.declined
    if lies.reasons:
        return (*lies.declined, "whole on every device: the axes that split it have one device")
    return (
        *lies.declined,
        f"whole on every device: no rule splits {' or '.join(lies.names) or 'a scalar'} in this role",
    )


def _short(source: str) -> str:
    file, _, line = source.rpartition(":")
    path = Path(file)
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{line}" if file else ""
