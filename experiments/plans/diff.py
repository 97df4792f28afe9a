"""Two plans side by side: in a terminal, as JSON and as a page. What somebody looks at who proposes a new rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from experiments.plans.compared import MovedArray, PlanDifference, Side, difference
from experiments.plans.console import Sheet
from experiments.plans.diff_page import difference_page
from experiments.plans.diff_words import (
    amount_text,
    changed_bytes,
    changed_text,
    figure_text,
    how_moved,
    layouts,
    mesh_words,
    not_in,
    shapes,
)
from experiments.plans.figures import Figure, Traffic
from experiments.plans.words import axes_text

MOST = 12
"""Rows of a long table that a terminal shows."""


def print_difference(told: PlanDifference) -> None:
    """Print the difference of two plans."""
    sheet = Sheet()
    for name, side in (("A", told.a), ("B", told.b)):
        sheet.fact(name, f"{side.name} on {side.devices} ({side.target})", "bold")
        sheet.fact("", f"mesh {mesh_words(side.mesh)}, rules {' | '.join(side.rules) or 'none'}")
        sheet.fact("", side.verdict.says, {True: "green", False: "red", None: ""}[side.verdict.fits])
    sheet.line()
    if told.empty:
        sheet.line("The two plans are equal: same arrays, same bytes, same modelled time.", "bold")
        return
    _figures(sheet, "Modelled time", told.time)
    limits = [(n, s) for n, s in (("A", told.a), ("B", told.b)) if told.a.bottleneck != told.b.bottleneck]
    for name, side in limits:
        sheet.fact(f"limit of {name}", side.bottleneck or "not known")
    if limits:
        sheet.line()
    _figures(sheet, "Memory of a device", told.memory)
    _traffic(sheet, "What each device sends in one step (in how many collectives)", told, told.traffic)
    _arrays(sheet, told)
    _traffic(sheet, "What collectives are for (predicted)", told, told.ops)
    sheet.fact("equal", told.same)
    for words in not_in(told):
        sheet.fact("note", words)


def _figures(sheet: Sheet, title: str, rows: Sequence[Figure]) -> None:
    if not rows:
        return
    sheet.table(title, "what", "from", ">A", ">B", ">B - A")
    for r in rows:
        sheet.row(
            r.what, r.said, figure_text(r.a, r.unit), figure_text(r.b, r.unit), changed_text(r.a, r.b, r.unit)
        )
    sheet.end()


def _traffic(sheet: Sheet, title: str, told: PlanDifference, rows: Sequence[Traffic]) -> None:
    if not rows:
        return
    purposes = any(r.op for r in rows)
    sheet.table(
        title,
        *(["op", "phase"] if purposes else []),
        "over",
        "kind",
        *([] if purposes else ["from"]),
        ">A",
        ">B",
        ">B - A",
    )
    shown = sheet.shown(rows, MOST)
    for r in shown:
        what = [r.op, r.phase] if purposes else []
        sheet.row(*what, axes_text(r.axes), r.kind, *([] if purposes else [r.said]), amount_text(r.a), amount_text(r.b),
                  changed_bytes(r))  # fmt: skip
    if left := len(rows) - len(shown):
        sheet.row(f"{left} more (--json lists all)")
    sheet.end()


def _arrays(sheet: Sheet, told: PlanDifference) -> None:
    if not told.arrays:
        return
    sheet.table(f"Arrays that lie otherwise: {len(told.arrays)}", "array", "shape", "layout in A", "layout in B", ">a device",
                ">B - A", *(["because"] if sheet.piped else []))  # fmt: skip
    shown = sheet.shown(told.arrays, MOST)
    for m in shown:
        a, b = m.bytes
        held = f"{figure_text(a, 'bytes')} -> {figure_text(b, 'bytes')}"
        sheet.row(f"{m.kind} {m.path}", shapes(m), *layouts(m, told.a.mesh, told.b.mesh), held,
                  changed_text(a, b, "bytes"), *(["; ".join(how_moved(m))] if sheet.piped else []))  # fmt: skip
    if left := len(told.arrays) - len(shown):
        sheet.row(f"{left} more (--json lists all)")
    sheet.end()
    if not sheet.piped:
        why = Counter(words for m in told.arrays for words in how_moved(m))
        for words, count in sheet.shown(why.most_common(), MOST):
            sheet.point(f"{words}: {count} array{'s' * (count > 1)}", "dim")
        sheet.line()


__all__ = [
    "Figure",
    "MovedArray",
    "PlanDifference",
    "Side",
    "Traffic",
    "difference",
    "difference_page",
    "print_difference",
]
