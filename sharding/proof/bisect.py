"""Where a split parts from one device: the first tensor of the forward pass, else of the backward pass, that departs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from sharding.layout import Layout, Reason
from sharding.proof.budget import Budget, Compared
from sharding.proof.diagnose import Error, diagnose
from sharding.proof.trial import Leaves, Trial
from sharding.proof.witness import Seen, witness
from sharding.step import TrainStep


@dataclass(frozen=True)
class Departure:
    """The first tensor that departs, how it lies and by which rules, and what the error looks like."""

    phase: str
    """"initial", "forward", "backward", "gradient" or "update"."""
    what: str
    """The tensor: a named op's result with layer and file:line, or a parameter's path."""
    layout: str
    placed: tuple[str, ...]
    """`heads/tensor by tensor() FILE:LINE`, a placement each."""
    error: float
    """Relative to the tensor's largest entry."""
    allowed: float
    looks: str


def bisect(
    split: TrainStep,
    single: TrainStep,
    exact: TrainStep,
    params: Leaves,
    batch: Mapping[str, np.ndarray],
    budget: Budget,
) -> Departure | None:
    """The first result of a named op that departs going forward, else the first gradient of one going backward.

    `single` and `exact` are one device in the working precision and in double. None when all named ops agree: the
    fault lies after them, or the model has none.
    """
    found = witness(split, params, batch, budget.double)
    ours, right = witness(single, params, batch), witness(exact, params, batch, double=True)
    sizes = split.split.layouts.sizes
    # A model may ask how it is split and compute something else there: from that place on nothing is comparable.
    heard = list(takewhile(_comparable, zip(found, ours, right, strict=False)))
    for f, s, r in heard:
        made = _departure("forward", f, f.value, s.value, r.value, sizes, budget, f.replicas)
        if made:
            # A single number says little of what is wrong with it: its gradients say more.
            back = None if f.layout.names else _backward(heard, sizes, budget)
            return made if back is None else replace(made, looks=f"{made.looks}; {back.what}: {back.looks}")
    return _backward(heard, sizes, budget)


def _comparable(seen: tuple[Seen, Seen, Seen]) -> bool:
    shapes = {s.value.shape[len(s.replicas) :] for s in seen}
    return len(shapes) == 1 and len({s.title for s in seen}) == 1


def _backward(
    heard: list[tuple[Seen, Seen, Seen]], sizes: Mapping[str, int], budget: Budget
) -> Departure | None:
    for f, s, r in reversed(heard):
        if f.gradient is not None and s.gradient is not None and r.gradient is not None:
            made = _departure("backward", f, f.gradient, s.gradient, r.gradient, sizes, budget, ())
            if made:
                return made
    return None


def _departure(
    phase: str,
    seen: Seen,
    found: np.ndarray,
    single: np.ndarray,
    exact: np.ndarray,
    sizes: Mapping[str, int],
    budget: Budget,
    replicas: tuple[str, ...],
) -> Departure | None:
    each = found.reshape(-1, *exact.shape) if replicas else found[None]
    named = {"": exact} if np.issubdtype(exact.dtype, np.floating) else {"": exact.astype(np.float64)}
    worst = max(
        (budget.compare("gradient", {"": x}, {"": single}, named)[0] for x in each), key=lambda c: c.share
    )
    if worst.share <= 1:
        return None
    want = exact if budget.double else single
    looks = diagnose(Error(found, want, seen.layout, sizes, worst.allowed, replicas))
    what = seen.title if phase == "forward" else f"the gradient of {seen.title}"
    return Departure(phase, what, seen.layout.text(), _placed(seen.layout), worst.error, worst.allowed, looks)


def of_leaf(
    step: TrainStep, compared: Compared, found: Trial, want: Trial, before: Sequence[tuple[Trial, Trial]]
) -> Departure:
    """A parameter's gradient, or a leaf of the state, that departs though every named op agrees.

    `before`: both trials after each earlier update. Of a parameter, what the last update made of it is looked at: beside
    its own values that is small.
    """
    phase = "gradient" if compared.kind == "gradient" else "update"
    kinds = {"gradient": "gradients", "parameter": "params", "optimizer": "optimizer"}
    mine, right = (getattr(t, kinds[compared.kind])[compared.path] for t in (found, want))
    path = next((p for p in step.layouts if f"'{p}'" in compared.path or p == compared.path), "")
    lies = step.layouts.get(path)
    role = {"gradient": "gradient", "parameter": "param", "optimizer": "optimizer"}[compared.kind]
    layout = (
        getattr(lies, role)
        if lies and mine.ndim == len(lies.param.names)
        else Layout(("",) * mine.ndim, ((),) * mine.ndim)
    )
    axes, mine = found.uneven.get(f"{compared.kind} {compared.path}", ((), mine))
    if compared.kind == "parameter":
        was = [t.params[path] for t in before[-1]] if before else [t.initial[path] for t in (found, want)]
        mine, right = mine - was[0], right - was[1]
    looks = diagnose(Error(mine, right, layout, step.split.layouts.sizes, compared.allowed, axes))
    what = f"the {'gradient of' if phase == 'gradient' else compared.kind} {compared.path}"
    if phase == "update":
        what += f" after update {len(before) + 1}" if before else " after the first update"
    return Departure(phase, what, layout.text(), _placed(layout), compared.error, compared.allowed, looks)


def _placed(layout: Layout) -> tuple[str, ...]:
    def one(r: Reason) -> str:
        return f"{r.name}/{r.axis} by {r.rule} {r.source}"

    return tuple(one(r) for r in layout.reasons if r.size > 1)
