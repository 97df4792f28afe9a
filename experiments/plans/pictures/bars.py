"""Bars of a plan: memory by part against what a device has, and what each device sends, predicted beside compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.plans.pictures.html import Html, el, join
from experiments.plans.pictures.look import AXIS_COLOURS
from experiments.plans.words import (
    WHOSE,
    Part,
    axes_text,
    compiled_parts,
    done,
    percent,
    predicted_parts,
    ratio_text,
    side_by_side,
)
from sharding.finding import human

if TYPE_CHECKING:
    from experiments.plans.planned import Plan, Total
    from experiments.plans.words import SideBySide


def sources(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Who says something of this plan's memory and traffic: (class of its colour, its name)."""
    ours = (("predicted", "predicted"),) if plan.memory or plan.moved else ()
    return (*ours, *((m.partitioner, f"compiled ({WHOSE[m.partitioner]})") for m in done(plan)))


def said(kind: str, name: str = "") -> Html:
    """The small sign that says whose a figure is."""
    return el("span", name or kind, class_=f"said {kind}")


def memory_bars(plan: Plan) -> Html:
    """A bar for each who says how much, all to one scale, with a mark where a device's memory ends."""
    rows: list[tuple[str, str, tuple[Part, ...]]] = []
    if ours := predicted_parts(plan):
        rows.append(("predicted", "predicted", ours))
    rows += [
        (m.partitioner, f"compiled ({WHOSE[m.partitioner]})", compiled_parts(m))
        for m in done(plan)
        if m.memory
    ]
    capacity = plan.verdict.capacity
    most = max((sum(p.bytes for p in parts) for _, _, parts in rows), default=0)
    if not most:
        return join(())
    # Where the step takes a small part of the device, a scale up to the capacity would leave nothing to be seen.
    shows = capacity is not None and most > capacity / 12
    scale = max(most, capacity or 0) * 1.02 if shows else most
    cells = []
    for kind, name, parts in rows:
        total = sum(p.bytes for p in parts)
        share = f" ({percent(total / capacity)})" if capacity else ""
        cells += [el("span", name, class_=f"lab {kind}"), _stack(parts, kind, scale, capacity if shows else None),
                  el("span", f"{human(total)}{share}", class_="val")]  # fmt: skip
    keys = [el("p", *(_key(p, kind, at) for at, p in enumerate(parts) if p.bytes)) for kind, _, parts in rows]
    scale_words = (
        "" if capacity is None
        else f"The red mark is what a device has: {human(capacity)}." if shows
        else f"A device has {human(capacity)}, far to the right of this scale."
    )  # fmt: skip
    return join(
        [el("div", *cells, class_="bars"), *keys, el("p", scale_words, class_="note") if scale_words else ""]
    )


def _stack(parts: Sequence[Part], kind: str, scale: float, capacity: int | None) -> Html:
    fills, left = [], 0
    for at, part in enumerate(parts):
        if part.bytes:
            fills.append(
                _fill(left / scale, part.bytes / scale, f"fill p{at}", f"{part.name}: {human(part.bytes)}")
            )
        left += part.bytes
    mark = [el("span", class_="cap", style=f"left:{100 * capacity / scale:.2f}%")] if capacity else []
    return el("span", *fills, *mark, class_=f"track {kind}")


def _fill(left: float, width: float, class_: str, title: str) -> Html:
    return el("span", class_=class_, style=f"left:{100 * left:.2f}%;width:{100 * width:.2f}%", title=title)


def _key(part: Part, kind: str, at: int) -> Html:
    return el(
        "span", el("i", class_=f"p{at}"), el("span", f"{part.name} {human(part.bytes)}"), class_=f"key {kind}"
    )


def traffic_bars(plan: Plan) -> Html:
    """For each set of axes and kind a bar for each who says how much each device sends, all to one scale."""
    rows = side_by_side(plan)
    if not rows:
        return join(())
    most = max((r.most for r in rows), default=0) or 1
    seen = [r for r in rows if r.most >= most / 500]
    cells: list[Html] = []
    for axes in dict.fromkeys(r.axes for r in seen):
        cells.append(el("div", axes_name(axes), class_="head"))
        for r in (r for r in seen if r.axes == axes):
            cells += _kind(plan, r, most)
    left = [r for r in rows if r not in seen]
    words = f"Not drawn: {len(left)} of less than {human(most / 500)}, in the table below." if left else ""
    return join([el("div", *cells, class_="bars"), el("p", words, class_="note") if words else ""])


def _kind(plan: Plan, r: SideBySide, most: int) -> list[Html]:
    cells = []
    for at, (kind, name) in enumerate(sources(plan)):
        if kind == "predicted" and not plan.moved:
            continue
        total = r.predicted if kind == "predicted" else r.compiled[kind]
        ratio = "" if kind == "predicted" or not plan.moved else f" ({ratio_text(r.ratio(kind))})"
        label = [f"{r.kind} "] if at == 0 or not plan.moved else []
        cells += [
            el("span", *label, el("span", name, class_=kind), class_="lab"),
            el("span", _fill(0, (total.sent if total else 0) / most, "fill", _title(r, name, total)), class_=f"track {kind}"),
            el("span", f"{human(total.sent) if total else 'none'}{ratio}", class_="val"),
        ]  # fmt: skip
    return cells


def _title(r: SideBySide, name: str, total: Total | None) -> str:
    return f"{r.kind} over {axes_text(r.axes)}, {name}: {f'{total.times} times, {human(total.sent)}' if total else 'none'}"


def axes_name(axes: Sequence[str]) -> Html:
    """Axes, each with its colour."""
    parts: list[Html] = []
    for axis in axes:
        parts += [el("i", style=f"color:{AXIS_COLOURS.get(axis, 'inherit')}"), el("span", axis)]
    return el("span", *parts, class_="key")
