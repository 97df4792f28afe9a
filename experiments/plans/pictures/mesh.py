"""The mesh of a plan on the machine that is planned for: islands, chips in their torus, and which chips each axis joins."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from experiments.plans.pictures.arrays import FEW
from experiments.plans.pictures.html import Html, el, join, raw
from experiments.plans.pictures.look import AXIS_COLOURS, device_colour
from sharding.axes import AXES
from sharding.price.links import path
from sharding.price.standins import StandIn, stand_ins
from sharding.price.target import Target, parse_target

if TYPE_CHECKING:
    from experiments.plans.planned import Plan

MOST = 4096
"""Devices drawn; of more islands only the first, and said to be."""
SHADES = 16
"""Shades of an axis's colour."""
GAP = 0.9
"""Between planes of a torus, in cells; twice that between islands."""


@dataclass(frozen=True)
class Board:
    """Where each place of the mesh is drawn, in cells, and how large all of it is."""

    sizes: dict[str, int]
    at: dict[int, tuple[float, float]]
    """Place of the mesh -> left, top of its chip; places that are not drawn are left out."""
    frames: tuple[tuple[float, float, float, float], ...]
    """Islands: left, top, width, height."""
    width: float
    height: float
    cell: float
    """Pixels."""

    def group(self, axis: str) -> list[int]:
        """Places that communicate with the first over one axis, in its order."""
        stride = math.prod(n for a, n in self.sizes.items() if AXES.index(a) > AXES.index(axis))
        return [i * stride for i in range(self.sizes[axis])]

    def coordinate(self, place: int, axis: str) -> int:
        """Of a place, along an axis."""
        stride = math.prod(n for a, n in self.sizes.items() if AXES.index(a) > AXES.index(axis))
        return place // stride % self.sizes[axis]


def mesh_pictures(plan: Plan) -> Html:
    """The devices, then for each axis the same chips in shades of its coordinate, with the links of the first group."""
    target = parse_target(plan.target)
    devices = stand_ins(target)
    sizes = dict(plan.explanation.mesh)
    board = board_of(plan)
    grid = np.empty(len(plan.lies), dtype=object)
    grid[:] = [devices[i] for i in plan.lies]
    grid = grid.reshape([sizes.get(a, 1) for a in AXES])
    figures = [_devices(plan, board)] if len(plan.lies) <= FEW or not sizes else []
    figures += [_axis(board, axis, path(grid, (axis,), target).describe()) for axis in sizes]
    left = len(plan.lies) - len(board.at)
    words = f"Drawn: {len(board.frames)} of {target.islands} islands." if left else ""
    return join([el("div", *figures, class_="panels"), el("p", words, class_="note") if words else ""])


