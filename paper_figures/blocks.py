"""Which devices hold which block of an array: the geometry behind the picture of a split.

A device is known by its place in the mesh, counted with the last axis fastest. A dim that axes split falls into equal parts
where it lies; drawn in its natural order, a part may be several segments (zig-zag).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

_STATE = {"parameter": "", "gradient": "gradient", "optimizer": "optimizer state"}
"""Kinds of records that speak of a parameter, and what a picture calls what is not the parameter itself."""


@dataclass(frozen=True)
class Segment:
    """Positions [start, stop) of a dim in their natural order, which lie in one part of it."""

    start: int
    stop: int
    part: int


@dataclass(frozen=True)
class Array:
    """One array of a split as it is to be drawn."""

    title: str
    moment: str
    """When it lies so: `at rest`, `in use` ..."""
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dims: tuple[tuple[str, ...], ...]
    """The axes that split each dim, major to minor."""
    placed: tuple[tuple[str, str, str], ...]
    """(name, axis, rule) of each split."""
    bytes_per_device: int
    orders: tuple[Mapping[str, Any], ...] = ()
    """As the header of the records has them (`experiments.pictured.Ordered`)."""

    @property
    def layout(self) -> str:
        """As `explain` writes it: `embed/fsdp mlp/tensor`."""
        return " ".join("/".join((n, *axes)) for n, axes in zip(self.names, self.dims, strict=True))

    def parts(self, dim: int, mesh: Mapping[str, int]) -> int:
        """Into how many parts a dim is cut."""
        return math.prod(mesh[a] for a in self.dims[dim])

    def cut(self) -> tuple[str, ...]:
        """All axes that split it."""
        return tuple(a for axes in self.dims for a in axes)

    def drawn(self, told: Collection[str]) -> tuple[int, ...]:
        """One or two dims for a flat picture, in their order: those that are split, then those whose names are `told` of,
        then the longest.
        """
        rank = lambda i: (
            not self.dims[i],
            self.names[i] not in told,
            self.names[i] == "layers",
            -self.shape[i],
        )
        return tuple(sorted(sorted(range(len(self.names)), key=rank)[:2]))

    def segments(self, dim: int, mesh: Mapping[str, int]) -> list[Segment]:
        """The dim's positions from first to last, with the part in which each lies."""
        size, parts = self.shape[dim], self.parts(dim, mesh)
        runs = next(
            (
                o["runs"] for o in self.orders
                if self.names[dim] in o["names"] and o["size"] == size and o["axis"] in self.dims[dim]
            ),
            [(0, 0, size)],
        )  # fmt: skip
        step, made = size // parts, []
        for lies, natural, count in runs:
            at = lies
            while at < lies + count:  # a run of neighbours may reach over the end of a part
                end = min(lies + count, (at // step + 1) * step)
                made.append(Segment(natural + at - lies, natural + end - lies, at // step))
                at = end
        return _joined(sorted(made, key=lambda s: s.start))


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one part as one."""
    made: list[Segment] = []
    for part, group in itertools.groupby(segments, key=lambda s: s.part):
        each = list(group)
        made.append(Segment(each[0].start, each[-1].stop, part))
    return made


def coordinates(mesh: Mapping[str, int]) -> list[dict[str, int]]:
    """Of each device, in their order, its coordinate along every axis."""
    return [dict(zip(mesh, at, strict=True)) for at in itertools.product(*(range(n) for n in mesh.values()))]


def part_of(at: Mapping[str, int], axes: Sequence[str], mesh: Mapping[str, int]) -> int:
    """Which part of a dim that `axes` split, major to minor, a device at these coordinates has."""
    part = 0
    for axis in axes:
        part = part * mesh[axis] + at[axis]
    return part


def holders(array: Array, parts: Mapping[int, int], mesh: Mapping[str, int]) -> tuple[int, ...]:
    """Devices with these parts of the given dims, and the first part of every other dim that is split."""
    wanted = {i: parts.get(i, 0) for i in range(len(array.names))}
    return tuple(
        d for d, at in enumerate(coordinates(mesh))
        if all(part_of(at, array.dims[i], mesh) == part for i, part in wanted.items())
    )  # fmt: skip


def band_of(x: float, y: float, w: float, h: float, low: float, high: float) -> list[tuple[float, float]]:
    """Corners of the part of a rectangle where low <= (x' + y') <= high, measured from its corner x, y."""
    corners: list[tuple[float, float]] = []
    for s in (low, high):
        ends = [
            (min(s, w), s - min(s, w)),
            (s - min(s, h), min(s, h)),
        ]  # on the top or right edge; on the left or bottom
        ends = [(min(a, w), min(b, h)) for a, b in ends]
        corners += ends if s == low else ends[::-1]
    lower, upper = corners[:2], corners[2:]
    if low < w < high:
        lower.insert(0, (w, 0.0))
    if low < h < high:
        lower.append((0.0, h))
    return [(x + a, y + b) for a, b in lower + upper]


def split_names(arrays: Sequence[Array]) -> set[str]:
    """Names that an axis splits in one of these arrays at least: where another has them whole, that is to be seen."""
    return {name for a in arrays for name, _ in _pairs(a)}


def listed(devices: Sequence[int], everyone: int) -> str:
    """`0-3 8`: devices in words, shorter than one by one."""
    if len(devices) == everyone > 1:
        return f"all {everyone}"
    runs: list[list[int]] = []
    for d in devices:
        if runs and d == runs[-1][-1] + 1:
            runs[-1].append(d)
        else:
            runs.append([d])
    words = [str(r[0]) if len(r) == 1 else f"{r[0]}{' ' if len(r) == 2 else '–'}{r[-1]}" for r in runs]
    return " ".join(words)


def chosen(
    rows: Sequence[Mapping[str, Any]], orders: Sequence[Mapping[str, Any]], wanted: Sequence[str], most: int
) -> list[Array]:
    """The arrays to draw, `most` at most. `rows`: values of `layout` records; `wanted`: paths or names, none for a choice:
    the batch's entry of most dims; the parameter that is split most, in each way that it lies; activations, the commonest
    first and then such as show a split not seen yet.
    """
    of = lambda *kinds: [r for r in rows if r["kind"] in kinds and r["names"]]
    if wanted:
        return [
            a for w in wanted for a in _asked(of("batch", "activation", "inside"), of(*_STATE), orders, w)
        ][:most]
    made: list[Array] = []
    if entries := of("batch"):
        made.append(_array(max(entries, key=lambda r: len(r["shape"])), orders))
    if parameters := of("parameter"):
        splits = lambda r: len({p["axis"] for p in r["placed"] if p["size"] > 1})
        split = lambda r: max(splits(x) for x in of(*_STATE) if x["path"] == r["path"])
        most_split = max(parameters, key=lambda r: (split(r), math.prod(r["shape"])))
        made += _parameter(of(*_STATE), most_split["path"])
    seen: set[tuple[str, str]] = {p for a in made[:1] for p in _pairs(a)} if entries else set()
    left = of("activation", "inside")
    layouts = [r["layout"] for r in of("activation")]
    common = max(dict.fromkeys(layouts), key=layouts.count) if layouts else ""
    value = lambda r: (len(_new(r, seen)), r["bytes_per_device"])
    for count in range(max(0, most - len(made))):
        row = (
            next((r for r in left if r["layout"] == common), None)
            if count == 0
            else max(left, key=value, default=None)
        )
        if row is None or (count and not _new(row, seen)):
            break
        made.append(_array(row, orders))
        seen |= _pairs(made[-1])
        left = [r for r in left if r is not row]
    return made[:most]


def _asked(
    rows: Sequence[Mapping[str, Any]],
    state: Sequence[Mapping[str, Any]],
    orders: Sequence[Mapping[str, Any]],
    word: str,
) -> list[Array]:
    """What goes by this path or these names: a parameter in each way that it lies, else the first array of it."""
    if any(r["path"] == word for r in state):
        return _parameter(state, word)
    return [_array(r, orders) for r in rows if word in (r["path"], " ".join(r["names"]))][:1]


def _pairs(array: Array) -> set[tuple[str, str]]:
    """Each dim with each axis that splits it."""
    return {(n, a) for n, axes in zip(array.names, array.dims, strict=True) for a in axes}


def _new(row: Mapping[str, Any], seen: set[tuple[str, str]]) -> set[tuple[str, str]]:
    return {(n, a) for n, axes in zip(row["names"], row["dims"], strict=True) for a in axes} - seen


def _array(row: Mapping[str, Any], orders: Sequence[Mapping[str, Any]]) -> Array:
    """A row as an array to draw: an input and a parameter by its path, an activation by the op that made it."""
    made_in = row["source"].rpartition("/")[2].partition(":")[0]
    inside = "queries" if "queries" in row["names"] else "keys and values"
    title, moment = {
        "batch": (row["path"], "of the batch"),
        "activation": (f"result of {row['path']}", f"activation of {made_in}"),
        "inside": (inside, f"inside attention of {made_in}"),
    }.get(row["kind"], (row["path"], ""))
    return Array(
        title, moment, tuple(row["names"]), tuple(row["shape"]), tuple(map(tuple, row["dims"])),
        tuple((p["name"], p["axis"], p["rule"]) for p in row["placed"]), row["bytes_per_device"] // row["copies"],
        tuple(orders) if "batch" in row["names"] else (),
    )  # fmt: skip


def _parameter(rows: Sequence[Mapping[str, Any]], path: str) -> list[Array]:
    """A parameter once for each way that it lies in the course of a step."""
    mine = {r["kind"]: r for r in rows if r["path"] == path}
    rest = _array(mine["parameter"], ())
    ways = {"at rest": rest, "in use": _in_use(rest, mine["parameter"])}
    ways |= {words: _array(mine[k], ()) for k, words in _STATE.items() if k in mine and words}
    by_layout: dict[Any, list[str]] = {}
    for moment, array in ways.items():
        by_layout.setdefault(array.dims, []).append(moment)
    return [
        replace(
            ways[m[0]],
            moment="at rest, in use, its gradient and state" if len(m) == len(ways) else ", ".join(m),
        )
        for m in by_layout.values()
    ]


def _in_use(rest: Array, row: Mapping[str, Any]) -> Array:
    """The parameter laid out as `in_use` says, in the words of `explain`; as at rest where it says nothing."""
    if not row["in_use"]:
        return rest
    dims = tuple(tuple(word.split("/")[1:]) for word in row["in_use"].split())
    used = {a for axes in dims for a in axes}
    gathered = math.prod(p["size"] for p in row["placed"] if p["axis"] not in used)
    placed = tuple(p for p in rest.placed if p[1] in used)
    return replace(rest, dims=dims, placed=placed, bytes_per_device=rest.bytes_per_device * gathered)
