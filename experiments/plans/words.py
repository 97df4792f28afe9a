"""The figures of a plan side by side and in words: what its tables, its page and the diff of two plans all show.

Predicted, compiled and modelled figures keep fields of their own all the way: a row holds one of each, never one for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.plans.planned import Total
from sharding.finding import human

if TYPE_CHECKING:
    from experiments.plans.planned import Made, Moved, Plan
    from sharding.module.differences import Difference

WHOSE = {"manual": "shardlab", "auto": "XLA's partitioner"}
"""Partitioner of a compiled step -> whose it is, in the head of a column."""
NOTHING = "—"
"""In a cell that has no figure."""


@dataclass(frozen=True)
class SideBySide:
    """Collectives of one kind over the same axes: predicted, and as each partitioner's compiled step has them."""

    axes: tuple[str, ...]
    kind: str
    predicted: Total | None
    compiled: Mapping[str, Total | None]
    """By partitioner; None where its step has none of these."""

    @property
    def most(self) -> int:
        """Bytes that a device sends, of whichever has the most."""
        return max(t.sent for t in (self.predicted, *self.compiled.values()) if t)

    def ratio(self, partitioner: str) -> float | None:
        """Compiled bytes over predicted; None where there is nothing to divide by."""
        compiled = self.compiled[partitioner]
        if self.predicted is None or not self.predicted.sent:
            return None
        return (compiled.sent if compiled else 0) / self.predicted.sent


def side_by_side(plan: Plan) -> tuple[SideBySide, ...]:
    """Every kind of collective over every set of axes, the most bytes first; those of the compiled steps that were refused
    have no column.
    """
    made = {m.partitioner: {(t.axes, t.kind): t for t in m.totals} for m in done(plan)}
    ours = {(t.axes, t.kind): t for t in plan.totals}
    keys = dict.fromkeys(key for table in (ours, *made.values()) for key in table)
    rows = [SideBySide(*key, ours.get(key), {p: table.get(key) for p, table in made.items()}) for key in keys]
    return tuple(sorted(rows, key=lambda r: (-r.most, r.axes, r.kind)))


def total_row(plan: Plan, rows: Sequence[SideBySide]) -> SideBySide:
    """All rows as one, over no axes in particular."""
    add = lambda each: Total((), "all", sum(t.times for t in each), sum(t.sent for t in each))
    compiled = {p: add([t for r in rows if (t := r.compiled[p])]) for p in (rows[0].compiled if rows else ())}
    return SideBySide(
        (), "all", add([r.predicted for r in rows if r.predicted]) if plan.moved else None, compiled
    )


