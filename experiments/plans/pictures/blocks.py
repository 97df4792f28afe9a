"""Which blocks an array falls into and which places of the mesh hold each: the geometry behind its picture.

A place of the mesh is a number, the innermost axis fastest. A dim that axes split falls into equal parts where it lies; drawn
in its natural order a part may be several segments (zig-zag orders).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.explanation import Line
    from experiments.pictured import Ordered

MANY = 32
"""Segments of a dim beyond which only the first are drawn, and said to be."""


@dataclass(frozen=True)
class Segment:
    """Positions [start, stop) of a dim in their natural order, which lie in one part of it."""

    start: int
    stop: int
    part: int


@dataclass(frozen=True)
class Shape:
    """What is drawn of an array: names, sizes and the axes that split each dim."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dims: tuple[tuple[str, ...], ...]
    orders: tuple[Ordered, ...] = ()

    @property
    def cut(self) -> tuple[str, ...]:
        """All axes that split it."""
        return tuple(a for axes in self.dims for a in axes)

    def drawn(self) -> tuple[int, ...]:
        """One or two dims for a flat picture, in their order: those that are split, then the longest; `layers` last."""
        rank = lambda i: (not self.dims[i], self.names[i] == "layers", -self.shape[i])
        return tuple(sorted(sorted(range(len(self.shape)), key=rank)[:2]))

    def parts(self, dim: int, mesh: Mapping[str, int]) -> int:
        """Into how many parts a dim is cut."""
        return math.prod(mesh[a] for a in self.dims[dim])

    def segments(self, dim: int, mesh: Mapping[str, int]) -> list[Segment]:
        """The dim's positions from first to last, with the part in which each lies."""
        size, parts = self.shape[dim], self.parts(dim, mesh)
        name, axes = self.names[dim], self.dims[dim]
        mine = (o for o in self.orders if name in o.names and o.size == size and o.axis in axes)
        runs = next((o.runs for o in mine), ((0, 0, size),))
        step, made = max(size // parts, 1), []
        for lies, natural, count in runs:
            at = lies
            while at < lies + count:  # a run of neighbours may reach over the end of a part
                end = min(lies + count, (at // step + 1) * step)
                made.append(Segment(natural + at - lies, natural + end - lies, at // step))
                at = end
        return _joined(sorted(made, key=lambda s: s.start))

    def holders(self, parts: Mapping[int, int], mesh: Mapping[str, int]) -> tuple[int, ...]:
        """Places of the mesh with these parts of the given dims, and the first part of every other that is split."""
        fixed: dict[str, int] = {}
        for i, axes in enumerate(self.dims):
            part = parts.get(i, 0)
            for axis in reversed(axes):
                part, fixed[axis] = divmod(part, mesh[axis])
        free = [range(n) if a not in fixed else (fixed[a],) for a, n in mesh.items()]
        places = []
        for at in itertools.product(*free):
            place = 0
            for n, coordinate in zip(mesh.values(), at, strict=True):
                place = place * n + coordinate
            places.append(place)
        return tuple(places)


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one part as one."""
    made: list[Segment] = []
    for part, group in itertools.groupby(segments, key=lambda s: s.part):
        each = list(group)
        made.append(Segment(each[0].start, each[-1].stop, part))
    return made


def shape_of(line: Line, orders: Sequence[Ordered]) -> Shape:
    """A line of an explanation as it lies."""
    return Shape(line.names, line.shape, line.dims, tuple(orders) if "batch" in line.names else ())


def in_use(line: Line) -> Shape | None:
    """A parameter as the layers use it; None where that is as it lies at rest."""
    if not line.in_use:
        return None
    dims = tuple(tuple(word.split("/")[1:]) for word in line.in_use.split())
    return Shape(line.names, line.shape, dims)
