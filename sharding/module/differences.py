"""Where the compiled module departs from the trace, each departure with its name: predicted against compiled, byte for byte.

A compiler may do otherwise than the trace asked, and does: a reduction in a loop once after it, an array converted before it is
gathered instead of after, a gather of a few bytes as a reduction. What it did is found from the two lists alone, by accounting
for every collective in both. One that nothing here accounts for has no name: under the manual partitioner an error of the
prediction or of a reader, under XLA's, which decides after tracing, an unpredicted collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sharding.ledger import Collective

Amount = tuple[int, int]
"""How many in a step, and the bytes that a device sends for them."""

NAMES = {
    "narrowed": "converted to fewer bytes before it moves, not after",
    "widened": "converted to more bytes before it moves: its sum is taken in a wider type",
    "all-gather as all-reduce": "each device adds its part to zeros: fewer steps for few bytes",
    "reduce-scatter as all-reduce": "reduced whole, then cut",
    "padded": "a reduce-scatter whose parts are rounded up to tiles, and the rows too many shifted to where they belong",
    "all-reduce as reduce-scatter": "cut by the reduction, since each device uses only its part",
    "hoisted": "once for all trips of a loop, on the stack of their arrays",
    "over axes at once": "two reductions of one array, over different axes, as one over all",
    "axis by axis": "one reduction over several axes as one after the other",
    "cut first": "reduced after the cut of a reduce-scatter over other axes, which stood behind it",
    "repeated": "asked for twice of the same value, done once",
}
"""Name of a departure -> what the compiler did."""
UNPREDICTED = "unpredicted collective"


@dataclass(frozen=True)
class Difference:
    """One departure: collectives that were predicted, and what stands in the compiled module in their place."""

    axes: tuple[str, ...]
    kind: str
    """As predicted, or of what nobody predicted."""
    name: str
    """What the compiler did, of `NAMES`; `UNPREDICTED` under XLA's partitioner; "" where it is not known."""
    predicted: Amount
    compiled: Amount
    compiled_kind: str
    """"" where nothing stands in their place."""
    source: str = ""
    """file:line that asked for the first of them, where it is known."""


def differences(
    predicted: Iterable[Collective], compiled: Iterable[Collective], repeated: Iterable[Collective] = ()
) -> list[Difference]:
    """Every departure of `compiled` (`sharding.module.compiled`) from `predicted` (`sharding.ledger`); none for equal lists.

    repeated: those of the predicted that need not be done (`sharding.module.repeated`). The counts and bytes of all
    differences, taken from the predicted's and added, give the compiled's.
    """
    ours, theirs = _items(predicted), _items(compiled)
    found = _Found()
    for again in _items(repeated):
        for p in ours:
            if _alike(p, again) and (p.dtype, p.source) == (again.dtype, again.source):
                short = sum(x.left for x in ours if _alike(x, p)) - sum(
                    x.left for x in theirs if _alike(x, p)
                )
                count = max(0, min(p.left, again.left, short))
                again.left -= count
                found.note("repeated", [(p, count)], [])
    for match in (
        _equal,
        _converted,
        _as_another,
        _padded,
        _cut_first,
        _over_axes_at_once,
        _axis_by_axis,
        _hoisted,
    ):
        for near in (_same_place, _same_line, _anywhere):
            for name, p, c in match(ours, theirs, near):
                found.note(name, p, c)
    for p in ours:
        found.note("", [(p, p.left)], [])
    for c in theirs:
        found.note("", [], [(c, c.left)])
    return found.made()


def unpredicted(compiled: Iterable[Collective]) -> list[Difference]:
    """Every collective of a module of XLA's partitioner, whose trace holds none, by axes, kind and source line."""
    found = _Found(by_source=True)
    # where there is no line it is an argument of the step, told by its path
    for c in _items(replace(c, source=c.source or c.op) for c in compiled):
        found.note(UNPREDICTED, [], [(c, c.left)])
    return found.made()