def board_of(plan: Plan) -> Board:
    """Planes of an island beside each other, islands below each other; as near to a page's width as they come."""
    target = parse_target(plan.target)
    devices = stand_ins(target)
    columns, rows, planes = _extent(target)
    drawn = max(1, min(target.islands, MOST // target.island_devices))
    across = _across(planes, math.sqrt(planes * rows / columns * 1.1))
    wide = across * columns + (across - 1) * GAP
    high = math.ceil(planes / across) * rows + (math.ceil(planes / across) - 1) * GAP
    beside = _across(drawn, math.sqrt(drawn * high / wide * 1.8))
    corner = lambda i: ((i % beside) * (wide + 2 * GAP), (i // beside) * (high + 2 * GAP))
    islands = {island: at for at, island in enumerate(dict.fromkeys(d.island for d in devices)) if at < drawn}
    at: dict[int, tuple[float, float]] = {}
    for place, number in enumerate(plan.lies):
        device = devices[number]
        if device.island in islands:
            x, y, plane = _seat(device, target)
            left, top = corner(islands[device.island])
            px, py = (plane % across) * (columns + GAP), (plane // across) * (rows + GAP)
            at[place] = (left + px + x, top + py + y)
    frames = tuple((*corner(i), wide, high) for i in range(drawn))
    width = max(x + w for x, _, w, _ in frames)
    height = max(y + h for _, y, _, h in frames)
    cell = min(30.0, max(4.0, 330.0 / width)) if len(at) <= 64 else max(3.0, 345.0 / width)
    return Board(dict(plan.explanation.mesh), at, frames, width, height, cell)


def _across(count: int, wanted: float) -> int:
    """How many of `count` stand in a row: a divisor, near to what is wanted."""
    return min((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(math.log(n / wanted)))


def _extent(target: Target) -> tuple[int, int, int]:
    """Columns and rows of one plane of an island, and its planes."""
    if target.platform == "tpu":
        x, y, z = (*target.shape, 1, 1)[:3]
        return x * target.machine.cores, y, z
    count = target.island_devices
    columns = min(count, 8 if count <= 64 else 16)
    return columns, math.ceil(count / columns), 1


def _seat(device: StandIn, target: Target) -> tuple[int, int, int]:
    """Column, row and plane of a device in its island."""
    if target.platform == "tpu":
        x, y, z = device.coords
        return x * target.machine.cores + device.core_on_chip, y, z
    columns = _extent(target)[0]
    row, column = divmod(device.id % target.island_devices, columns)
    return column, row, 0


def _svg(board: Board, *inside: Html) -> Html:
    pad = 6.0
    wide, high = board.width * board.cell + 2 * pad, board.height * board.cell + 2 * pad
    frames = [
        el("rect", x=x * board.cell - 3, y=y * board.cell - 3, width=w * board.cell + 6, height=h * board.cell + 6, rx=4,
           fill="none", stroke="var(--line)")
        for x, y, w, h in board.frames
    ]  # fmt: skip
    return el(
        "svg",
        *frames,
        *inside,
        viewBox=f"{-pad:g} {-pad:g} {wide:.1f} {high:.1f}",
        width=wide,
        height=high,
        role="img",
    )


def _squares(board: Board, places: list[int]) -> Html:
    """The chips of these places, as the data of one path."""
    inset = 0.06 * board.cell if board.cell > 8 else 0.3
    side = board.cell - 2 * inset
    corner = lambda place: tuple(c * board.cell + inset for c in board.at[place])
    return raw("".join("M{:.1f} {:.1f}h{s:.1f}v{s:.1f}h-{s:.1f}z".format(*corner(p), s=side) for p in places))


def _number(board: Board, place: int, words: str, colour: str = "") -> Html:
    x, y = board.at[place]
    middle = {"x": (x + 0.5) * board.cell, "y": (y + 0.5) * board.cell + 3.5}
    return el("text", words, text_anchor="middle", style=f"fill:{colour}" if colour else None, **middle)


def _devices(plan: Plan, board: Board) -> Html:
    """Every device with the colour and the number that it has in the pictures of arrays."""
    count = len(plan.lies)
    chips = [el("path", d=_squares(board, [p]), fill=device_colour(p, count)) for p in board.at]
    numbers = [_number(board, p, str(p), "#1b2230") for p in board.at] if board.cell >= 14 else []
    caption = f"{plan.devices}. A number is a device's place in the mesh, its colour the one that it has in the arrays below."
    return el("figure", _svg(board, *chips, *numbers), el("figcaption", el("b", "Devices "), caption))


def _axis(board: Board, axis: str, words: str) -> Html:
    """The chips in shades of their coordinate along an axis; the first group is outlined and joined in its order."""
    n, colour = board.sizes[axis], AXIS_COLOURS[axis]
    levels: dict[int, list[int]] = {}
    for place in board.at:
        coordinate = board.coordinate(place, axis)
        levels.setdefault(coordinate * min(n, SHADES) // n, []).append(place)
    shade = lambda level: 0.22 + 0.7 * level / max(1, min(n, SHADES) - 1)
    chips = [el("path", d=_squares(board, places), fill=colour, fill_opacity=shade(level))
             for level, places in sorted(levels.items())]  # fmt: skip
    group = [p for p in board.group(axis) if p in board.at]
    outline = el(
        "path",
        d=_squares(board, group),
        fill="none",
        stroke="var(--ink)",
        stroke_width=1.6 if board.cell > 8 else 1,
    )
    numbers = (
        [_number(board, p, str(board.coordinate(p, axis))) for p in board.at]
        if board.cell >= 15
        else []
    )  # fmt: skip
    title = el("b", axes_title(axis, n))
    return el(
        "figure", _svg(board, *chips, _ring(board, group), outline, *numbers), el("figcaption", title, words)
    )


def axes_title(axis: str, n: int) -> Html:
    """The axis with its colour and size."""
    return join([el("i", style=f"color:{AXIS_COLOURS[axis]}", class_="dot"), f"{axis} {n} "])


def _ring(board: Board, group: list[int]) -> Html:
    """Lines between neighbours of a group in the order of its axis, bent where they pass over other chips."""
    half, parts = board.cell / 2, []
    for here, there in itertools.pairwise(group):
        (x0, y0), (x1, y1) = ((c * board.cell + half for c in board.at[p]) for p in (here, there))
        if x0 != x1 and y0 != y1 and math.hypot(x1 - x0, y1 - y0) > 6 * board.cell:
            continue  # on to another row of planes or islands: a line across the picture would say nothing
        far = max(abs(x1 - x0), abs(y1 - y0)) > 1.5 * board.cell
        bend = 0.28 * board.cell if far and (x0 == x1 or y0 == y1) else 0.0
        along_x = abs(x1 - x0) > abs(y1 - y0)
        cx, cy = (x0 + x1) / 2 + (0 if along_x else bend), (y0 + y1) / 2 + (bend if along_x else 0)
        parts.append(f"M{x0:.1f} {y0:.1f}Q{cx:.1f} {cy:.1f} {x1:.1f} {y1:.1f}")
    wide = 1.6 if board.cell > 8 else 0.9
    return el(
        "path", d=raw("".join(parts)), fill="none", stroke="var(--ink)", stroke_width=wide, opacity=0.55
    )
