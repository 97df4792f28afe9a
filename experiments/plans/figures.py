"""A plan as flat figures that can be held to another plan's: each with who says it, what it is of and its unit.

Figures are compared with figures of the same word alone: predicted with predicted, compiled with compiled, modelled with
modelled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.plans.words import WHOSE, compiled_parts, done, predicted_parts

if TYPE_CHECKING:
    from experiments.plans.planned import Plan, Total


@dataclass(frozen=True)
class Figure:
    """One figure of both plans; None in a plan that does not have it."""

    said: str
    """"predicted", "compiled (shardlab)", "compiled (XLA's partitioner)" or "modelled"."""
    what: str
    unit: str
    """"bytes", "seconds", "share" or "a second"."""
    a: float | None
    b: float | None


@dataclass(frozen=True)
class Traffic:
    """Collectives of both plans that are counted together: (how many, bytes that a device sends) in a step."""

    said: str
    axes: tuple[str, ...]
    kind: str
    a: tuple[int, int] | None
    b: tuple[int, int] | None
    op: str = ""
    """What they are for; "" where all of these axes and kind are counted together."""
    phase: str = ""


Figures = dict[tuple[str, str, str], float | None]
"""(said, what, unit) -> its value."""


def memory_of(plan: Plan) -> Figures:
    """Predicted and compiled bytes of a device by part."""
    found: Figures = {("predicted", p.name, "bytes"): p.bytes for p in predicted_parts(plan)}
    if plan.memory:
        found["predicted", "total", "bytes"] = plan.memory.total
        found["predicted", "in the host's memory", "bytes"] = plan.memory.host
    for made in done(plan):
        for part in compiled_parts(made):
            found[f"compiled ({WHOSE[made.partitioner]})", part.name, "bytes"] = part.bytes
        if made.memory:
            found[f"compiled ({WHOSE[made.partitioner]})", "total", "bytes"] = made.memory.total
    return found


def time_of(plan: Plan) -> Figures:
    """Modelled seconds, and what follows from them."""
    m = plan.modelled
    if m is None:
        return {}
    found: Figures = {
        ("modelled", "step", "seconds"): m.step,
        ("modelled", "tokens or examples", "a second"): plan.explanation.tokens / m.step if m.step else None,
        ("modelled", "MFU bound", "share"): m.mfu,
        ("modelled", "compute", "seconds"): m.compute,
        ("modelled", "collectives", "seconds"): m.collectives,
        ("modelled", "hidden", "seconds"): m.hidden,
        ("modelled", "bubble", "share"): m.bubble,
    }
    for c in m.moved:
        key = ("modelled", f"{c.kind} over {' x '.join(c.axes)}", "seconds")
        before = found.get(key, 0.0)
        found[key] = None if before is None or c.seconds is None else before + c.seconds
    return found


def figures(a: Figures, b: Figures) -> tuple[Figure, ...]:
    """Those that differ, in the order in which they stand; a part that one plan has none of counts there as nothing."""
    absent = lambda x, key: x.get(
        key, 0 if x and key[2] in ("bytes", "seconds") and _tells(x, key[0]) else None
    )
    rows = [Figure(*key, absent(a, key), absent(b, key)) for key in {**a, **b}]
    return tuple(r for r in rows if r.a != r.b)


def _tells(figures: Figures, said: str) -> bool:
    return any(key[0] == said for key in figures)


Sent = dict[tuple[str, tuple[str, ...], str, str, str], tuple[int, int]]
"""(said, axes, kind, op, phase) -> how many, bytes."""


def sent_of(plan: Plan) -> Sent:
    """Predicted and compiled collectives by axes and kind."""
    found = _totals("predicted", plan.totals)
    for made in done(plan):
        found |= _totals(f"compiled ({WHOSE[made.partitioner]})", made.totals)
    return found


def _totals(said: str, totals: Iterable[Total]) -> Sent:
    return {(said, t.axes, t.kind, "", ""): (t.times, t.sent) for t in totals}


def purposes_of(plan: Plan) -> Sent:
    """Predicted collectives by what they are for."""
    found: Sent = {}
    for m in plan.moved:
        key = (
            "predicted",
            m.axes,
            m.kind,
            f"{m.op}: {m.names}" if m.names else m.op or "no named op",
            m.phase,
        )
        times, sent = found.get(key, (0, 0))
        found[key] = (times + m.times, sent + m.sent)
    return found


def traffic(a: Sent, b: Sent) -> tuple[Traffic, ...]:
    """Those that differ; None where a plan has none of them, or knows nothing."""
    rows = [
        Traffic(said, axes, kind, a.get(key), b.get(key), op, phase)
        for key in {**a, **b}
        for said, axes, kind, op, phase in [key]
    ]
    size = lambda r: abs((r.b or (0, 0))[1] - (r.a or (0, 0))[1])
    return tuple(sorted((r for r in rows if r.a != r.b), key=lambda r: -size(r)))