def named(plan: Plan, axes: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """Names of the differences that a kind of collective over these axes takes part in, in shardlab's compiled step."""
    found = (d for m in done(plan) if m.partitioner == "manual" for d in m.differences)
    mine = (d.name or "NO NAME" for d in found if d.axes == axes and kind in (d.kind, d.compiled_kind))
    return tuple(dict.fromkeys(mine))


def done(plan: Plan) -> tuple[Made, ...]:
    """What was compiled and not refused."""
    return tuple(m for m in plan.made if m.refused is None)


@dataclass(frozen=True)
class Part:
    """One part of a device's memory."""

    name: str
    bytes: int
    key: str
    """The colour that it has wherever memory is drawn."""


def predicted_parts(plan: Plan) -> tuple[Part, ...]:
    """Of the predicted memory, what lies longest first."""
    m = plan.memory
    if m is None:
        return ()
    return (
        Part("parameters", m.parameters, "parameters"),
        Part("optimizer state", m.optimizer, "optimizer"),
        Part("batch", m.batch, "batch"),
        Part("kept for the backward pass", m.kept, "kept"),
        Part("gradients and work in hand", m.made, "made"),
    )


def compiled_parts(made: Made) -> tuple[Part, ...]:
    """Of the memory as a compiler has laid it out, which knows no parameters from optimizer state."""
    m = made.memory
    if m is None:
        return ()
    return (
        Part("arguments: state and batch", m.arguments, "arguments"),
        Part("outputs that lie beside them", m.outputs - m.aliased, "outputs"),
        Part("temporaries", m.temporaries, "temporaries"),
        Part("program", m.code, "code"),
    )


MEMORY_ROWS = (
    ("state and batch", ("parameters", "optimizer", "batch"), ("arguments",)),
    ("beside them while it runs", ("kept", "made"), ("outputs", "temporaries")),
    ("program", (), ("code",)),
)
"""What can be compared: a row, the predicted parts in it, the compiled ones."""


def summed_parts(parts: Sequence[Part], keys: Sequence[str]) -> int | None:
    """Bytes of the parts of these keys; None where there are no parts, or none is asked for."""
    return sum(p.bytes for p in parts if p.key in keys) if parts and keys else None


def bytes_text(n: int | None) -> str:
    """`3.1 MiB`, or a dash."""
    return NOTHING if n is None else human(n)


def duration(seconds: float | None) -> str:
    """`1.65 ms`: seconds with a prefix, or a dash."""
    if seconds is None:
        return NOTHING
    if seconds >= 100:
        return f"{seconds:.0f} s"
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")):
        if seconds >= size * 0.9995:
            return (
                f"{seconds / size:.3g} {unit}" if seconds / size < 99.95 else f"{seconds / size:.0f} {unit}"
            )
    return "0 s" if seconds == 0 else "< 1 ns"


def percent(share: float | None) -> str:
    """`43 %`, or a dash; of what is less than one, a digit more."""
    if share is None:
        return NOTHING
    if 0 < share < 1e-4:
        return "< 0.01 %"
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"


def ratio_text(ratio: float | None) -> str:
    """`1.000`: compiled bytes over predicted, or a dash."""
    if ratio is None:
        return NOTHING
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.0f}" if ratio < 1000 else "> 1000"


def axes_text(axes: Sequence[str]) -> str:
    """`data x fsdp`; collectives between all devices of one name them all."""
    return " x ".join(axes) or NOTHING


def mesh_text(plan: Plan) -> str:
    """`data 2 x fsdp 2 x tensor 2`."""
    return " x ".join(f"{a} {n}" for a, n in plan.explanation.mesh.items()) or "one device"


def amount(times: int, sent: int) -> str:
    """`47 times, 5.63 MiB`: so many collectives and what a device sends for all of them."""
    return f"{times:,} {'time' if times == 1 else 'times'}, {human(sent)}"


def difference_text(d: Difference) -> str:
    """`25 all-gathers over fsdp narrowed: 5.06 MiB predicted, 2.53 MiB compiled (converted to fewer bytes ...)`."""
    from sharding.module.differences import NAMES, UNPREDICTED

    over, what = axes_text(d.axes), plural(d.kind, max(d.predicted[0], d.compiled[0]))
    if d.name == UNPREDICTED:
        return f"{d.compiled[0]:,} {what} over {over} that nobody predicted: {human(d.compiled[1])}"
    counts = f"{d.predicted[0]:,}" if d.predicted[0] else f"{d.compiled[0]:,}"
    if not d.name:
        side = "predicted and not compiled" if d.predicted[0] else "compiled and not predicted"
        return f"{counts} {what} over {over} {side}, for which there is no name: {human(d.predicted[1] or d.compiled[1])}"
    made = f"{d.compiled[0]:,} compiled with " if d.compiled[0] != d.predicted[0] else "compiled "
    return (
        f"{counts} {what} over {over}, {d.name} ({NAMES.get(d.name, d.name)}): {human(d.predicted[1])} predicted, "
        f"{made}{human(d.compiled[1])}"
    )


def plural(kind: str, count: int) -> str:
    """A kind of collective, of so many."""
    return kind if count == 1 else f"{kind}s"


def what_for(m: Moved) -> str:
    """`einsum: batch length mlp, mlp embed -> batch length embed`: the op and what it was given."""
    return f"{m.op}: {m.names}" if m.names else m.op or "no named op"


def per_layer(n: int, layers: int) -> str:
    """Bytes of one layer, where it stands in layers."""
    return human(n // layers) if layers else NOTHING


def limits(plan: Plan) -> tuple[str, ...]:
    """What the plan cannot say, each once: of the plan itself and of its time model."""
    told = (*plan.missing, *(plan.modelled.missing if plan.modelled else ()))
    return tuple(dict.fromkeys(told))
