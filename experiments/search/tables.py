"""A search in the terminal: what fell and why, the ranking, the Pareto front, the pick. Predicted, modelled and compiled
figures have columns of their own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.plans.console import Sheet
from sharding.finding import human

if TYPE_CHECKING:
    from experiments.search.found import Found, Regret, Row

FEW = 10
"""Rows of the Pareto front that a terminal shows."""
COLUMNS = (
    ">",
    "mesh",
    "rules",
    "remat",
    ">accumulate",
    ">predicted memory",
    ">modelled step",
    ">MFU bound",
)
COMPILED = (">compiled memory", ">modelled from compiled")
"""Further columns, where anything was compiled."""


def print_found(found: Found, show: int) -> None:
    """Print a search, the first `show` rows of its ranking and whatever was compiled or is the config itself."""
    sheet = Sheet()
    _head(sheet, found)
    rows = [r for r in found.rows if r.rank <= show or r.compiled or r.given or r.rank == found.pick]
    _table(sheet, "ranking by prediction: what fits, then the modelled step", rows, found)
    on_front = [r for r in found.rows if r.front and r.fits is not False]
    _table(
        sheet, "Pareto front: predicted memory against the modelled step", sheet.shown(on_front, FEW), found
    )
    if found.regret:
        _regret(sheet, found.regret)
    _end(sheet, found)


def _head(sheet: Sheet, found: Found) -> None:
    sheet.line(f"{found.config} on {found.target}: {found.devices}", "bold")
    room = f"{human(found.capacity)} of memory each" if found.capacity else "no memory of their own"
    sheet.fact("devices", room)
    fell = sum(found.fallen.values())
    sheet.fact("laid out", f"{found.splits} meshes with rules, of which {fell} fell{_because(found.fallen)}")
    left = found.candidates - found.estimated
    sheet.fact(
        "candidates",
        f"{found.candidates} with remat and micro-batches; {found.estimated} traced"
        + (f", {left} left out because they were not likely to be better" if left else ""),
    )
    if found.refused:
        sheet.fact("refused", f"{sum(found.refused.values())} while traced{_because(found.refused)}")
    took = found.seconds
    sheet.fact(
        "took",
        ", ".join(f"{what} {seconds:.1f} s" for what, seconds in took.items()) + f"; {found.jobs} processes",
    )
    sheet.line()


def _because(reasons: Mapping[str, int]) -> str:
    told = "; ".join(f"{reason} ({n})" for reason, n in reasons.items())
    return f": {told}" if told else ""


def _table(sheet: Sheet, title: str, rows: Sequence[Row], found: Found) -> None:
    if not rows:
        return
    compiled = any(row.compiled for row in found.rows)
    sheet.table(title, *COLUMNS, *(COMPILED if compiled else ()))
    for row in rows:
        picked = row.rank == found.pick
        style = "bold" if picked else "dim" if row.fits is False else ""
        sheet.row(*_cells(row, picked)[: None if compiled else len(COLUMNS)], style=style)
    sheet.end()


def _cells(row: Row, picked: bool) -> tuple[str, ...]:
    c, f = row.candidate, row.figure
    made = row.compiled
    marks = ("*" if picked else "") + ("=" if row.given else "")
    return (
        f"{marks}{row.rank}",
        c.shape().describe(),
        row.rules,
        c.remat or "-",
        str(c.accumulate),
        human(f.memory) + ("!" if row.fits is False else ""),
        _time(f.step),
        "-" if f.mfu is None else f"{100 * f.mfu:.0f} %",
        ""
        if made is None
        else "refused"
        if made.memory is None
        else human(made.memory) + ("!" if made.refused else ""),
        "" if made is None else _time(made.step),
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.4g} ms"


def _regret(sheet: Sheet, regret: Regret) -> None:
    sheet.line("regret against compiling every candidate (modelled from compiled, not measured)", "bold")
    sheet.fact("compiled", f"{regret.compiled}, of which {regret.fit} fit")
    sheet.fact("best", f"candidate {regret.best}, {_time(regret.best_step)}")
    for few, lost in regret.checked.items():
        what = "the first by prediction" if few == 1 else f"the best of the first {few} compiled"
        sheet.point(
            f"{what}: {'does not fit' if lost is None else f'{100 * lost:.1f} % longer than the best'}"
        )
    sheet.line()


def _end(sheet: Sheet, found: Found) -> None:
    marks = "* the pick   = the config as it is   ! more than a device has"
    sheet.line(marks, "dim")
    for what in found.missing:
        sheet.line(f"missing: {what}", "yellow")
    row = found.picked
    if row is not None:
        sheet.line(found.says, "bold")
        sheet.line(f"limit       {row.figure.bottleneck}")
        sheet.line(f"run it      {shlex.join(['shardlab', 'train', found.config, *row.words])}")
