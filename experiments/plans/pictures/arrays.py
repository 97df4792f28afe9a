"""Every array of a plan as a small picture: its rectangle of two dims, cut into the blocks that devices hold.

On few devices each has a colour, and a block has those of all that hold a copy, in stripes. On many the block of the first
place of the mesh stands out, and the caption counts the rest.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.plans.pictures.blocks import MANY, Segment, Shape, in_use, shape_of
from experiments.plans.pictures.html import Html, el, join, raw
from experiments.plans.pictures.look import AXIS_COLOURS, device_colour
from sharding.finding import human

if TYPE_CHECKING:
    from experiments.explanation import Explanation, Line

FEW = 16
"""Devices up to which each has a colour of its own."""
WIDE, HIGH, LEFT, TOP = 118.0, 82.0, 22.0, 20.0
"""The rectangle, and its corner in the picture, pixels."""
STRIPE = 7.0


@dataclass(frozen=True)
class Pictured:
    """Arrays that look alike, as one picture: a parameter at rest with its gradient and state, or one of every layer."""

    paths: tuple[str, ...]
    shape: Shape
    dtype: str
    moments: tuple[tuple[str, int], ...]
    """(when it lies so, bytes on a device then)."""
    source: str = ""


def pictured(told: Explanation) -> dict[str, list[Pictured]]:
    """Kind of array -> pictures that show every line of the explanation, those that look alike as one."""
    state: dict[str, list[Line]] = {}
    for line in told.lines:
        if line.kind in ("parameter", "gradient", "optimizer"):
            state.setdefault(line.path, []).append(line)
    made = {
        "Parameters, gradients and optimizer state": [p for lines in state.values() for p in _state(lines)]
    }
    kinds = (("batch", "Batch"), ("activation", "Activations, as the named ops make them"),
             ("inside", "Inside attention, which no op returns"))  # fmt: skip
    for kind, title in kinds:
        made[title] = [
            Pictured((x.path,), shape_of(x, told.orders), x.dtype, (("", x.bytes_per_device),), x.source)
            for x in told.of(kind)
        ]
    return {title: _merged(each) for title, each in made.items() if each}


def _state(lines: Sequence[Line]) -> list[Pictured]:
    """A parameter once for each layout that it has in the course of a step."""
    ways: dict[Shape, list[tuple[str, int]]] = {}
    words = {"parameter": "at rest", "gradient": "gradient", "optimizer": "optimizer state"}
    for line in lines:
        away = " in the host's memory" if line.memory == "host" else ""
        copies = f"{line.copies} x " if line.copies > 1 else ""
        at_rest = ways.setdefault(shape_of(line, ()), [])
        at_rest.append((f"{copies}{words[line.kind]}{away}", line.bytes_per_device))
        if used := in_use(line):
            gathered = math.prod(p.size for p in line.placed if p.axis in set(line.gathered))
            stacked = "layers" in line.names and not line.dims[line.names.index("layers")]
            layers = line.shape[line.names.index("layers")] if stacked else 1
            moment = "one layer gathered for use" if layers > 1 else "gathered for use"
            ways.setdefault(used, []).append((moment, line.bytes_per_device * gathered // layers))
    return [Pictured((lines[0].path,), s, lines[0].dtype, tuple(m)) for s, m in ways.items()]


def _merged(each: Sequence[Pictured]) -> list[Pictured]:
    """Arrays that differ in a number of their path alone (one of each layer) as one picture."""
    found: dict[object, list[Pictured]] = {}
    for p in each:
        alike = re.sub(r"\d+", "#", p.paths[0])
        found.setdefault((alike, p.shape, p.dtype, p.moments, p.source), []).append(p)
    return [
        Pictured(tuple(x for p in ps for x in p.paths), ps[0].shape, ps[0].dtype, ps[0].moments, ps[0].source)
        for ps in found.values()
    ]


def arrays(told: Explanation) -> Html:
    """Small multiples, a group for each kind."""
    groups = []
    for title, each in pictured(told).items():
        figures = [
            el("figure", draw(p.shape, told.mesh), el("figcaption", *_caption(p, told.mesh))) for p in each
        ]
        groups.append(join([el("h3", title), el("div", *figures, class_="arrays")]))
    return join(groups)


def draw(shape: Shape, mesh: Mapping[str, int], prefix: str = "") -> Html:
    """The picture of one array. `prefix`: of the names of its stripes, as in `definitions`."""
    if not shape.shape:
        return el(
            "svg",
            el("text", "a scalar", x=LEFT, y=TOP + 12, class_="t"),
            width=150,
            height=112,
            viewBox="0 0 150 112",
        )
    *first, across = shape.drawn()
    down = first[0] if first else None
    cells = [_shown(shape.segments(i, mesh), shape.shape[i]) for i in (*first, across)]
    if down is None:
        cells.insert(0, [(Segment(0, 1, 0), 0.0, 1.0)])
    blocks = []
    for (row, y, h), (column, x, w) in itertools.product(*cells):
        parts = {across: column.part} | ({down: row.part} if down is not None else {})
        blocks.append((LEFT + x * WIDE, TOP + y * HIGH, w * WIDE, h * HIGH, parts))
    count = math.prod(mesh.values())
    body = _coloured(shape, mesh, blocks, prefix) if count <= FEW else _first(shape, blocks)
    labels = [_label(shape, across, LEFT, TOP - 7, None)]
    if down is not None:
        labels.append(_label(shape, down, LEFT - 7, TOP + HIGH, f"rotate(-90 {LEFT - 7} {TOP + HIGH:g})"))
    return el(
        "svg",
        *body,
        *labels,
        width=150,
        height=112,
        viewBox="0 0 150 112",
        role="img",
        aria_label=_words(shape),
    )


Block = tuple[float, float, float, float, dict[int, int]]


def _coloured(shape: Shape, mesh: Mapping[str, int], blocks: Sequence[Block], prefix: str) -> list[Html]:
    """Each block in the colours of its holders."""
    devices = math.prod(mesh.values())
    made = []
    for x, y, w, h, parts in blocks:
        held = shape.holders(parts, mesh)
        fill = device_colour(held[0], devices) if len(held) == 1 else f"url(#{pattern_name(held, prefix)})"
        made.append(el("rect", x=x, y=y, width=w, height=h, fill=fill, stroke="var(--cut)", stroke_width=1.4))
        made += _holders_label(held, x, y, w, h)
    return made


def _holders_label(held: Sequence[int], x: float, y: float, w: float, h: float) -> list[Html]:
    """The devices of a block in its middle, where they fit; else how many they are, else nothing."""
    for words in (" ".join(map(str, held)), f"{len(held)}x"):
        wide = 4 + 5.4 * len(words)
        if wide < w and h > 12:
            middle = {"x": x + w / 2, "y": y + h / 2}
            plate = el("rect", x=middle["x"] - wide / 2, y=middle["y"] - 6, width=wide, height=12, rx=3, fill="#fff",
                       opacity=0.82)  # fmt: skip
            text = el(
                "text", words, x=middle["x"], y=middle["y"] + 3.2, text_anchor="middle", style="fill:#1b2230"
            )
            return [plate, text] if len(held) > 1 else [text]
    return []


def _first(shape: Shape, blocks: Sequence[Block]) -> list[Html]:
    """All blocks pale, those of the first place of the mesh in full colour: three paths, however many there are."""
    path = lambda bs: raw("".join(f"M{x:.1f} {y:.1f}h{w:.1f}v{h:.1f}h-{w:.1f}z" for x, y, w, h, _ in bs))
    mine = [b for b in blocks if not any(b[4].values())]
    thin = 0.8 if len(blocks) < 300 else 0.35
    return [
        el("path", d=path(blocks), fill="var(--rest)", stroke="var(--cut)", stroke_width=thin),
        el("path", d=path(mine), fill="var(--predicted)", stroke="var(--cut)", stroke_width=thin),
    ]


def patterns(told: Explanation) -> Html:
    """The stripes of blocks that several devices hold, defined once for all pictures; nothing where there are many devices."""
    devices = math.prod(told.mesh.values())
    if devices > FEW:
        return join(())
    return definitions([p.shape for each in pictured(told).values() for p in each], told.mesh)


def definitions(shapes: Sequence[Shape], mesh: Mapping[str, int], prefix: str = "") -> Html:
    """The stripes that these arrays need on one mesh; a prefix tells meshes on one page apart."""
    devices, sets = math.prod(mesh.values()), {}
    for shape in shapes if devices <= FEW else ():
        dims = shape.drawn()
        for parts in itertools.product(*(range(shape.parts(i, mesh)) for i in dims)):
            held = shape.holders(dict(zip(dims, parts, strict=True)), mesh)
            if len(held) > 1:
                sets[held] = None
    made = []
    for held in sorted(sets):
        wide = STRIPE * len(held)
        bands = [
            el("rect", x=i * STRIPE, y=0, width=STRIPE + 0.3, height=wide, fill=device_colour(d, devices))
            for i, d in enumerate(held)
        ]
        made.append(el("pattern", *bands, id=pattern_name(held, prefix), width=wide, height=wide, patternUnits="userSpaceOnUse",
                       patternTransform="rotate(45)"))  # fmt: skip
    style = "position:absolute;width:0;height:0"
    return el("svg", el("defs", *made), style=style, aria_hidden="true") if made else join(())


def pattern_name(held: Sequence[int], prefix: str) -> str:
    """The id of the stripes of these devices."""
    return f"{prefix}h" + "-".join(map(str, held))


def _shown(segments: list[Segment], size: int) -> list[tuple[Segment, float, float]]:
    """Each segment with its start and extent as shares of the edge; beyond MANY the first ones, spread over it."""
    kept = segments[:MANY]
    size = size if len(segments) <= MANY else kept[-1].stop
    return [(s, s.start / size, (s.stop - s.start) / size) for s in kept]


def _label(shape: Shape, dim: int, x: float, y: float, transform: str | None) -> Html:
    """A dim's name and size beside its edge, with the axes that cut it in their colours."""
    axes = shape.dims[dim]
    spans: list[str] = [f"{shape.names[dim]} {shape.shape[dim]}"]
    spans += [el("tspan", f" /{a}", style=f"fill:{AXIS_COLOURS.get(a, 'inherit')}", class_="b") for a in axes]
    length = len(spans[0]) + sum(len(a) + 2 for a in axes)
    room = (WIDE + 8 if transform is None else HIGH + TOP - 4) / 5.0
    small = f"font-size:{max(9 * room / length, 6):.1f}px" if length > room else None
    return el("text", *spans, x=x, y=y, transform=transform, class_=None if axes else "t", style=small)


