"""The difference of two plans as a value: which arrays moved and by which rule, what bytes and seconds were gained or lost.

The plans may be of other rules, meshes, targets or configs. Only what differs is held; what stayed equal is one line of words.
Figures are compared with figures of the same word alone: predicted with predicted, compiled with compiled, modelled with
modelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from experiments.plans.figures import (
    Figure,
    Traffic,
    figures,
    memory_of,
    purposes_of,
    sent_of,
    time_of,
    traffic,
)

if TYPE_CHECKING:
    from experiments.explanation import Line, Placed
    from experiments.pictured import Ordered
    from experiments.plans.planned import Plan, Verdict


@dataclass(frozen=True)
class Side:
    """One of the two plans."""

    name: str
    config: str
    target: str
    devices: str
    """The target in words."""
    mesh: Mapping[str, int]
    rules: tuple[str, ...]
    """Calls of its rules, in the order they are asked."""
    partitioner: str
    parameters: int
    tokens: int
    """Of one step."""
    verdict: Verdict
    bottleneck: str
    """"" without a modelled time."""
    orders: tuple[Ordered, ...]
    over_budget: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class MovedArray:
    """An array that lies otherwise in the second plan, is of another size there, or stands in one of them alone."""

    kind: str
    path: str
    a: Line | None
    b: Line | None

    @property
    def gained(self) -> tuple[Placed, ...]:
        """Splits that only the second plan has, each with its rule."""
        return _splits(self.b, self.a)

    @property
    def lost(self) -> tuple[Placed, ...]:
        """Splits that only the first plan has."""
        return _splits(self.a, self.b)

    @property
    def bytes(self) -> tuple[int | None, int | None]:
        """On a device, in each plan."""
        return tuple(x.bytes_per_device if x else None for x in (self.a, self.b))  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class PlanDifference:
    """What the second plan has otherwise than the first."""

    a: Side
    b: Side
    changed: tuple[str, ...]
    """What of the plans themselves is another: "target", "mesh", "rules", "config", "partitioner"."""
    arrays: tuple[MovedArray, ...]
    """The most bytes gained or lost first."""
    memory: tuple[Figure, ...]
    traffic: tuple[Traffic, ...]
    """By axes and kind, the most bytes gained or lost first."""
    ops: tuple[Traffic, ...]
    """Predicted, by what they are for."""
    time: tuple[Figure, ...]
    verdict: bool
    """Whether the verdicts differ in whether it fits."""
    same: str
    """What stayed equal."""

    @property
    def empty(self) -> bool:
        """Nothing differs."""
        return not (
            self.changed
            or self.arrays
            or self.memory
            or self.traffic
            or self.ops
            or self.time
            or self.verdict
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, with the splits that each array gained and lost."""
        told: dict[str, Any] = asdict(self)
        told["empty"] = self.empty
        for moved, row in zip(self.arrays, told["arrays"], strict=True):
            row |= {"gained": [asdict(p) for p in moved.gained], "lost": [asdict(p) for p in moved.lost]}
        return told


def difference(a: Plan, b: Plan) -> PlanDifference:
    """What `b` has otherwise than `a`."""
    sides = (_side(a), _side(b))
    held = {
        "config": lambda s: (s.name, s.config, s.parameters, s.tokens),
        "target": lambda s: s.target,
        "mesh": lambda s: dict(s.mesh),
        "rules": lambda s: s.rules,
        "partitioner": lambda s: s.partitioner,
    }
    changed = tuple(what for what, of in held.items() if of(sides[0]) != of(sides[1]))
    arrays, count = _arrays(a, b)
    memory, sent = figures(memory_of(a), memory_of(b)), traffic(sent_of(a), sent_of(b))
    ops, time = traffic(purposes_of(a), purposes_of(b)), figures(time_of(a), time_of(b))
    equal = [what for what in held if what not in changed]
    for what, rows, of in (
        ("arrays", arrays, count),
        ("parts of memory", memory, len({**memory_of(a), **memory_of(b)})),
        ("kinds of collectives", sent, len({**sent_of(a), **sent_of(b)})),
        ("modelled times", time, len({**time_of(a), **time_of(b)})),
    ):
        if of > len(rows):
            equal.append(f"{'all ' if not rows else ''}{of - len(rows)}{f' of {of}' if rows else ''} {what}")
    return PlanDifference(
        *sides,
        changed,
        arrays,
        memory,
        sent,
        ops,
        time,
        a.verdict.fits != b.verdict.fits,
        ", ".join(equal) or "nothing",
    )


def _side(plan: Plan) -> Side:
    told = plan.explanation
    return Side(
        name=told.name,
        config=plan.config,
        target=plan.target,
        devices=plan.devices,
        mesh=told.mesh,
        rules=tuple(call for call, _ in told.chain),
        partitioner=told.partitioner,
        parameters=told.parameters,
        tokens=told.tokens,
        verdict=plan.verdict,
        bottleneck=plan.modelled.bottleneck if plan.modelled else "",
        orders=told.orders,
        over_budget=plan.over_budget,
        missing=plan.missing,
    )


def _splits(of: Line | None, without: Line | None) -> tuple[Placed, ...]:
    """Splits over more than one device that one line has and the other has not."""

    def has(line: Line) -> dict[tuple[str, str], int]:
        sizes = {(p.name, p.axis): p.size for p in line.placed}
        return {
            (n, a): sizes.get((n, a), 0) for n, axes in zip(line.names, line.dims, strict=True) for a in axes
        }

    mine, theirs = has(of) if of else {}, has(without) if without else {}
    new = {at for at, size in mine.items() if theirs.get(at) != size}
    return tuple(p for p in (of.placed if of else ()) if (p.name, p.axis) in new)


def _arrays(a: Plan, b: Plan) -> tuple[tuple[MovedArray, ...], int]:
    """The arrays that differ, and how many arrays there are in either plan."""
    ours, theirs = _keyed(a), _keyed(b)
    keys = dict.fromkeys((*ours, *theirs))
    what = lambda x: x and (x.shape, x.dtype, x.dims, x.bytes_per_device, x.copies, x.in_use, x.memory)
    found = [
        MovedArray(key[0], key[1], ours.get(key), theirs.get(key))
        for key in keys
        if what(ours.get(key)) != what(theirs.get(key))
    ]
    size = lambda m: abs((m.bytes[1] or 0) - (m.bytes[0] or 0))
    return tuple(sorted(found, key=lambda m: -size(m))), len(keys)


def _keyed(plan: Plan) -> dict[tuple[str, str, tuple[str, ...], int], Line]:
    """The plan's arrays by kind, path and names, and which of several that share these."""
    found: dict[tuple[str, str, tuple[str, ...], int], Line] = {}
    for line in plan.explanation.lines:
        at = 0
        while (key := (line.kind, line.path, line.names, at)) in found:
            at += 1
        found[key] = line
    return found
