"""A plan as one page of HTML that needs no network and no script: the answers first, then what they rest on.

The same plan gives the same bytes: nothing of the day or the machine that writes the page is in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.plans.page_rows import (
    array_tables,
    collective_time_table,
    departures,
    memory_table,
    op_table,
    purpose_table,
    traffic_table,
)
from experiments.plans.pictures.arrays import FEW, arrays, patterns
from experiments.plans.pictures.bars import memory_bars, said, sources, traffic_bars
from experiments.plans.pictures.html import Html, details, document, el, join, section
from experiments.plans.pictures.look import STYLE
from experiments.plans.pictures.mesh import mesh_pictures
from experiments.plans.pictures.timeline import timeline
from experiments.plans.words import WHOSE, bytes_text, done, duration, limits, mesh_text, percent
from sharding.finding import human
from sharding.price.target import parse_target

if TYPE_CHECKING:
    from experiments.plans.planned import Plan


def page(plan: Plan) -> str:
    """The page of a plan."""
    return document(
        f"Plan: {plan.explanation.name} on {plan.target}",
        STYLE,
        el("header", *_head(plan)),
        el("main", _cards(plan), _memory(plan), _time(plan), _traffic(plan), _waste(plan), _mesh(plan), _arrays(plan),
           _rests(plan)),
    )  # fmt: skip


def _head(plan: Plan) -> list[Html]:
    told = plan.explanation
    facts = [
        ("devices", plan.devices),
        ("mesh", mesh_text(plan)),
        ("parameters", human(told.parameters, "", 1000)),
        ("a step", f"{told.tokens:,} tokens or examples"),
        ("config", plan.config),
    ]
    rules = [el("li", el("b", "rules" if i == 0 else ""), el("code", call), " ", el("span", source, class_="dim"))
             for i, (call, source) in enumerate(told.chain)]  # fmt: skip
    return [
        el("h1", f"{told.name} on ", el("code", plan.target)),
        el("ul", *(el("li", el("b", what), words) for what, words in facts), *rules, class_="facts"),
    ]


def _cards(plan: Plan) -> Html:
    """Does it fit, how long does a step take, what limits it."""
    cards = el("div", _fits(plan), _takes(plan), _limited(plan), class_="cards")
    over = [el("p", f"Over the config's budget: {words}", class_="unnamed") for words in plan.over_budget]
    return join([cards, *over])


def _fits(plan: Plan) -> Html:
    v = plan.verdict
    word = {True: "It fits", False: "It does not fit", None: bytes_text(v.needs) if v.needs else "Unknown"}[
        v.fits
    ]
    sign = [el("p", said(v.by if v.by == "predicted" else "manual", v.by))] if v.needs is not None else []
    changes = [
        el("li", el("code", " ".join(c.words)), f": {human(c.total)} predicted",
           f", modelled step {duration(c.step)}" if c.step is not None else "")
        for c in v.changes
    ]  # fmt: skip
    what = [el("p", "What would make it fit:"), el("ul", *changes)] if changes else []
    kind = {True: "card good", False: "card bad", None: "card"}[v.fits]
    return el(
        "div",
        el("h3", "Memory"),
        el("div", word, class_="big"),
        el("p", v.says.removeprefix(f"{word}: ")),
        *sign,
        *what,
        class_=kind,
    )


def _takes(plan: Plan) -> Html:
    m = plan.modelled
    if m is None or m.step is None:
        why = m.bottleneck if m else "Nothing could be predicted, so there is nothing to model the time from."
        return el(
            "div", el("h3", "A step"), el("div", "No time", class_="big"), el("p", why), class_="card time"
        )
    parts = f"compute {duration(m.compute)}, collectives {duration(m.collectives)}"
    parts += f", of them {duration(m.hidden)} hidden" if m.hidden else ""
    parts += f"; a bubble of {percent(m.bubble)}" if m.bubble else ""
    rate = f"{human(plan.explanation.tokens / m.step, '', 1000)} tokens or examples a second"
    bound = f"; MFU at most {percent(m.mfu)}" if m.mfu is not None else ""
    return el("div", el("h3", "A step"), el("div", duration(m.step), class_="big modelled"), el("p", parts),
              el("p", f"{rate}{bound}"), el("p", said("modelled")), class_="card time")  # fmt: skip


def _limited(plan: Plan) -> Html:
    m = plan.modelled
    if m is None or m.step is None:
        return el("div", el("h3", "What limits it"), el("p", "Not known without a step time."), class_="card")
    first, _, advice = m.bottleneck.partition(": ")
    return el("div", el("h3", "What limits it"), el("p", el("strong", first)), el("p", advice), el("p", said("modelled")),
              class_="card time")  # fmt: skip


def _memory(plan: Plan) -> Html:
    refused = [
        el(
            "p",
            f"The compiler refused the step of {WHOSE[m.partitioner]}: {m.refused.message}",
            class_="unnamed",
        )
        for m in plan.made
        if m.refused
    ]
    if plan.memory is None and not any(m.memory for m in plan.made):
        return section("Memory of a device", *refused, note="Nothing is known of it: see what is missing.")
    return section("Memory of a device", *refused, memory_bars(plan), memory_table(plan))


def _time(plan: Plan) -> Html:
    m = plan.modelled
    if m is None or not m.step:
        return join(())
    note = [
        "Closed forms over the traced step, at the machine's published figures; nothing ran. ",
        said("modelled"),
    ]
    tables = details("Every op and every collective with its time", op_table(m), collective_time_table(m))
    return section("Where the time goes", timeline(plan), tables, note=note)


def _traffic(plan: Plan) -> Html:
    if not plan.moved and not any(m.totals for m in done(plan)):
        words = (
            "One device sends nothing."
            if not plan.explanation.mesh
            else "No collective is known: see what is missing."
        )
        return section("What moves", note=words)
    signs: list[str] = []
    for kind, name in sources(plan):
        signs += [said(kind, name), " "]
    note = [
        "What each device sends in one step, by the axes it is sent over; in brackets compiled over predicted. ",
        *signs,
    ]
    return section(
        "What moves",
        traffic_bars(plan),
        traffic_table(plan),
        *departures(plan),
        purpose_table(plan),
        note=note,
    )


def _waste(plan: Plan) -> Html:
    found = plan.explanation.findings
    if not found:
        return join(())
    items = [el("li", el("strong", f"{f.kind}: "), f"{f.says} ", el("em", f.change)) for f in found]
    return section("What the split wastes", el("ul", *items), note=said("predicted"))


def _mesh(plan: Plan) -> Html:
    if not plan.explanation.mesh:
        return section("The mesh", mesh_pictures(plan), note="One device: no axis has more than one.")
    note = (
        "For each axis the devices of the target in shades of their coordinate along it, pale first. Outlined and joined: "
        "the devices that the first one of the mesh communicates with over this axis, in its order."
    )
    if len(parse_target(plan.target).shape) == 3:
        note += " Each square of chips is one plane of the torus."
    return section("The mesh", mesh_pictures(plan), note=note)


def _arrays(plan: Plan) -> Html:
    few = len(plan.lies) <= FEW
    note = (
        "A block has the colours and numbers of the devices that hold it: each of them has a copy. "
        if few
        else "In full colour: the block of the first device of the mesh. "
    )
    orders = dict.fromkeys(o.order for o in plan.explanation.orders)
    note += (
        f"Positions are drawn in their natural order; they lie in the order {', '.join(orders)}."
        if orders
        else ""
    )
    return section("Every array", patterns(plan.explanation), arrays(plan.explanation), *array_tables(plan.explanation),
                   note=note)  # fmt: skip


def _rests(plan: Plan) -> Html:
    """What the figures rest on, and what is not there."""
    parts: list[Html] = []
    if plan.modelled and plan.modelled.step is not None:
        parts += [
            el("p", "The modelled time assumes:"),
            el("ul", *(el("li", words) for words in plan.modelled.assumed)),
        ]
    if lacks := limits(plan):
        parts += [el("p", "Missing:"), el("ul", *(el("li", words) for words in lacks))]
    for made in done(plan):
        spent = ", ".join(f"{what} {duration(s)}" for what, s in made.seconds.items())
        tools = ", ".join(f"{name} {version}" for name, version in made.versions.items())
        parts.append(
            el("p", said(made.partitioner, f"compiled ({WHOSE[made.partitioner]})"), f" by {tools}; {spent}")
        )
    words = (
        "Predicted: read from the trace of the step. Compiled: read from the module that the target's compiler made. "
        "Modelled: seconds from closed forms. Nothing here was measured."
    )
    return section("What this rests on", *parts, note=words)
