"""Where a split parts from one device though every named op agrees: the first update, and in it the first that departs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sharding.layout import Layout
from sharding.proof.alike import common, decay
from sharding.proof.bisect import Departure, placed
from sharding.proof.budget import Budget, Compared, norm_of, typical
from sharding.proof.diagnose import Error, diagnose
from sharding.proof.double import unit
from sharding.proof.trial import Copies, Going, Leaves, Trial

PARTS = {"gradient": "gradients", "loss": "metrics", "parameter": "params", "optimizer": "optimizer"}
"""Kind of array -> where a trial holds it, in the order in which an update makes them."""


class One(NamedTuple):
    """What one device made (a trial of each, or one under way): in the working precision, in double, and in double without the
    step's own casts; the last two are the same where it has none.
    """

    single: Any
    exact: Any
    wide: Any


def compared(budget: Budget, found: Trial, one: One) -> dict[str, list[Compared]]:
    """Kind -> every array of a trial against those of one device."""
    exact = one.exact
    moved = {p: typical(w.astype(np.float64) - exact.initial[p]) for p, w in exact.params.items()}
    rounding = budget.arbitrary(one.single.gradients, one.wide.gradients)

    def against(kind: str, arbitrary: Collection[str] = (), unsigned: Collection[str] = ()) -> list[Compared]:
        mine, single, two, wide = (leaves(trial, kind) for trial in (found, *one))
        return budget.compare(kind, mine, single, two, moved, arbitrary, wide, unsigned)

    made = {"gradient": against("gradient", rounding), "loss": against("loss")}
    unsure = rounding | {c.path for c in made["gradient"] if c.coarse}
    resting = {at for at in exact.optimizer if any(f"'{p}'" in at for p in unsure)}
    signs = {c.path for c in made["gradient"] if c.casts}
    made |= {"parameter": against("parameter", unsure, signs), "optimizer": against("optimizer", resting)}
    first = _first_metrics(budget, found, one)
    made["loss"] = [max(pair, key=lambda c: c.share) for pair in zip(made["loss"], first, strict=True)]
    return made


def own_casts(budget: Budget, one: One) -> dict[str, str]:
    """Kind of array -> the coarsest dtype of the step's own casts that moves an array of it; no entry where none does."""
    made = compared(budget, one.exact if budget.double else one.single, one) if budget.casts else {}
    found = {kind: {c.casts for c in arrays if c.casts} for kind, arrays in made.items()}
    return {kind: max(to, key=unit) for kind, to in found.items() if to}


def _first_metrics(budget: Budget, found: Trial, one: One) -> list[Compared]:
    """The metrics of the first update alone: made before the optimizer casts anything, so without room for its casts."""
    mine, single, exact, wide = (leaves(t, "loss") for t in (found, *one))
    begun = lambda x, rest: {p: np.concatenate([v[:1], rest[p][1:]]) for p, v in x.items() if p in rest}
    alone = begun(mine, exact if budget.double else single)
    return budget.compare("loss", alone, single, exact, wide=begun(wide, exact))


def leaves(trial: Trial, kind: str) -> Leaves:
    """The arrays of a kind; of the metrics, each with an entry an update."""
    if kind != "loss":
        return getattr(trial, PARTS[kind])
    return {name: np.array([seen[name] for seen in trial.metrics]) for name in trial.metrics[0]}


def departing_update(
    found: Going, one: One, batches: Sequence[Mapping[str, np.ndarray]], budget: Budget
) -> Departure | None:
    """The leaf that departs most after the first update after which one departs; None when none ever does.

    All trials are begun from the same parameters and not updated yet.
    """
    before: tuple[Trial, Trial] | None = None
    for at, batch in enumerate(batches, 1):
        trials = {}
        for going in dict.fromkeys((found, *one)):
            going.update(batch)
            trials[going] = going.trial()
        now = One(*(trials[going] for going in one))
        mine, want = trials[found], now.exact if budget.double else now.single
        for kind, made in compared(budget, mine, now).items():
            if wrong := [c for c in made if c.departs or f"{kind} {c.path}" in mine.uneven]:
                worst = max(wrong, key=lambda c: c.share)
                told = _of_metric if kind == "loss" else _of_leaf
                return told(found, worst, (mine, want), before, at)
        before = mine, want
    return None


def _of_leaf(
    found: Going, worst: Compared, now: tuple[Trial, Trial], before: tuple[Trial, Trial] | None, at: int
) -> Departure:
    """A parameter's gradient, or a leaf of the state. Of a parameter, what the last update made of it is looked at: beside
    its own values that is small.
    """
    step, kind = found.ready.step, worst.kind
    mine, right = (leaves(t, kind)[worst.path] for t in now)
    path = next((p for p in step.layouts if f"'{p}'" in worst.path or p == worst.path), "")
    lies = step.layouts.get(path)
    role = {"gradient": "gradient", "parameter": "param", "optimizer": "optimizer"}[kind]
    fits = lies is not None and mine.ndim == len(lies.param.names)
    layout = getattr(lies, role) if fits else Layout(("",) * mine.ndim, ((),) * mine.ndim)
    axes, mine = now[0].uneven.get(f"{kind} {worst.path}", Copies((), mine))
    types, sizes, shared = found.ready.types, step.split.layouts.sizes, ""
    if kind == "parameter":
        was = [t.params[path] for t in before] if before else [t.initial[path] for t in now]
        mine, right = mine - was[0], right - was[1]
        shared = decay(Error(mine, right, layout, sizes, worst.allowed, axes), was[1])
    elif kind == "gradient" and not axes:
        shared = _shared(found, now)
    looks = shared or diagnose(Error(mine, right, layout, sizes, worst.allowed, axes, types=types))
    phase = "gradient" if kind == "gradient" else "update"
    what = f"the {'gradient of' if kind == 'gradient' else kind} {worst.path}"
    if phase == "update":
        what += f" after {_nth(at)}"
    norm = norm_of(kind)
    return Departure(phase, what, layout.text(), placed(layout), worst.error, worst.allowed, looks, norm)


def _shared(found: Going, now: tuple[Trial, Trial]) -> str:
    """What all gradients together look like, where one factor explains them all."""
    step = found.ready.step
    whole = Layout((), ())
    pairs = [(g, now[1].gradients[p]) for p, g in now[0].gradients.items() if p in now[1].gradients]
    norms = now[0].metrics[0]["grad_norm"], now[1].metrics[0]["grad_norm"]
    return common([Error(f, w, whole, step.split.layouts.sizes, 0.0) for f, w in pairs], norms)


def _of_metric(
    found: Going, worst: Compared, now: tuple[Trial, Trial], before: tuple[Trial, Trial] | None, at: int
) -> Departure:
    """A metric of the last update, whose gradients all agree if it is the first."""
    mine, right = (np.array(t.metrics[-1][worst.path]) for t in now)
    scalar = Layout((), ())
    sizes, types = found.ready.step.split.layouts.sizes, found.ready.types
    looks = diagnose(Error(mine, right, scalar, sizes, worst.allowed, types=types))
    if worst.path == "grad_norm":
        looks += "; it is common to all gradients: they are clipped by it, and what follows from it departs as well"
    what = f"the metric {worst.path} of {_nth(at)}"
    return Departure("metric", what, "one number", (), worst.error, worst.allowed, looks)


def _nth(at: int) -> str:
    return "the first update" if at == 1 else f"update {at}"
