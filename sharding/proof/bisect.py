"""Where a split parts from one device: the first tensor of the forward pass, else of the backward pass, that departs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from sharding.layout import Layout, Reason
from sharding.proof.budget import Budget
from sharding.proof.diagnose import Error, diagnose
from sharding.proof.witness import Seen


@dataclass(frozen=True)
class Departure:
    """The first tensor that departs, how it lies and by which rules, and what the error looks like."""

    phase: str
    """"trace", "initial", "forward", "backward", "gradient", "metric", "update", or "unplaced" where looking for it failed."""
    what: str
    """The tensor: a named op's result with layer and file:line, or a parameter's path; of a trace its place."""
    layout: str
    placed: tuple[str, ...]
    """`heads/tensor by tensor() FILE:LINE`, a placement each."""
    error: float
    """Relative to the tensor's largest entry."""
    allowed: float
    looks: str


def bisect(
    found: list[Seen], single: list[Seen], exact: list[Seen], sizes: Mapping[str, int], budget: Budget
) -> Departure | None:
    """The first result of a named op that departs going forward, else the first gradient of one going backward.

    `found` is what a split over axes of these `sizes` made (`witness`), `single` and `exact` what one device made in the
    working precision and in double. None when all named ops agree: the fault lies after them, or the model has none.
    """
    # A model may ask how it is split and compute something else there: from that place on nothing is comparable.
    heard = list(takewhile(_comparable, zip(found, single, exact, strict=False)))
    for f, s, r in heard:
        made = _departure("forward", f, f.value, s.value, r.value, sizes, budget, f.replicas)
        if made:
            # A single number says little of what is wrong with it: its gradients say more.
            back = None if f.layout.names else _backward(heard, sizes, budget)
            return made if back is None else replace(made, looks=f"{made.looks}; {back.what}: {back.looks}")
    return _backward(heard, sizes, budget)


def _comparable(seen: tuple[Seen, Seen, Seen]) -> bool:
    shapes = {s.value.shape[len(s.replicas) :] for s in seen}
    # The op may differ: what one device computes as several products a split may take as one.
    return len(shapes) == 1 and len({(s.tap.scope, s.tap.source, s.tap.names) for s in seen}) == 1


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
        (budget.compare("gradient", {"": x}, {"": single}, named)[0] for x in each),
        key=lambda c: (c.departs, c.share),
    )
    if not worst.departs:
        return None
    want = exact if budget.double else single
    looks = diagnose(Error(found, want, seen.layout, sizes, worst.allowed, replicas, seen.places))
    what = seen.title if phase == "forward" else f"the gradient of {seen.title}"
    return Departure(phase, what, seen.layout.text(), placed(seen.layout), worst.error, worst.allowed, looks)


def placed(layout: Layout) -> tuple[str, ...]:
    """Who put what where: `heads/tensor by tensor() FILE:LINE`, a placement each."""

    def one(r: Reason) -> str:
        return f"{r.name}/{r.axis} by {r.rule} {r.source}"

    return tuple(one(r) for r in layout.reasons if r.size > 1)