@dataclass(eq=False)
class _Item:
    """Equal collectives of one place, as many as are not accounted for yet."""

    axes: tuple[str, ...]
    kind: str
    devices: int
    dtype: str
    elements: int
    bytes: int
    """That a device sends for one."""
    phase: str
    source: str
    left: int

    @property
    def whole(self) -> int:
        """Elements of the array that its devices together have or make: what an all-reduce in its place has."""
        return self.elements * self.devices if self.kind == "all-gather" else self.elements


def _items(found: Iterable[Collective]) -> list[_Item]:
    held: dict[Any, _Item] = {}
    for c in found:
        elements, each = math.prod(c.shape), c.bytes // max(c.times, 1)
        at = (c.axes, c.kind, c.devices, c.dtype, elements, each, c.scope.phase, c.source)
        held.setdefault(at, _Item(*at, 0)).left += c.times
    return list(held.values())


Side = Sequence[tuple[_Item, int]]
"""Collectives and how many of each."""
Near = Callable[[_Item, _Item], bool]
Match = Iterator[tuple[str, Side, Side]]
"""Name, and what is accounted for by it on either side."""


def _same_place(p: _Item, c: _Item) -> bool:
    return p.source == c.source and p.phase == c.phase


def _same_line(p: _Item, c: _Item) -> bool:
    return p.source == c.source


def _anywhere(p: _Item, c: _Item) -> bool:
    """A compiler that makes one of several keeps the place of one of them, or of none."""
    return True


def _pairs(ours: list[_Item], theirs: list[_Item], near: Near) -> Iterator[tuple[_Item, _Item]]:
    for p in ours:
        for c in theirs:
            if p.left and c.left and near(p, c):
                yield p, c


def _alike(p: _Item, c: _Item) -> bool:
    return (p.axes, p.kind, p.elements) == (c.axes, c.kind, c.elements)


def _equal(ours: list[_Item], theirs: list[_Item], near: Near) -> Match:
    for p, c in _pairs(ours, theirs, near):
        if _alike(p, c) and p.dtype == c.dtype:
            count = min(p.left, c.left)
            yield "equal", [(p, count)], [(c, count)]


def _converted(ours: list[_Item], theirs: list[_Item], near: Near) -> Match:
    for p, c in _pairs(ours, theirs, near):
        if _alike(p, c) and p.bytes != c.bytes:
            count = min(p.left, c.left)
            yield "narrowed" if c.bytes < p.bytes else "widened", [(p, count)], [(c, count)]


def _as_another(ours: list[_Item], theirs: list[_Item], near: Near) -> Match:
    """An all-gather or a reduce-scatter as an all-reduce of the whole array, or an all-reduce as a reduce-scatter."""
    swaps = {
        ("all-gather", "all-reduce"),
        ("reduce-scatter", "all-reduce"),
        ("all-reduce", "reduce-scatter"),
    }
    for p, c in _pairs(ours, theirs, near):
        if (p.kind, c.kind) in swaps and p.axes == c.axes and p.whole == c.whole:
            count = min(p.left, c.left)
            yield f"{p.kind} as {c.kind}", [(p, count)], [(c, count)]


PADDING = 1.25
"""How much larger an array may be for its tiles' sake: parts of 8 rows and more of 32."""


def _padded(ours: list[_Item], theirs: list[_Item], near: Near) -> Match:
    """A reduce-scatter of a slightly larger array, with permutes of at most the rows that it has more."""
    for p, c in _pairs(ours, theirs, near):
        if (p.kind, p.axes) != ("reduce-scatter", c.axes) or c.kind != p.kind:
            continue
        more = c.elements - p.elements
        if not 0 < more <= (PADDING - 1) * p.elements:
            continue
        count = min(p.left, c.left)
        room = 2 * p.devices * count
        yield "padded", [(p, count)], [(c, count)]
        for t in theirs:
            if t.kind == "permute" and t.axes == p.axes and t.elements <= more:
                moved = min(t.left, room)
                room -= moved
                yield "padded", [], [(t, moved)]


