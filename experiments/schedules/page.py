"""A schedule as one page of HTML that needs no network and no script: what it costs, both clocks drawn, and each stage.

The same schedule gives the same bytes: nothing of the day or the machine that writes the page is in it.
"""

from __future__ import annotations

from experiments.plans.pictures.html import Html, document, el, section, table
from experiments.plans.pictures.look import STYLE
from experiments.schedules.seen import Seen, backward, kept, percent
from experiments.schedules.svg import TASKS, picture
from sharding.pipeline.clocks import Clock

OWN = """
.scroll svg{max-width:none}
"""


def page(seen: Seen) -> str:
    """The page of a schedule."""
    return document(
        f"{seen.name} on {seen.grid.stages} stages",
        f"{STYLE}{TASKS}{OWN}",
        el("header", *_head(seen)),
        el("main", _cards(seen), _clocks(seen), _stages(seen), _rests(seen)),
    )


def _head(seen: Seen) -> list[Html]:
    grid, costs = seen.grid, seen.costs
    facts = [
        ("stages", str(grid.stages)),
        ("micro-batches", str(grid.microbatches)),
        ("chunks a stage", str(grid.chunks)),
        ("ticks", str(grid.ticks)),
        ("costs", f"F {costs.forward:g}, B {costs.inputs:g}, W {costs.weights:g}"),
    ]
    return [
        el("h1", f"{seen.name} on {grid.stages} stages"),
        el(
            "ul",
            *(el("li", el("b", what), words) for what, words in facts),
            el("li", el("b", "config"), el("code", f"pipeline={seen.expression}")),
            class_="facts",
        ),
    ]


def _cards(seen: Seen) -> Html:
    """The bubble by each clock, what is kept, what is sent."""
    sent = seen.messages
    return el(
        "div",
        _clock_card("Lockstep: one SPMD program", seen.lockstep),
        _clock_card("Independent stages", seen.independent),
        el("div", el("h3", "Stash"), el("div", f"{max(seen.stash)}", class_="big"), el("p", f"{kept(seen)}, at most"),
           class_="card"),
        el("div", el("h3", "Messages"), el("div", str(sent.forward + sent.backward), class_="big"),
           el("p", f"{sent.forward} forward, {sent.backward} backward, in a step"), class_="card"),
        class_="cards",
    )  # fmt: skip


def _clock_card(title: str, clock: Clock) -> Html:
    words = f"bubble; a step takes {clock.makespan:.6g}, of which {clock.work:.6g} are work"
    return el("div", el("h3", title), el("div", percent(clock.bubble), class_="big modelled"), el("p", words),
              class_="card time")  # fmt: skip


def _clocks(seen: Seen) -> Html:
    note = (
        "Both clocks to one scale; a bar has the number of its micro-batch. In lockstep every stage spends the time of each "
        "kind of task that any stage does in a tick; independent stages do theirs as soon as what they need is there."
    )
    box = el(
        "div", picture(seen), class_="scroll", tabindex="0", role="region", aria_label="both clocks, drawn"
    )
    return section("Both clocks", box, note=note)


def _stages(seen: Seen) -> Html:
    """What each stage keeps, and where it waits."""
    rows = []
    for stage, most in enumerate(seen.stash):
        mine = [span for span in seen.independent.spans if span.stage == stage]
        first, last = min(span.start for span in mine), max(span.end for span in mine)
        parts = ", ".join(str(part) for part, place in enumerate(seen.grid.path) if place.stage == stage)
        rows.append(
            [str(stage), parts, str(most), f"{most / seen.grid.chunks:g}", f"{first:.6g}", f"{last:.6g}",
             f"{max(round(last - first - seen.independent.work, 9), 0.0):.6g}"]
        )  # fmt: skip
    heads = [
        ">stage",
        "parts of the layers",
        ">stash",
        ">in micro-batches",
        ">begins",
        ">ends",
        ">waits between",
    ]
    note = f"Stash: {kept(seen)}. Begins, ends and waits: by the clock of independent stages."
    return section("Stages", table(heads, rows), note=note)


def _rests(seen: Seen) -> Html:
    message = f"A message takes {seen.message:g} between independent stages and nothing in lockstep."
    return section(
        "What this rests on",
        el("ul", *(el("li", words) for words in (
            f"B is {backward(seen)}. The costs are those of a whole stage; a chunk's are 1/{seen.grid.chunks} of them."
            if seen.grid.chunks > 1 else f"B is {backward(seen)}.",
            f"{message} All stages take the same; embedding, unembedding and the update are left out.",
            "Bubble: the part of the step in which a stage does nothing of use, (step - work) / step.",
            "Stash: counted from the tick of F to that of the last use, B or W, both included.",
        ))),
        note="Modelled: from the table of tasks and the costs given; nothing ran.",
    )  # fmt: skip
