"""Plans as tables for a terminal of 120 columns; every row whole and on one line when piped.

What a user decides by comes first: does it fit, how long does a step take, what limits it. Predicted, compiled and modelled
figures have columns of their own, and each says which it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.plans.console import Sheet
from experiments.plans.tables_traffic import MOST, print_traffic
from experiments.plans.words import (
    MEMORY_ROWS,
    NOTHING,
    WHOSE,
    amount,
    axes_text,
    bytes_text,
    compiled_parts,
    done,
    duration,
    limits,
    mesh_text,
    percent,
    predicted_parts,
    summed_parts,
)
from sharding.finding import human

if TYPE_CHECKING:
    from experiments.plans.planned import Made, Plan


def print_plan(plan: Plan) -> None:
    """Print a plan."""
    sheet = Sheet()
    _head(sheet, plan)
    _memory(sheet, plan)
    print_traffic(sheet, plan)
    _ops(sheet, plan)
    _collective_times(sheet, plan)
    _findings(sheet, plan)
    _rests(sheet, plan)


def _head(sheet: Sheet, plan: Plan) -> None:
    """Who and where, then the three answers."""
    told, verdict, m = plan.explanation, plan.verdict, plan.modelled
    count = human(told.parameters, "", 1000)
    sheet.line(f"{told.name}: {count} parameters on {plan.devices} ({plan.target})", "bold")
    sheet.fact("config", plan.config)
    sheet.fact("mesh", mesh_text(plan))
    sheet.fact("rules", " | ".join(call for call, _ in told.chain) or "none")
    sheet.line()
    style = {True: "bold green", False: "bold red", None: "bold"}[verdict.fits]
    sheet.fact("verdict", verdict.says, style)
    for at, change in enumerate(verdict.changes):
        step = f", modelled step {duration(change.step)}" if change.step is not None else ""
        what = f"{' '.join(change.words)}   {human(change.total)} predicted{step}"
        sheet.fact("would fit" if at == 0 else "", what, "green")
    if m is None or m.step is None:
        sheet.fact("step time", f"not modelled: {m.bottleneck if m else 'nothing could be predicted'}")
    else:
        parts = [f"compute {duration(m.compute)}", f"collectives {duration(m.collectives)}"]
        parts += [f"of them {duration(m.hidden)} hidden"] if m.hidden else []
        parts += [f"bubble {percent(m.bubble)}"] if m.bubble else []
        tokens = f"; {human(told.tokens / m.step, '', 1000)} tokens or examples a second" if m.step else ""
        sheet.fact("step time", f"{duration(m.step)} modelled ({', '.join(parts)}){tokens}", "bold")
        sheet.fact("MFU", f"at most {percent(m.mfu)} (modelled bound)" if m.mfu is not None else "no bound")
        sheet.fact("limit", m.bottleneck, "bold")
    if n := sum(1 for made in done(plan) for d in made.differences if not d.name):
        sheet.fact(
            "unnamed",
            f"{n} departures of the compiled from the predicted step have no name: see below",
            "red",
        )
    sheet.line()


def _memory(sheet: Sheet, plan: Plan) -> None:
    ours = predicted_parts(plan)
    made = {m.partitioner: compiled_parts(m) for m in done(plan) if m.memory}
    if not ours and not made:
        return
    capacity = plan.verdict.capacity
    sheet.table(
        f"Memory of a device{f', which has {human(capacity)}' if capacity else ''}",
        "part", ">predicted", *(f">compiled\n({WHOSE[p]})" for p in made),
    )  # fmt: skip
    for name, mine, theirs in MEMORY_ROWS:
        cells = [summed_parts(ours, mine), *(summed_parts(parts, theirs) for parts in made.values())]
        if any(cells):
            sheet.row(name, *map(bytes_text, cells))
        for part in ours if mine else ():
            if part.key in mine and part.bytes:
                sheet.row(f"  {part.name}", human(part.bytes), *[""] * len(made), style="dim")
    totals = [sum(p.bytes for p in parts) if parts else None for parts in (ours, *made.values())]
    sheet.row("total", *map(bytes_text, totals), style="bold")
    if ours and made:
        sheet.row(
            "compiled / predicted",
            "",
            *(f"{t / totals[0]:.3f}" if t and totals[0] else NOTHING for t in totals[1:]),
        )
    if capacity:
        sheet.row(
            "of the machine's memory", *(percent(t / capacity) if t is not None else NOTHING for t in totals)
        )
    sheet.end()
    if plan.memory and plan.memory.host:
        sheet.line(f"and {human(plan.memory.host)} of the host's memory for each device (predicted)\n")
    for m in plan.made:
        if m.refused:
            used = (
                f" ({human(m.refused.used)} of {human(m.refused.capacity)})"
                if m.refused.used and m.refused.capacity
                else ""
            )
            sheet.line(
                f"The compiler refused the step of {WHOSE[m.partitioner]}{used}: {m.refused.message}\n", "red"
            )


def _ops(sheet: Sheet, plan: Plan) -> None:
    m = plan.modelled
    if m is None or not any(o.seconds for o in m.ops):
        return
    sheet.table("Compute of one step (modelled)", "op", "what", "phase", ">times", ">FLOPs", ">memory traffic", ">time",
                ">of the step", "limited by")  # fmt: skip
    share = lambda s: percent(s / m.step) if m.step and s is not None else NOTHING
    for o in sheet.shown(m.ops, MOST):
        where = f"{o.phase}, {o.layers} layers" if o.layers else o.phase
        work = human(o.flops, "", 1000) if o.flops else NOTHING
        sheet.row(o.op or "no named op", f"{o.kind} {o.dtype}", where, f"{o.times:,}", work,
                  human(o.bytes), duration(o.seconds), share(o.seconds), o.limit)  # fmt: skip
    left = m.ops[len(sheet.shown(m.ops, MOST)) :]
    if left:
        spent = sum(o.seconds or 0.0 for o in left)
        sheet.row(f"{len(left)} more", "", "", f"{sum(o.times for o in left):,}", human(sum(o.flops for o in left), "", 1000),
                  human(sum(o.bytes for o in left)), duration(spent), share(spent), "")  # fmt: skip
    sheet.end()


def _collective_times(sheet: Sheet, plan: Plan) -> None:
    m = plan.modelled
    if m is None or not any(c.seconds for c in m.moved):
        return
    sheet.table("Collectives of one step (modelled)", "over", "kind", "for", "phase", ">times", ">time", ">hidden",
                *([">inside", ">across", "path"] if sheet.piped else [">of the step"]))  # fmt: skip
    share = lambda s: percent(s / m.step) if m.step and s is not None else NOTHING
    for c in sheet.shown(m.moved, MOST):
        where = f"{c.phase}, {c.layers} layers" if c.layers else c.phase
        rest = [duration(c.inside), duration(c.across), c.path] if sheet.piped else [share(c.seconds)]
        hidden = duration(c.hidden) if c.hidden else NOTHING
        sheet.row(
            axes_text(c.axes),
            c.kind,
            c.op or "no named op",
            where,
            f"{c.times:,}",
            duration(c.seconds),
            hidden,
            *rest,
        )
    left = m.moved[len(sheet.shown(m.moved, MOST)) :]
    if left:
        spent = sum(c.seconds or 0.0 for c in left)
        rest = [share(spent)] if not sheet.piped else []
        sheet.row(
            f"{len(left)} more", "", "", "", f"{sum(c.times for c in left):,}", duration(spent), "", *rest
        )
    sheet.end()
    paths = dict.fromkeys((axes_text(c.axes), c.path) for c in m.moved)
    for over, path in () if sheet.piped else paths:
        sheet.point(f"{over}: {path}")
    sheet.line()


def _findings(sheet: Sheet, plan: Plan) -> None:
    if not plan.explanation.findings:
        return
    sheet.line("What the split wastes (predicted)", "bold")
    for f in plan.explanation.findings:
        sheet.point(f"{f.kind}: {f.text()}", "red" if f.severity == "error" else "yellow")
    sheet.line()


def _rests(sheet: Sheet, plan: Plan) -> None:
    """What the figures rest on, and what is not there."""
    if plan.modelled and plan.modelled.step is not None:
        sheet.line("The modelled time assumes", "bold")
        for words in plan.modelled.assumed:
            sheet.point(words)
    if lacks := limits(plan):
        sheet.line("Missing", "bold")
        for words in lacks:
            sheet.point(words)
    for made in done(plan):
        sheet.line(_made_with(made), "dim")


def _made_with(made: Made) -> str:
    spent = ", ".join(f"{what} {duration(s)}" for what, s in made.seconds.items())
    tools = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    total = amount(sum(t.times for t in made.totals), sum(t.sent for t in made.totals))
    return f"compiled ({WHOSE[made.partitioner]}): {total} in all; {tools}; {spent} here"
