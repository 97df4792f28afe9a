"""A schedule as SVG: both clocks to one scale, a bar for each task with its micro-batch's number, a row for each stage.

The same schedule gives the same bytes. Alone the file has its own colours for light and dark; on a page it takes the page's.
"""

from __future__ import annotations

import math

from experiments.plans.pictures.html import Html, el, join, raw
from experiments.schedules.look import INK, colour
from experiments.schedules.seen import Seen, backward, percent
from sharding.pipeline.clocks import Clock
from sharding.pipeline.grid import KINDS, Kind

LEFT, RIGHT, ROW, BAR = 58.0, 12.0, 22.0, 19.0
HEAD, AXIS, LEGEND = 26.0, 30.0, 26.0
"""Pixels: of the labels at the left, the margin at the right, a stage's row and the bar in it; a clock's title, its axis."""
DIGIT = 6.1
"""Width of a digit in a bar."""
NARROW, WIDE = 1040.0, 6000.0
"""Between these is the time axis long, in pixels; within them so long that numbers fit into the shortest bars."""
TOLD = 4000
"""Bars up to which each has a title of its own, which a browser shows under the pointer."""

ALONE = """
svg{--bg:#fff;--ink:#1b2230;--dim:#5a6475;--line:#dde2e9;--panel:#f1f4f8;background:var(--bg)}
@media (prefers-color-scheme:dark){svg{--bg:#11141a;--ink:#e7eaf0;--dim:#9ca6b5;--line:#2c333e;--panel:#1b212a}}
text{font:10px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--ink)}
"""
TASKS = f"""
svg .t{{fill:var(--dim)}}svg text.b{{font-weight:650;font-size:12px}}svg text.in{{fill:{INK};text-anchor:middle}}
svg .lane{{fill:var(--panel)}}svg .grid{{stroke:var(--line)}}
"""
"""What a page needs besides its own style."""


def alone(seen: Seen) -> str:
    """The file of `--svg`."""
    return f"{picture(seen, f'{ALONE}{TASKS}')}\n"


def picture(seen: Seen, style: str = "") -> Html:
    """The drawing: legend, the lockstep clock, the clock of independent stages."""
    scale = _scale(seen)
    wide = LEFT + RIGHT + scale * max(clock.makespan for _, clock in seen.clocks)
    high = HEAD + ROW * seen.grid.stages + AXIS
    panels = [
        _clock(seen, name, clock, LEGEND + high * at, scale) for at, (name, clock) in enumerate(seen.clocks)
    ]
    tall = LEGEND + high * len(panels)
    words = f"{seen.expression} on {seen.grid.stages} stages, in lockstep and with independent stages"
    return el(
        "svg",
        el("style", raw(style)) if style else "",
        _legend(seen),
        *panels,
        xmlns="http://www.w3.org/2000/svg",
        width=wide,
        height=tall,
        viewBox=f"0 0 {wide:.0f} {tall:.0f}",
        role="img",
        aria_label=words,
    )


def _scale(seen: Seen) -> float:
    """Pixels for a unit of time."""
    longest = max(clock.makespan for _, clock in seen.clocks)
    lengths = [span.end - span.start for span in seen.lockstep.spans if span.end > span.start]
    digits = len(str(seen.grid.microbatches - 1))
    return min(max((digits * DIGIT + 5) / min(lengths), NARROW / longest), WIDE / longest)


def _legend(seen: Seen) -> Html:
    """A sample of each kind, in the shades of its chunks."""
    grid = seen.grid
    words: dict[Kind, str] = {"F": "F forward", "B": f"B {backward(seen)}", "W": "W weights"}
    parts, x = [], LEFT
    for kind in KINDS if grid.splits else KINDS[:2]:
        for chunk in range(grid.chunks):
            parts.append(
                el("rect", x=x, y=5.0, width=11.0, height=11.0, fill=colour(kind, chunk, grid.chunks))
            )
            x += 12.0
        parts.append(el("text", words[kind], x=x + 4, y=14.0))
        x += 18.0 + 5.4 * len(words[kind])
    if grid.chunks > 1:
        parts.append(el("text", f"shades: chunks 0 to {grid.chunks - 1}", x=x, y=14.0, class_="t"))
    return join(parts)


def _clock(seen: Seen, name: str, clock: Clock, top: float, scale: float) -> Html:
    """One clock: title, a lane for each stage, bars, axis."""
    stages, first = seen.grid.stages, top + HEAD
    says = f"{name}: {clock.makespan:.6g}, bubble {percent(clock.bubble)}"
    parts = [el("text", says, x=LEFT, y=top + 17, class_="b")]
    for stage in range(stages):
        y = first + ROW * stage
        parts.append(el("text", f"stage {stage}", x=LEFT - 6, y=y + 13.5, text_anchor="end", class_="t"))
        parts.append(el("rect", x=LEFT, y=y, width=scale * clock.makespan, height=BAR, class_="lane"))
    parts += _bars(seen, clock, first, scale)
    parts += _axis(clock, first + ROW * stages, scale)
    return el("g", *parts)


def _bars(seen: Seen, clock: Clock, top: float, scale: float) -> list[Html]:
    parts = []
    for span in clock.spans:
        x, wide = LEFT + scale * span.start, scale * (span.end - span.start)
        if not wide:
            continue
        y, number = top + ROW * span.stage, str(span.task.microbatch)
        told = f"{span.task} of stage {span.stage}: {span.start:.6g} to {span.end:.6g}"
        title = [el("title", told)] if len(clock.spans) <= TOLD else []
        fill = colour(span.task.kind, span.task.chunk, seen.grid.chunks)
        gap = min(1.0, wide / 4)
        parts.append(
            el("rect", *title, x=x, y=y, width=wide - gap, height=BAR, rx=min(2.0, wide / 4), fill=fill)
        )
        if len(number) * DIGIT + 2 <= wide:
            parts.append(el("text", number, x=x + (wide - gap) / 2, y=y + 13.2, class_="in"))
    return parts


def _axis(clock: Clock, y: float, scale: float) -> list[Html]:
    """Time at round numbers, some 60 pixels apart."""
    step = _round(60.0 / scale)
    parts = []
    for at in range(math.floor(clock.makespan / step * (1 + 1e-9)) + 1):
        x = LEFT + scale * step * at
        parts.append(el("line", x1=x, y1=y, x2=x, y2=y + 4, class_="grid"))
        parts.append(el("text", f"{step * at:g}", x=x, y=y + 14, text_anchor="middle", class_="t"))
    return parts


def _round(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... from a value on."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= value * (1 - 1e-9))
