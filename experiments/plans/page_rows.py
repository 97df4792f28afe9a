"""The tables of a plan's page: every figure behind its pictures, whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.plans.pictures.html import Html, details, el, join, table
from experiments.plans.words import (
    MEMORY_ROWS,
    NOTHING,
    WHOSE,
    axes_text,
    bytes_text,
    compiled_parts,
    difference_text,
    done,
    duration,
    named,
    per_layer,
    percent,
    predicted_parts,
    ratio_text,
    side_by_side,
    summed_parts,
    total_row,
    what_for,
)
from sharding.finding import human

if TYPE_CHECKING:
    from experiments.explanation import Explanation, Line
    from experiments.plans.planned import Made, Plan, Total
    from experiments.plans.words import SideBySide
    from sharding.price.timing import Modelled

OPEN = 12
"""Rows of a long table that stand open; the rest is folded."""


def memory_table(plan: Plan) -> Html:
    """What can be compared of predicted and compiled memory, a column for each."""
    ours = predicted_parts(plan)
    made = {m.partitioner: compiled_parts(m) for m in done(plan) if m.memory}
    heads = ["part", *([">predicted"] if ours else []), *(f">compiled ({WHOSE[p]})" for p in made)]
    columns = [*([ours] if ours else []), *made.values()]
    rows = []
    for name, mine, theirs in MEMORY_ROWS:
        keys = [*([mine] if ours else []), *[theirs] * len(made)]
        cells = [summed_parts(parts, k) for parts, k in zip(columns, keys, strict=True)]
        if any(cells):
            rows.append([name, *map(bytes_text, cells)])
    totals = [sum(p.bytes for p in parts) for parts in columns]
    rows.append([el("strong", words) for words in ("total", *map(human, totals))])
    if ours and made:
        rows.append(
            [
                "compiled / predicted",
                "",
                *(ratio_text(t / totals[0] if totals[0] else None) for t in totals[1:]),
            ]
        )
    if capacity := plan.verdict.capacity:
        rows.append([f"of the device's {human(capacity)}", *(percent(t / capacity) for t in totals)])
    host = plan.memory.host if plan.memory else 0
    words = f"and {human(host)} of the host's memory for each device (predicted)" if host else ""
    return join([table(heads, rows), el("p", words) if words else ""])


def traffic_table(plan: Plan) -> Html:
    """Collectives by axes and kind: predicted, compiled, ratio, and the names of the differences."""
    rows = side_by_side(plan)
    if not rows:
        return join(())
    has = list(rows[0].compiled)
    differ = ["differences"] if "manual" in has and plan.moved else []
    ratio = [">ratio"] if plan.moved else []
    heads = ["over", "kind", *([">predicted"] if plan.moved else []),
             *(h for p in has for h in (f">compiled ({WHOSE[p]})", *ratio)), *differ]  # fmt: skip
    body = [
        [
            axes_text(r.axes),
            r.kind,
            *_cells(plan, r),
            *([_names(named(plan, r.axes, r.kind))] if differ else []),
        ]
        for r in rows
    ]
    foot = ["all", "", *_cells(plan, total_row(plan, rows)), *([""] if differ else [])]
    return table(heads, body, "What each device sends in one step (in how many collectives)", foot)


def _names(found: tuple[str, ...]) -> Html:
    return join(el("span", n, " ", class_="unnamed" if n == "NO NAME" else None) for n in found)


def _cells(plan: Plan, r: SideBySide) -> list[str]:
    cells = [_amount(r.predicted)] if plan.moved else []
    for p, total in r.compiled.items():
        cells += [_amount(total), *([ratio_text(r.ratio(p))] if plan.moved else [])]
    return cells


def _amount(total: Total | None) -> str:
    return f"{human(total.sent)} ({total.times:,})" if total else NOTHING


def departures(plan: Plan) -> list[Html]:
    """Where the compiled steps depart from the predicted one."""
    return [_unpredicted(m) if m.partitioner == "auto" else _departures(plan, m) for m in done(plan)]


def _departures(plan: Plan, made: Made) -> Html:
    if not plan.moved:
        return join(())
    if not made.differences:
        return el("p", "The compiled step of shardlab has the predicted collectives, byte for byte.")
    rows = sorted(made.differences, key=lambda d: -max(d.predicted[1], d.compiled[1]))
    items = [el("li", difference_text(d), class_=None if d.name else "unnamed") for d in rows]
    return join(
        [el("h3", "Where the compiled step of shardlab departs from what was predicted"), el("ul", *items)]
    )


def _unpredicted(made: Made) -> Html:
    rows = sorted(made.differences, key=lambda d: -d.compiled[1])
    if not rows:
        return join(())
    body = [
        [axes_text(d.axes), d.kind, f"{d.compiled[0]:,}", human(d.compiled[1]),
         el("code", d.source) if d.source else "no line known"]
        for d in rows
    ]  # fmt: skip
    heads = ["over", "kind", ">times", ">each device sends (compiled)", "belongs to"]
    return _folded("Unpredicted collectives: XLA's partitioner put them there", heads, body)


def arrow(text: str) -> Html:
    """An op in code letters, its arrow in one piece."""
    first, *rest = text.split("->")
    return el("code", first, *(part for words in rest for part in (el("span", "->", class_="one"), words)))


def purpose_table(plan: Plan) -> Html:
    """What every predicted collective is for."""
    if not plan.moved:
        return join(())
    heads = ["op", "over", "kind", "phase", ">times", ">a layer", ">a step", "asked for by", "axis used by"]
    rows = [
        [arrow(what_for(m)), axes_text(m.axes), m.kind, f"{m.phase}, {m.layers} layers" if m.layers else m.phase,
         f"{m.times:,}", per_layer(m.sent, m.layers), human(m.sent), el("code", m.source), el("code", ", ".join(m.rules))]
        for m in plan.moved
    ]  # fmt: skip
    return _folded("What they are for (predicted)", heads, rows)


def _folded(title: str, heads: list[str], rows: list[list[str | Html]]) -> Html:
    """The first rows of a table open, the others folded."""
    if len(rows) <= OPEN + 2:
        return table(heads, rows, title)
    return join(
        [table(heads, rows[:OPEN], title), details(f"{len(rows) - OPEN} more", table(heads, rows[OPEN:]))]
    )


def op_table(m: Modelled) -> Html:
    """Modelled time of every kind of op in every place."""
    share = lambda s: percent(s / m.step) if m.step and s is not None else NOTHING
    heads = [
        "op",
        "what",
        "phase",
        ">times",
        ">FLOPs",
        ">memory traffic",
        ">time",
        ">of the step",
        "limited by",
    ]
    rows = [
        [o.op or "no named op", f"{o.kind} {o.dtype}", f"{o.phase}, {o.layers} layers" if o.layers else o.phase, f"{o.times:,}",
         human(o.flops, "", 1000) if o.flops else NOTHING, human(o.bytes), duration(o.seconds), share(o.seconds), o.limit]
        for o in m.ops
    ]  # fmt: skip
    return table(heads, rows, "Compute of one step (modelled)")


def collective_time_table(m: Modelled) -> Html:
    """Modelled time of every kind of collective in every place, with the links that carry it."""
    share = lambda s: percent(s / m.step) if m.step and s is not None else NOTHING
    heads = ["over", "kind", "for", "phase", ">times", ">time", ">within islands", ">between islands", ">hidden",
             ">of the step", "links"]  # fmt: skip
    rows = [
        [axes_text(c.axes), c.kind, c.op or "no named op", f"{c.phase}, {c.layers} layers" if c.layers else c.phase,
         f"{c.times:,}", duration(c.seconds), duration(c.inside), duration(c.across), duration(c.hidden), share(c.seconds),
         c.path]
        for c in m.moved
    ]  # fmt: skip
    return table(heads, rows, "Collectives of one step (modelled)")


KINDS = (
    ("parameter", "Parameters"),
    ("gradient", "Gradients"),
    ("optimizer", "Optimizer state"),
    ("batch", "Batch"),
    ("activation", "Activations"),
    ("inside", "Inside attention"),
)


def array_tables(told: Explanation) -> list[Html]:
    """Every array in words: its layout, and the rule that put it there."""
    made = []
    for kind, title in KINDS:
        if lines := told.of(kind):
            heads = ["array", "shape", "layout", ">a device", "placed by"]
            held = (
                f", {human(sum(x.bytes_per_device for x in lines))} a device"
                if kind in told.bytes_per_device
                else ""
            )
            made.append(details(f"{title} as a table: {len(lines)}{held}", table(heads, map(_array, lines))))
    return made


def _array(line: Line) -> list[str | Html]:
    copies = f"{line.copies} x " if line.copies > 1 else ""
    name = [el("code", line.path), f" {line.source}"] if line.source else [el("code", line.path)]
    gathered = f" (gathered over {', '.join(line.gathered)} for use: {line.in_use})" if line.gathered else ""
    split = {(n, a) for n, axes in zip(line.names, line.dims, strict=True) for a in axes}
    placed = [f"{p.name}/{p.axis} by {p.rule} {p.source}" for p in line.placed if (p.name, p.axis) in split]
    why = "; ".join([*placed, *([f"whole: {line.whole}"] if line.whole else []), *line.notes])
    away = " of the host's" if line.memory == "host" else ""
    return [join(name), f"{copies}{'x'.join(map(str, line.shape)) or 'scalar'} {line.dtype}",
            join([el("code", line.layout), gathered]), f"{human(line.bytes_per_device)}{away}", why]  # fmt: skip