def _caption(p: Pictured, mesh: Mapping[str, int]) -> list[Html]:
    first = p.paths[0] if len(p.paths) == 1 else f"{p.paths[0]} … {p.paths[-1]} ({len(p.paths)})"
    title = f"{first} of {p.source.rpartition('/')[2]}" if p.source else first
    moments = [f"{moment}: {human(n)}" if moment else f"{human(n)} a device" for moment, n in p.moments]
    shape = "x".join(map(str, p.shape.shape)) or "scalar"
    lines = [f"{shape} {p.dtype}", *moments, *_said(p.shape, mesh)]
    return [el("b", title), *(el("div", words) for words in lines)]


def _said(shape: Shape, mesh: Mapping[str, int]) -> list[str]:
    """What the flat picture leaves out."""
    blocks = math.prod(shape.parts(i, mesh) for i in range(len(shape.shape)))
    copies, dims = math.prod(mesh.values()) // blocks, shape.drawn()
    said = [f"{blocks} blocks" if blocks > 1 else "whole on every device"]
    if copies > 1 and blocks > 1:
        said = [
            f"{blocks} blocks, {copies} copies of each: whole over {' and '.join(a for a in mesh if a not in shape.cut)}"
        ]
    for i in (i for i in range(len(shape.shape)) if i not in dims and shape.dims[i]):
        said.append(
            f"drawn: 1 of {shape.parts(i, mesh)} parts of {shape.names[i]} /{' /'.join(shape.dims[i])}"
        )
    for i in dims:
        if (n := len(shape.segments(i, mesh))) > MANY:
            said.append(f"drawn: {MANY} of {n} parts of {shape.names[i]}")
    return said


def _words(shape: Shape) -> str:
    return " ".join("/".join((n, *axes)) for n, axes in zip(shape.names, shape.dims, strict=True))
