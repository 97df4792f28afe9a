"""A declared split as a picture: a few arrays, cut into the blocks that devices hold. One picture for each run of `explain`.

Claim: What a split cuts, what stays whole and who holds what can be seen at a glance.

Records: kind "layout", modelled (rules and shapes say so, nothing ran): one for each array of a config, with its names, its
    layout, its bytes per device and the rule behind each split; the mesh and the order of positions from the header.

Reproduce:
    shardlab explain configs/quickstart.py --record split.jsonl
    shardlab figures split --records split.jsonl
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from experiments.records import MissingRecords, Record
from paper_figures import style
from paper_figures.blocks import Array, Segment, band_of, chosen, coordinates, holders, listed, split_names

RECORDS = ("split/*.jsonl",)
COLUMNS, MOST = 3, 5
"""Cells a row; arrays drawn, beside the mesh."""
SHADES = (("#A9CFEE", "#4F97CE"), ("#FBCB93", "#EE8A2E"), ("#A5DDB9", "#45AE78"), ("#E3C0E8", "#B06FC0"))
"""Hues of devices, light to dark; dark text reads on all of them."""
CELL, RECT = style.PAGE / COLUMNS, (1.78, 1.08)
"""Width of a cell; width and height of the rectangle in it, inches."""
MANY, TEXT = 16, 7.0
"""Segments of a dim above which the rest is left out and counted; size of plain text, points."""


@dataclass(frozen=True)
class Pen:
    """What is drawn on: axes in inches from the top left, and the mesh whose devices have colours."""

    axes: Axes
    mesh: Mapping[str, int]

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())

    def text(self, x: float, y: float, words: str, room: float = style.PAGE, **look: Any) -> None:
        """Words with their baseline's left end at x, y, smaller where they are long for `room` inches; dollar signs are
        themselves.
        """
        look = {"fontsize": TEXT, "va": "baseline", "parse_math": False, **look}
        wide = (
            0.0086 if look.get("weight") == "bold" else 0.0068
        )  # of a letter at 1 point, inches, on the safe side
        look["fontsize"] = min(look["fontsize"], room / (wide * max(map(len, words.split("\n")))))
        self.axes.text(x, y, words, **look)

    def colour(self, device: int) -> str:
        """A device's own colour: four hues, and as many shades as it takes."""
        light, dark = (to_rgb(c) for c in SHADES[device % 4])
        share = (device // 4) / max(1, math.ceil(self.devices / 4) - 1)
        red, green, blue = (a + (b - a) * share for a, b in zip(light, dark, strict=True))
        return to_hex((red, green, blue))

    def block(self, x: float, y: float, w: float, h: float, held_by: Sequence[int]) -> None:
        """A rectangle in its device's colour; in stripes of their colours where several devices hold a copy."""
        self.axes.add_patch(Rectangle((x, y), w, h, facecolor=self.colour(held_by[0]), edgecolor="none"))
        if len(held_by) > 1:
            band, at = 0.085, 0
            while at * band < w + h:
                corners = band_of(x, y, w, h, at * band, (at + 1) * band)
                colour = self.colour(held_by[at % len(held_by)])
                self.axes.add_patch(Polygon(corners, facecolor=colour, edgecolor=colour, linewidth=0.2))
                at += 1
        self.axes.add_patch(Rectangle((x, y), w, h, facecolor="none", edgecolor="white", linewidth=1.6))


def draw(records: list[Record]) -> Mapping[str, Figure]:
    """A picture for each run, by its name; of a run that was explained twice, as it was the last time."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        if record.kind == "layout":
            runs.setdefault(record.run, []).append(record)
    if not runs:
        raise MissingRecords('These records hold no layout of an array (kind "layout").')
    made: dict[str, Figure] = {}
    for run, rows in runs.items():
        newest = max(r.header.time for r in rows)
        last = [r for r in rows if r.header.time == newest]
        name = str(last[0].details.get("name", run))
        made[run if name in made else name] = _picture(last)
    return made


def _picture(records: list[Record]) -> Figure:
    head = records[0].header
    mesh, orders = dict(head.mesh), head.details.get("orders", [])
    arrays = chosen([r.values for r in records], orders, head.details.get("draw", ()), MOST)
    told = split_names(arrays)
    panels = [(array, array.drawn(told)) for array in arrays]
    tallest = [max((len(_said(a, d, mesh)) for a, d in row), default=0) for row in _rows(panels)]
    tops = [0.66]
    for lines in tallest:
        tops.append(tops[-1] + 0.5 + RECT[1] + 0.135 + 0.125 * lines + 0.2)
    note = _note(arrays, mesh)
    height = tops[-1] + 0.12 + 0.13 * note.count("\n")
    figure = Figure(figsize=(style.PAGE, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, style.PAGE), ylim=(height, 0))
    axes.axis("off")
    pen = Pen(axes, mesh)
    sizes = " × ".join(f"{a} {n}" for a, n in head.mesh.items()) or "no axis"
    pen.text(0.12, 0.26, str(head.details.get("rules", head.run)), fontsize=10.5, weight="bold")
    count = f"{pen.devices} device" + "s" * (pen.devices > 1)
    plural = {"parameter": "parameters", "gradient": "gradients", "optimizer": "optimizer state"}
    held = ", ".join(
        f"{plural.get(k, k)} {_bytes(b)}" for k, b in head.details.get("bytes_per_device", {}).items()
    )
    pen.text(0.12, 0.44, f"{count}: {sizes}.  On each: {held}.", color=style.GREY)
    _mesh(pen, 0.12, 0.66)
    for i, (array, drawn) in enumerate(panels, 1):
        _panel(pen, 0.12 + i % COLUMNS * CELL, tops[i // COLUMNS], array, drawn)
    pen.text(0.12, height - 0.1, note, color=style.GREY, fontsize=style.SMALL, va="bottom", linespacing=1.4)
    return figure


def _rows(panels: Sequence[Any]) -> list[Sequence[Any]]:
    """The panels of each row; the first cell is the mesh's."""
    ends = range(COLUMNS - 1, len(panels) + COLUMNS, COLUMNS)
    rows = [panels[max(0, end - COLUMNS) : end] for end in ends]
    return [row for i, row in enumerate(rows) if row or i == 0]


def _note(arrays: Sequence[Array], mesh: Mapping[str, int]) -> str:
    words = "A block has the colour and the number of the device that holds it."
    if any(set(mesh) - set(a.cut()) for a in arrays):
        words += " Stripes: each of these devices holds a copy."
    found = dict.fromkeys(o["order"] for a in arrays for o in a.orders if o["axis"] in a.cut())
    if found:
        words += f"\nPositions are drawn in their natural order; they lie in the order {', '.join(found)}."
    return words + "\nFrom shardlab explain: modelled, nothing ran."


def _mesh(pen: Pen, x: float, y: float) -> None:
    """The devices with their colours and numbers: the last axis across, the others down."""
    across = list(pen.mesh)[-1:]
    down = list(pen.mesh)[:-1]
    pen.text(x, y + 0.1, "The devices", fontsize=8, weight="bold")
    pen.text(x, y + 0.245, "place in the mesh", color=style.GREY)
    columns = pen.mesh[across[0]] if across else 1
    rows = pen.devices // columns
    left, top = x + (0.62 if down else 0.02), y + 0.56
    side = min(
        0.3, 1.9 / min(columns, MANY) if not down else 1.35 / min(columns, MANY), 1.5 / min(rows, MANY)
    )
    for d, at in enumerate(coordinates(pen.mesh)):
        row, column = divmod(d, columns)
        if row >= MANY or column >= MANY:
            continue
        x0, y0 = left + column * side, top + row * side
        pen.block(x0, y0, side, side, [d])
        if side > 0.16:
            pen.text(x0 + side / 2, y0 + side / 2, str(d), ha="center", va="center_baseline")
        if column == 0 and down and row % math.ceil(0.125 / side) == 0:  # labels a line apart
            words = (
                " ".join(f"{a} {at[a]}" for a in down)
                if len(down) == 1
                else ", ".join(f"{at[a]}" for a in down)
            )
            pen.text(left - 0.06, y0 + side / 2, words, ha="right", va="center_baseline", color=style.GREY)
    if across:
        pen.text(left + 0.03, top - 0.06, f"{across[0]} 0–{columns - 1} →", color=style.GREY)
    if len(down) > 1:
        pen.text(left - 0.06, top - 0.06, ", ".join(down), color=style.GREY, ha="right")
    if rows > MANY or columns > MANY:
        pen.text(
            left, top + min(rows, MANY) * side + 0.12, f"… {pen.devices} devices in all", color=style.GREY
        )


def _panel(pen: Pen, x: float, y: float, array: Array, drawn: Sequence[int]) -> None:
    """One array: what it is, its rectangle of two dims cut into blocks, and what cut it."""
    pen.text(x, y + 0.1, array.title, CELL - 0.15, fontsize=8, weight="bold")
    pen.text(x, y + 0.245, array.moment, CELL - 0.15, color=style.GREY)
    left, top = x + 0.2, y + 0.5
    cells = [_shown(array.segments(i, pen.mesh), array.shape[i]) for i in drawn]
    if len(drawn) == 1:
        cells.insert(0, [(Segment(0, 1, 0), 0.0, 1.0)])
    for across, name in ((True, drawn[-1]), (False, drawn[0])):
        if across or len(drawn) > 1:
            _dim(pen, array, name, (left, top), across=across)
    for down, y0, h in cells[0]:
        for over, x0, w in cells[1]:
            parts = {drawn[-1]: over.part} | ({drawn[0]: down.part} if len(drawn) > 1 else {})
            held_by = holders(array, parts, pen.mesh)
            place = (left + x0 * RECT[0], top + y0 * RECT[1], w * RECT[0], h * RECT[1])
            pen.block(*place, held_by)
            _label(pen, place, held_by)
    for i, line in enumerate(_said(array, drawn, pen.mesh)):
        pen.text(
            left,
            top + RECT[1] + 0.135 + 0.125 * i,
            line,
            fontsize=style.SMALL,
            color=style.INK if i == 0 else style.GREY,
        )


def _dim(pen: Pen, array: Array, dim: int, corner: tuple[float, float], across: bool) -> None:
    """A dim's name and size beside its edge: dark and with the axes that cut it, or grey where it stays whole."""
    axes = array.dims[dim]
    words = f"{array.names[dim]} {array.shape[dim]}" + "".join(f" /{a}" for a in axes)
    look: dict[str, Any] = {"color": style.INK, "weight": "bold"} if axes else {"color": style.GREY}
    left, top = corner
    if across:
        pen.text(left, top - 0.06, words, **look)
    else:
        look["fontsize"] = min(TEXT, TEXT * RECT[1] / (0.055 * len(words)))  # a long name shrinks to its edge
        look |= {"rotation": 90, "ha": "right", "va": "center"}
        pen.text(left - 0.06, top + RECT[1] / 2, words, **look)


def _shown(segments: list[Segment], size: int) -> list[tuple[Segment, float, float]]:
    """Each segment with its start and extent as shares of the edge; beyond MANY the first ones, spread over it."""
    kept = segments[:MANY]
    size = size if len(segments) <= MANY else kept[-1].stop
    return [(s, s.start / size, (s.stop - s.start) / size) for s in kept]


def _label(pen: Pen, place: tuple[float, float, float, float], held_by: Sequence[int]) -> None:
    """The devices of a block in its middle, where they fit; else how many they are, else nothing."""
    x, y, w, h = place
    for words in (listed(held_by, pen.devices), f"{len(held_by)}×"):
        wide, high = 0.062 * len(words) + 0.04, 0.12
        upright = wide > w and wide <= h and high <= w
        if (wide <= w and high <= h) or upright:
            look: dict[str, Any] = {"rotation": 90} if upright else {}
            if len(held_by) > 1:
                look["bbox"] = {
                    "boxstyle": "round,pad=0.22",
                    "facecolor": "white",
                    "edgecolor": "none",
                    "alpha": 0.85,
                }
            look = {"va": "center_baseline", "ha": "center"} | look
            pen.text(x + w / 2, y + h / 2, words, **look)
            return


def _said(array: Array, drawn: Sequence[int], mesh: Mapping[str, int]) -> list[str]:
    """The lines under a rectangle: bytes, who cut which dim, what stays whole, what the flat picture leaves out."""
    blocks = math.prod(array.parts(i, mesh) for i in range(len(array.names)))
    total, copies = array.bytes_per_device * blocks, math.prod(mesh.values()) // blocks
    said = [
        f"{_bytes(array.bytes_per_device)} a device" + (f" of {_bytes(total)}" if blocks > 1 else ": whole")
    ]
    by: dict[str, list[str]] = {}
    for name, axis, rule in array.placed:
        if axis in array.cut():
            by.setdefault(rule, []).append(f"{name}/{axis}")
    said += [f"{rule} cuts {' '.join(cuts)}" for rule, cuts in by.items()]
    if copies > 1:
        said.append(f"{copies} copies: whole over {', '.join(a for a in mesh if a not in array.cut())}")
    flat = [i for i in range(len(array.names)) if i not in drawn]
    if rest := [f"{array.names[i]}\N{NO-BREAK SPACE}{array.shape[i]}" for i in flat if not array.dims[i]]:
        said.append(f"also whole: {', '.join(rest)}")
    for i in flat:
        if array.dims[i]:
            said.append(
                f"drawn: 1 of {array.parts(i, mesh)} parts of {array.names[i]}/{'/'.join(array.dims[i])}"
            )
    for i in drawn:
        if (n := len(array.segments(i, mesh))) > MANY:
            said.append(f"drawn: {MANY} of {n} parts of {array.names[i]}")
    return [line for words in said for line in textwrap.wrap(words, 38)]


def _bytes(n: float) -> str:
    """`3.1 MiB`."""
    at = next((i for i in range(4) if n < 1024 ** (i + 1)), 4)
    n, unit = n / 1024**at, ("B", "KiB", "MiB", "GiB", "TiB")[at]
    return f"{n:.0f} {unit}" if n >= 100 or n == int(n) else f"{n:.3g} {unit}"