def _cut_first(ours: list[_Item], theirs: list[_Item], near: Near) -> Match:
    """all-reduce over some axes, then reduce-scatter over others: the other way round each reduces only its part."""
    cuts = {(s.elements, s.devices, s.axes) for s in ours if s.kind == "reduce-scatter"}
    for p, c in _pairs(ours, theirs, near):
        if (p.kind, p.axes) != ("all-reduce", c.axes) or c.kind != p.kind or p.elements <= c.elements:
            continue
        parts = {n for elements, n, axes in cuts if elements == p.elements and not set(axes) & set(p.axes)}
        if any(p.elements == n * c.elements for n in parts):
            count = min(p.left, c.left)
            yield "cut first", [(p, count)], [(c, count)]


def _over_axes_at_once(ours: list[_Item], theirs: list[_Item], near: Near) -> Match:
    """Reductions of one array over A, then over B, as one over both."""
    for c in theirs:
        wanted = [p for p in ours if p.kind == c.kind == "all-reduce" and p.elements == c.elements and p.left]
        for p in wanted:
            for q in wanted:
                if (
                    c.left
                    and p.left
                    and q.left
                    and not set(p.axes) & set(q.axes)
                    and set(c.axes) == {*p.axes, *q.axes}
                ):
                    count = min(p.left, q.left, c.left)
                    yield "over axes at once", [(p, count), (q, count)], [(c, count)]


def _axis_by_axis(ours: list[_Item], theirs: list[_Item], near: Near) -> Match:
    """A reduction over A and B as one over A and one over B."""
    for name, p, c in _over_axes_at_once(theirs, ours, near):
        del name
        yield "axis by axis", c, p


def _hoisted(ours: list[_Item], theirs: list[_Item], near: Near) -> Match:
    """As many of one array as a loop has trips, as one of their stack."""
    for p, c in _pairs(ours, theirs, near):
        trips = c.elements // max(p.elements, 1)
        same = (p.axes, p.kind) == (c.axes, c.kind) and p.elements * trips == c.elements
        if same and 1 < trips <= p.left:
            count = min(p.left // trips, c.left)
            yield "hoisted", [(p, trips * count)], [(c, count)]


@dataclass
class _Found:
    """Departures so far, summed by what is told of them."""

    by_source: bool = False
    held: dict[tuple[tuple[str, ...], str, str, str, str], list[int]] = field(default_factory=dict)
    sources: dict[tuple[tuple[str, ...], str, str, str, str], str] = field(default_factory=dict)

    def note(self, name: str, p: Side, c: Side) -> None:
        """Account for so many of each."""
        for item, count in (*p, *c):
            item.left -= count
        if name == "equal" or not any(count for _, count in (*p, *c)):
            return
        first = (*p, *c)[0][0]
        kind = c[0][0].kind if c else ""
        mine: list[tuple[tuple[str, ...], Side, Side]] = [(first.axes, p, c)]
        if len(p) != len(c):  # over other axes on either side: each side under its own
            mine = [
                *((i.axes, [(i, n)], ()) for i, n in p),
                *((i.axes, (), [(i, n)]) for i, n in c),
            ]
        for axes, a, b in mine:
            at = (axes, first.kind, name, kind, first.source if self.by_source else "")
            self.sources.setdefault(at, first.source)
            line = self.held.setdefault(at, [0, 0, 0, 0])
            for k, side in ((0, a), (2, b)):
                line[k] += sum(n for _, n in side)
                line[k + 1] += sum(i.bytes * n for i, n in side)

    def made(self) -> list[Difference]:
        """The departures."""
        return [
            Difference(axes, kind, name, (line[0], line[1]), (line[2], line[3]), made, self.sources[at])
            for at, line in self.held.items()
            for axes, kind, name, made, _ in (at,)
        ]


__all__ = ["NAMES", "UNPREDICTED", "Difference", "differences", "unpredicted"]
