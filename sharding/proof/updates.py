"""Where a split parts from one device though every named op agrees: the first update, and in it the first that departs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from sharding.layout import Layout
from sharding.proof.bisect import Departure, placed
from sharding.proof.budget import Budget, Compared, typical
from sharding.proof.diagnose import Error, common, diagnose
from sharding.proof.trial import Copies, Going, Leaves, Trial

PARTS = {"gradient": "gradients", "loss": "metrics", "parameter": "params", "optimizer": "optimizer"}
"""Kind of array -> where a trial holds it, in the order in which an update makes them."""


def compared(budget: Budget, found: Trial, single: Trial, exact: Trial) -> dict[str, list[Compared]]:
    """Kind -> every array of a trial against one device in the working precision and in double."""
    moved = {p: typical(w.astype(np.float64) - exact.initial[p]) for p, w in exact.params.items()}
    rounding = budget.arbitrary(single.gradients, exact.gradients)

    def against(kind: str, arbitrary: Collection[str] = ()) -> list[Compared]:
        sides = (leaves(trial, kind) for trial in (found, single, exact))
        return budget.compare(kind, *sides, moved=moved, arbitrary=arbitrary)

    made = {"gradient": against("gradient", rounding), "loss": against("loss")}
    unsure = rounding | {c.path for c in made["gradient"] if c.coarse}
    resting = {at for at in exact.optimizer if any(f"'{p}'" in at for p in unsure)}
    made |= {"parameter": against("parameter", unsure), "optimizer": against("optimizer", resting)}
    first = _first_metrics(budget, found, single, exact)
    made["loss"] = [max(pair, key=lambda c: c.share) for pair in zip(made["loss"], first, strict=True)]
    return made


def _first_metrics(budget: Budget, found: Trial, single: Trial, exact: Trial) -> list[Compared]:
    """The metrics of the first update alone: made before the optimizer casts anything, so without room for its casts."""
    before = {"loss": dtype} if (dtype := budget.within.get("gradient")) else {}
    mine, one, two = (leaves(t, "loss") for t in (found, single, exact))
    rest = two if budget.double else one
    alone = {p: np.concatenate([x[:1], rest[p][1:]]) for p, x in mine.items() if p in rest}
    return replace(budget, within=before).compare("loss", alone, one, two)


def leaves(trial: Trial, kind: str) -> Leaves:
    """The arrays of a kind; of the metrics, each with an entry an update."""
    if kind != "loss":
        return getattr(trial, PARTS[kind])
    return {name: np.array([seen[name] for seen in trial.metrics]) for name in trial.metrics[0]}


def departing_update(
    found: Going, single: Going, exact: Going, batches: Sequence[Mapping[str, np.ndarray]], budget: Budget
) -> Departure | None:
    """The leaf that departs most after the first update after which one departs; None when none ever does.

    All three trials are begun from the same parameters and not updated yet.
    """
    before: tuple[Trial, Trial] | None = None
    for at, batch in enumerate(batches, 1):
        for going in (found, single, exact):
            going.update(batch)
        trials = found.trial(), single.trial(), exact.trial()
        mine, want = trials[0], trials[2] if budget.double else trials[1]
        for kind, made in compared(budget, *trials).items():
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
    if kind == "parameter":
        was = [t.params[path] for t in before] if before else [t.initial[path] for t in now]
        mine, right = mine - was[0], right - was[1]
    sizes = step.split.layouts.sizes
    shared = _shared(found, now) if kind == "gradient" and not axes else ""
    looks = shared or diagnose(Error(mine, right, layout, sizes, worst.allowed, axes))
    phase = "gradient" if kind == "gradient" else "update"
    what = f"the {'gradient of' if kind == 'gradient' else kind} {worst.path}"
    if phase == "update":
        what += f" after {_nth(at)}"
    return Departure(phase, what, layout.text(), placed(layout), worst.error, worst.allowed, looks)


def _shared(found: Going, now: tuple[Trial, Trial]) -> str:
    """What all gradients together look like, where one factor explains them all."""
    step = found.ready.step
    whole = Layout((), ())
    pairs = [(g, now[1].gradients[p]) for p, g in now[0].gradients.items() if p in now[1].gradients]
    return common([Error(f, w, whole, step.split.layouts.sizes, 0.0) for f, w in pairs])


def _of_metric(
    found: Going, worst: Compared, now: tuple[Trial, Trial], before: tuple[Trial, Trial] | None, at: int
) -> Departure:
    """A metric of the last update, whose gradients all agree if it is the first."""
    mine, right = (np.array(t.metrics[-1][worst.path]) for t in now)
    scalar = Layout((), ())
    looks = diagnose(Error(mine, right, scalar, found.ready.step.split.layouts.sizes, worst.allowed))
    if worst.path == "grad_norm":
        looks += "; it is common to all gradients: they are clipped by it, and what follows from it departs as well"
    what = f"the metric {worst.path} of {_nth(at)}"
    return Departure("metric", what, "one number", (), worst.error, worst.allowed, looks)


def _nth(at: int) -> str:
    return "the first update" if at == 1 else f"update {at}"
