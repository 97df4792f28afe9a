"""The part of a plan's tables that is about what moves: predicted beside compiled, where they depart, and what it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.plans.words import (
    NOTHING,
    WHOSE,
    axes_text,
    difference_text,
    done,
    named,
    per_layer,
    ratio_text,
    side_by_side,
    total_row,
    what_for,
)
from sharding.finding import human

if TYPE_CHECKING:
    from experiments.plans.console import Sheet
    from experiments.plans.planned import Made, Plan, Total
    from experiments.plans.words import SideBySide

MOST = 8
"""Rows of a long table that a terminal shows; the rest is one row."""


def print_traffic(sheet: Sheet, plan: Plan) -> None:
    """Collectives by axes and kind, departures of the compiled steps, and what they are for."""
    _beside(sheet, plan)
    for made in done(plan):
        if made.partitioner == "auto":
            _unpredicted(sheet, made)
        elif plan.moved:
            _departures(sheet, made)
    _purposes(sheet, plan)


def _beside(sheet: Sheet, plan: Plan) -> None:
    rows = side_by_side(plan)
    if not rows:
        if plan.explanation.mesh and not plan.made:
            sheet.line("No collective can be listed: see what is missing.\n")
        return
    has = list(rows[0].compiled)
    heads = [h for p in has for h in (f">compiled\n({WHOSE[p]})", *([">ratio"] if plan.moved else []))]
    differ = ["differences"] if "manual" in has and plan.moved else []
    sheet.table(
        "What each device sends in one step (in how many collectives)",
        "over", "kind", *([">predicted"] if plan.moved else []), *heads, *differ,
    )  # fmt: skip
    for r in rows:
        by_name = [", ".join(named(plan, r.axes, r.kind))] if differ else []
        sheet.row(axes_text(r.axes), r.kind, *_cells(plan, r, has), *by_name)
    sheet.row("all", "", *_cells(plan, total_row(plan, rows), has), *([""] if differ else []), style="bold")
    sheet.end()


def _cells(plan: Plan, r: SideBySide, has: list[str]) -> list[str]:
    cells = [_amount(r.predicted)] if plan.moved else []
    for p in has:
        cells.append(_amount(r.compiled[p]))
        if plan.moved:
            cells.append(ratio_text(r.ratio(p)))
    return cells


def _amount(total: Total | None) -> str:
    return f"{human(total.sent)} ({total.times:,})" if total else NOTHING


def _departures(sheet: Sheet, made: Made) -> None:
    """Each departure in a sentence, the most bytes first."""
    rows = sorted(made.differences, key=lambda d: -max(d.predicted[1], d.compiled[1]))
    if not rows:
        sheet.line("The compiled step of shardlab has the predicted collectives, byte for byte.\n")
        return
    sheet.line("Where the compiled step of shardlab departs from what was predicted", "bold")
    shown = sheet.shown(rows, MOST)
    for d in shown:
        sheet.point(difference_text(d), "" if d.name else "red")
    if left := rows[len(shown) :]:
        sheet.point(
            f"{len(left)} more: {human(sum(d.compiled[1] for d in left))} compiled (--json lists all)"
        )
    sheet.line()


def _unpredicted(sheet: Sheet, made: Made) -> None:
    """What XLA's partitioner put there, by the line that it belongs to."""
    rows = sorted(made.differences, key=lambda d: -d.compiled[1])
    if not rows:
        return
    sheet.table("Unpredicted collectives: XLA's partitioner put them there (compiled)", "over", "kind", ">times",
                ">each device sends", "belongs to")  # fmt: skip
    shown = sheet.shown(rows, MOST)
    for d in shown:
        source = d.source or "no line known"
        sheet.row(axes_text(d.axes), d.kind, f"{d.compiled[0]:,}", human(d.compiled[1]), source)
    if left := rows[len(shown) :]:
        times, sent = sum(d.compiled[0] for d in left), sum(d.compiled[1] for d in left)
        sheet.row(f"{len(left)} more", "", f"{times:,}", human(sent), "(--json lists all)")
    sheet.end()


def _purposes(sheet: Sheet, plan: Plan) -> None:
    if not plan.moved:
        return
    further = ["axis used by"] if sheet.piped else []
    sheet.table("What they are for (predicted)", "op", "over", "kind", "phase", ">times", ">a layer", ">a step",
                "asked for by", *further)  # fmt: skip
    shown = sheet.shown(plan.moved, MOST)
    for m in shown:
        source = m.source if sheet.piped else m.source.rpartition("/")[2]
        where = f"{m.phase}, {m.layers} layers" if m.layers else m.phase
        each = (f"{m.times:,}", per_layer(m.sent, m.layers), human(m.sent))
        sheet.row(
            what_for(m),
            axes_text(m.axes),
            m.kind,
            where,
            *each,
            source,
            *([", ".join(m.rules)] if further else []),
        )
    if left := plan.moved[len(shown) :]:
        times, sent = sum(m.times for m in left), sum(m.sent for m in left)
        sheet.row(f"{len(left)} more (--json lists all)", "", "", "", f"{times:,}", "", human(sent))
    sheet.end()
    if not sheet.piped:
        rules = {axes_text(m.axes): ", ".join(m.rules) for m in plan.moved if m.rules}
        for over, by in rules.items():
            sheet.point(f"{over}: {by}", "dim")
        sheet.line()
