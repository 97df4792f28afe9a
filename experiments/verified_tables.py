"""Verifications for a terminal: a line a case as it comes, then what was found."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from experiments.progress import clock, terminal
from experiments.verified import KINDS, Outcome, Verified

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.progress import Progress
    from sharding.proof.bisect import Departure
    from sharding.proof.budget import Compared


def print_case(show: Progress, outcome: Outcome, at: int, of: int) -> None:
    """One line: the case, its worst error of each kind with the part of the budget that it takes."""
    show.reached(at)
    if outcome.refused:
        return
    verdict = "DEPARTS" if outcome.departs else "coarse" if outcome.coarse else "agrees"
    said = "  ".join(f"{kind} {_cell(outcome.worst[kind])}" for kind in KINDS if kind in outcome.worst)
    if outcome.departure:
        said = f"{_PHASES[outcome.departure.phase]}: {outcome.departure.what}"
    show.line(
        f"{verdict:8}{outcome.case.title:36} {said}{outcome.failed[:200]}", "red" if outcome.departs else ""
    )


def _cell(c: Compared) -> str:
    """`2.1e-07 (8%)`: the error, and its part of the budget."""
    part = "inf" if math.isinf(c.share) else f"{c.share:.0%}" if c.share < 100 else f"{c.share:.0f}x"
    return f"{c.error:.1e} ({part})"


def print_verified(made: Verified, seconds: float) -> None:
    """The verdict, the worst array of all, what was refused and where it departs."""
    console = terminal(highlight=False, soft_wrap=True, emoji=False)
    checked, refused = made.checked, [o for o in made.outcomes if o.refused]
    console.print()
    if made.departed:
        titles = "; ".join(o.case.title for o in made.departed)
        console.print(f"[bold red]{len(made.departed)} of {len(checked)} depart from one device[/]: {titles}")
    elif not made.coarse:
        meshes = len({o.case.mesh for o in checked})
        console.print(
            f"[bold]All {len(checked)} agree with one device[/] ({meshes} meshes; {made.leaves} arrays each, {made.steps} "
            f"updates of {made.rows} rows, {made.precision}, {clock(seconds)})"
        )
    _rounding(console, made)
    for kind in KINDS:
        worst = [(o.worst[kind], o) for o in checked if kind in o.worst]
        if worst:
            c, o = max(worst, key=lambda pair: pair[0].share)
            what = f"{c.path}, {o.case.title}"
            console.print(f"  worst {kind:10} {c.error:.1e} of {c.allowed:.1e} allowed: {what}", markup=False)
    if refused:
        console.print(
            f"{len(refused)} not legal for these rules and sizes, such as {refused[0].case.title}:",
            markup=False,
        )
        console.print(textwrap.indent(refused[0].refused, "  "), markup=False)
    told: set[Departure] = set()
    for o in made.departed:
        if o.failed:
            console.print(f"\n[bold]{o.case.title}[/] could not run", highlight=False)
            console.print(f"  {o.failed}", markup=False)
        if o.departure and o.departure not in told:  # a trace fails on every mesh alike
            told.add(o.departure)
            console.print(f"\n[bold]{o.case.title}[/] departs {_PHASES[o.departure.phase]}")
            _departure(console, o.departure)
        elif o.uneven:
            console.print(
                f"\n[bold]{o.case.title}[/]: devices hold different values of {', '.join(o.uneven[:4])}"
            )


def _rounding(console: Console, made: Verified) -> None:
    """What rounding keeps from being judged."""
    if made.coarse:
        titles = "; ".join(o.case.title for o in made.coarse)
        own = made.within.get("gradient")
        why = (
            f"A gradient is off by no more than the rounding of {own}, in which the model computes by itself, may make of it. "
            f"Verify the model without its own casts."
            if own
            else f"A gradient is off by more than half of its largest entry, which the rounding of {made.precision} may make "
            f"here. Verify in float32 (--model.dtype float32) or with --x64."
        )
        console.print(
            f"[bold]{len(made.coarse)} of {len(made.checked)} too coarse to judge[/]: {titles}. {why}"
        )
    for dtype in sorted(set(made.within.values())):
        kinds = [kind for kind in KINDS if made.within.get(kind) == dtype]
        who = "The model" if "gradient" in kinds else "A metric" if kinds == ["loss"] else "The optimizer"
        console.print(
            f"{who} computes in {dtype} by itself, whatever it is given: the budget of each {', '.join(kinds)} array that this "
            f"moves holds that rounding, and smaller errors go unseen."
        )
    if made.types_fixed:
        console.print(made.types_fixed, markup=False)
    if made.clips:
        norms = ", ".join(f"{c:.2g}" for c in made.clips)
        console.print(
            f"The config clips gradients at {made.clip:g}, which does not both halve those of the first update here and leave "
            f"another's as they are: a split that does not clip could agree. All are clipped at {norms} instead (a norm an "
            f"update), which binds in {_updates(made.clipped)}."
        )
    elif math.isfinite(made.clip) and len(made.clipped) in (0, made.steps):
        never = "every" if made.clipped else "no"
        console.print(
            f"The config's clip of {made.clip:g} binds in {never} update here, and one device does not stay finite with "
            f"another: whether a split {'leaves smaller gradients alone' if made.clipped else 'clips'} is not seen."
        )
    if made.casts_unmeasured:
        console.print(made.casts_unmeasured, markup=False)
    if made.rounding:
        console.print(
            f"Nothing but rounding is the gradient of {', '.join(made.rounding)}: it does not change the loss, and the sign of "
            f"its updates is arbitrary, so that they are hardly judged.",
            markup=False,
        )


def _updates(numbers: tuple[int, ...]) -> str:
    """`update 1`, `updates 1, 3 and 5`."""
    *most, last = map(str, numbers)
    return f"updates {', '.join(most)} and {last}" if most else f"update {last}"


_PHASES = {
    "trace": "at trace time: it cannot be traced as it is split",
    "initial": "before the first update",
    "forward": "in the forward pass",
    "backward": "in the backward pass (all named ops of the forward pass agree)",
    "gradient": "in a gradient (all named ops agree, forward and backward)",
    "metric": "in a metric (all named ops and gradients agree)",
    "update": "in the update (all gradients agree)",
    "unplaced": "at a place that was not found",
}


def _departure(console: Console, d: Departure) -> None:
    say = lambda text: console.print(text, markup=False)
    if d.phase == "unplaced":
        say(f"  {d.what}")
        return
    say(f"  first    {d.what}")
    if d.phase != "trace":
        say(f"  lies     {d.layout}")
        for placed in d.placed:
            say(f"           {placed}")
        say(f"  error    {d.error:.1e} of its {d.norm}, where rounding may make {d.allowed:.1e}")
    say(f"  looks as {d.looks}")
