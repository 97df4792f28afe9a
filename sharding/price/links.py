"""Which links of the machine the groups of a mesh axis really use: torus dims, closed or open, shared or not, and islands.

Read off the grid of devices, for the groups of all devices at once, since all of them communicate at the same time.
Groups that are boxes of the torus (every axis that takes whole dims or parts of them) use all links of the dims that they
span; any other group, as the rings that `mesh_utils` lays through small slices make them, is taken as one ring through its
devices in mesh order, each step by the shortest way along the dims in turn.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from sharding.axes import AXES
from sharding.price.standins import StandIn
from sharding.price.target import Target


@dataclass(frozen=True)
class Span:
    """What a group has of one dim of the torus."""

    dim: int
    """The dim; the number of dims stands for the devices of one chip."""
    places: int
    """How many of its places the group takes."""
    closed: bool
    """Whether the group's places go round a ring, so that both directions carry."""
    shared: int
    """How many groups use the busiest of its links at once."""
    hops: int
    """Links between neighbouring places."""


@dataclass(frozen=True)
class Path:
    """What a collective over some mesh axes is carried by."""

    axes: tuple[str, ...]
    devices: int
    """Of a group."""
    inside: int
    """Of them, in one island."""
    islands: int
    """That a group lies in; 1: it does not leave the fast network."""
    spans: tuple[Span, ...] = ()
    """Of the devices of a group in one island; empty without a torus."""
    ring: int = 0
    """Of a group that is no box: how often the busiest link is passed when a ring through the group is gone round once
    each way, by all groups at once; 0 for boxes."""

    def describe(self) -> str:
        """One line: `8 devices: 2 islands of 4, dim 0 of the torus (4 places, closed)`."""
        parts = [f"{self.islands} islands of {self.inside}"] if self.islands > 1 else []
        for s in self.spans:
            kind = "closed" if s.closed else "open"
            shared = f", {s.shared} groups a link" if s.shared > 1 else ""
            parts.append(f"dim {s.dim} of the torus ({s.places} places, {kind}{shared})")
        if self.ring:
            parts.append(f"a ring whose busiest link is passed {self.ring} times each round")
        return f"{self.devices} devices" + (f": {', '.join(parts)}" if parts else "")


def path(grid: np.ndarray, axes: tuple[str, ...], target: Target) -> Path:
    """The path of collectives over `axes` of a mesh whose devices lie as `grid` (`sharding.price.standins.grid`)."""
    groups = _groups(grid, axes)
    parts = [_by_island(group) for group in groups]
    inside, islands = min(len(p) for ps in parts for p in ps), max(len(ps) for ps in parts)
    found = Path(axes, len(groups[0]), inside, islands)
    if target.machine.inside.kind != "torus" or inside == 1:
        return found
    boxes = [[_place(d, target) for d in p] for ps in parts for p in ps]
    if all(_is_box(box) for box in boxes):
        return Path(axes, len(groups[0]), inside, islands, _spans(boxes, target))
    return Path(axes, len(groups[0]), inside, islands, ring=_ring(boxes, target))


def _groups(grid: np.ndarray, axes: tuple[str, ...]) -> list[list[StandIn]]:
    """The groups of a collective over `axes`: lists of devices, innermost axis first to change."""
    inner = [AXES.index(a) for a in AXES if a in axes]
    outer = [i for i in range(len(AXES)) if i not in inner]
    size = math.prod(grid.shape[i] for i in inner)
    return [list(group) for group in grid.transpose(*outer, *inner).reshape(-1, size)]


def _by_island(group: list[StandIn]) -> list[list[StandIn]]:
    found: dict[int, list[StandIn]] = {}
    for device in group:
        found.setdefault(device.island, []).append(device)
    return list(found.values())


def _place(device: StandIn, target: Target) -> tuple[int, ...]:
    """The place in the torus: the slice, the chip's coordinates, the device of the chip."""
    return (device.slice_index, *device.coords[: len(target.shape)], device.core_on_chip)


def _is_box(box: list[tuple[int, ...]]) -> bool:
    return math.prod(len(set(values)) for values in zip(*box, strict=True)) == len(box)


def _spans(boxes: list[list[tuple[int, ...]]], target: Target) -> tuple[Span, ...]:
    """Per dim that the boxes span, the worst of them; a chip's devices are the last dim."""
    dims = len(target.shape)
    sizes, rings = (*target.shape, target.machine.cores), (*target.rings, False)
    found = []
    for dim in range(dims + 1):
        lines: dict[tuple[object, ...], Counter[tuple[int, ...]]] = {}
        for box in boxes:
            places = tuple(sorted({p[1 + dim] for p in box}))
            others = [sorted({p[i] for p in box}) for i in range(1 + dims) if i != 1 + dim]
            for line in itertools.product(
                *others
            ):  # what the box uses at once; its chips' devices share the chips' links
                lines.setdefault(line, Counter())[places] += 1
        worst = [_worst(line, sizes[dim], rings[dim]) for line in lines.values()]
        closed, shared = all(c for c, _, _ in worst), max(s for _, s, _ in worst)
        places = max(len(p) for line in lines.values() for p in line)
        if places > 1:
            found.append(Span(dim, places, closed, shared, max(h for _, _, h in worst)))
    return tuple(found)


def _worst(line: Counter[tuple[int, ...]], size: int, ring: bool) -> tuple[bool, int, int]:
    """Of the groups on one line of a dim: whether they close, how many share the busiest link, hops between neighbours."""
    gaps = {b - a for places in line for a, b in itertools.pairwise((*places, places[0] + size))}
    if ring and len(gaps) == 1:  # each goes round with even steps
        return True, sum(line.values()), gaps.pop()
    load = [0] * size
    for places, times in line.items():
        for link in range(places[0], places[-1]):
            load[link] += times
    hops = max((b - a for places in line for a, b in itertools.pairwise(places)), default=0)
    return False, max(load, default=1) or 1, hops


def _ring(boxes: list[list[tuple[int, ...]]], target: Target) -> int:
    """How often the busiest link is passed when every group passes a piece round its ring, and one the other way."""
    load: Counter[tuple[object, ...]] = Counter()
    for box in boxes:
        for way in (box, box[::-1]):
            for here, there in zip(way, (*way[1:], way[0]), strict=True):
                load.update(_route(here, there, target))
    return max(load.values(), default=1)  # a ring within one chip passes no link of the torus


def _route(here: tuple[int, ...], there: tuple[int, ...], target: Target) -> list[tuple[object, ...]]:
    """The directed links of the shortest way along the dims in turn."""
    links: list[tuple[object, ...]] = []
    at = list(here)
    for dim, (size, ring) in enumerate(zip(target.shape, target.rings, strict=True), 1):
        far = there[dim] - at[dim]
        step = 1 if far > 0 else -1
        if ring and abs(far) > size / 2:
            step = -step
        while at[dim] != there[dim]:
            links.append((*at[:-1], dim, step))  # the links are the chip's, not of one of its devices
            at[dim] = (at[dim] + step) % size
    return links
