"""The house look of every figure: one column wide, colour-blind safe, lines labelled where they end.

Figures are ``matplotlib.figure.Figure`` objects; pyplot's global state is not used. ``house()`` sets every
parameter that the look and the bytes of a file depend on, whatever a user's matplotlibrc says. Colours: Okabe
and Ito, "Color Universal Design" (2008), without the yellow, which is too pale for a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

COLUMN = 3.5
"""Width of one column of print, inches."""
PAGE = 7.0
"""Width of both columns, inches."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (4, 1.6)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GREY, PALE = "#222222", "#6B6B6B", "#D9D9D9"
SMALL = 6.5
"""Size of labels within a figure, points; at one column's width they need no magnifier."""

_LOOK = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same glyphs
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.labelsize": 7.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.xmargin": 0.0,
    "text.color": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.solid_capstyle": "round",
    "lines.markersize": 3.6,
    "axes.unicode_minus": True,
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "svg.fonttype": "path",  # glyphs travel with the file: the same picture without the font
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
}


@contextmanager
def house(salt: str) -> Iterator[None]:
    """Within the block matplotlib draws in the house look; ``salt`` names the figure and fixes the ids in its
    SVG.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        look: dict[Any, Any] = {**_LOOK, "svg.hashsalt": f"shardlab {salt}"}
        matplotlib.rcParams.update(look)
        yield


def colour(index: int) -> str:
    """Colour of the index-th series. Past the palette it repeats, so pair it with ``dash`` or ``marker``."""
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str | tuple[int, tuple[float, ...]]:
    """Line style of the index-th series: changes once the colours have been used up."""
    return DASHES[index // len(COLOURS) % len(DASHES)]


def marker(index: int) -> str:
    """Marker of the index-th series: a second sign beside colour, for print in grey."""
    return MARKERS[index % len(MARKERS)]


@dataclass(frozen=True)
class Label:
    """A text that belongs at the height ``y`` (data units) beside the right edge of an axes."""

    y: float
    text: str
    colour: str = INK


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes labels in the right margin, each beside its height, pushed apart as little as makes them
    legible.

    Call it last: heights are taken from the axes' limits and the figure's layout as they stand.
    """
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    texts = [
        axes.annotate(
            label.text, (1, label.y), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            color=label.colour, fontsize=SMALL, va="center", linespacing=1.1, annotation_clip=False,
        )
        for label in labels
    ]  # fmt: skip
    figure.draw_without_rendering()  # settles the layout, which the texts' width takes part in
    points = 72 / figure.dpi
    heights = [float(axes.transData.transform((0, label.y))[1]) * points for label in labels]
    bottom, top = (float(v) * points for v in axes.bbox.intervaly)
    gaps = [1.2 * SMALL * (1 + label.text.count("\n")) for label in labels]
    for text, height, place in zip(texts, heights, spread(heights, gaps, bottom, top), strict=True):
        text.set_position((4, place - height))


def spread(centres: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Moves intervals of the given sizes apart, least squares over their centres, keeping order and [low,
    high].

    Neighbours that collide form a block around the mean of where they want to be (pool adjacent violators).
    Where they do not all fit between low and high, they overlap nowhere but reach below low.
    """
    order = sorted(range(len(centres)), key=lambda i: centres[i])
    blocks: list[tuple[float, float, list[int]]] = []  # centre, size, members from the bottom up
    for i in order:
        centre, size, members = min(max(centres[i], low + sizes[i] / 2), high - sizes[i] / 2), sizes[i], [i]
        while blocks and blocks[-1][0] + blocks[-1][1] / 2 > centre - size / 2:
            members = blocks.pop()[2] + members
            size = sum(sizes[j] for j in members)
            below, wish = 0.0, 0.0
            for j in members:
                wish += centres[j] - (below + sizes[j] / 2)
                below += sizes[j]
            centre = wish / len(members) + size / 2
            centre = min(max(centre, low + size / 2), high - size / 2)
        blocks.append((centre, size, members))
    places = [0.0] * len(centres)
    for centre, size, members in blocks:
        edge = centre - size / 2
        for j in members:
            places[j] = edge + sizes[j] / 2
            edge += sizes[j]
    return places


def note(figure: Figure, text: str) -> None:
    """Lines of grey small print under the axes, as wide as the figure: what one must know to read the picture rightly."""
    size, width = SMALL - 0.7, 0.98 * 72 * figure.get_size_inches()[0]
    lines = [line for told in text.splitlines() for line in wrapped(told, size, width)]
    figure.supxlabel("\n".join(lines), fontsize=size, color=GREY, x=0.01, ha="left", linespacing=1.35)


def wrapped(text: str, size: float, width: float) -> list[str]:
    """A text in lines of at most `width` points in letters of `size` points; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and TextPath((0, 0), longer, size=size).get_extents().width <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def counted(number: float) -> str:
    """A count in three significant digits with k, M, G, T: ``3410`` is 3.41k."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 10**power * 0.9995:
            return f"{number / 10**power:.3g}{unit}"
    return f"{number:.3g}"
