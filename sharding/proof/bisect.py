"""Where a split parts from one device: the first tensor of the forward pass, else of the backward pass, that departs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from sharding.layout import Layout, Reason
from sharding.proof.budget import Budget
from sharding.proof.diagnose import PRECISIONS, Error, diagnose
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
    """Relative to the tensor's `norm`."""
    allowed: float
    looks: str
    norm: str = "largest entry"
    """What the error is relative to, in words: the tensor's "largest entry", or the "root mean square" of a whole parameter or
    array of the optimizer (of all its entries, not of what an update made of it).
    """


Heard = tuple[Seen, Seen, Seen, Seen]
"""One tensor of a split, of one device in the working precision, in double, and in double without its own casts."""


def bisect(
    found: list[Seen],
    one: tuple[list[Seen], list[Seen], list[Seen]],
    sizes: Mapping[str, int],
    budget: Budget,
    gradients: bool = False,
    types: Collection[str] = tuple(PRECISIONS),
) -> Departure | None:
    """The first result of a named op that departs going forward, else the first gradient of one going backward; of results
    that the loss does not depend on, which feed metrics alone, the first if no gradient departs.

    `found` is what a split over axes of these `sizes` made (`witness`), `one` what one device made in the working precision,
    in double, and in double without its own casts. `gradients`: whether a parameter's departs. `types`: floating dtypes that
    the split computes in. None when all named ops agree: the fault lies after them, or the model has none.
    """
    look = lambda phase, seen, values: _departure(phase, seen, values, sizes, budget, types)
    # A model may ask how it is split and compute something else there: from that place on nothing is comparable.
    heard = list(takewhile(_comparable, zip(found, *one, strict=False)))
    first: Departure | None = None
    for seen in heard:
        made = look("forward", seen, [s.value for s in seen])
        first = first or made
        if first and made and _in_loss(seen):
            # A single number says little of what is wrong with it: its gradients say more.
            back = None if seen[0].layout.names or first is not made else _backward(heard, look)
            return (
                first if back is None else replace(first, looks=f"{first.looks}; {back.what}: {back.looks}")
            )
    return _backward(heard, look) or (None if gradients else first)


def _in_loss(seen: Heard) -> bool:
    """Whether the loss depends on it; integers and what has no gradient may well be on the way to it."""
    gradient = seen[2].gradient
    return gradient is None or bool(gradient.any())


def _comparable(seen: Heard) -> bool:
    shapes = {s.value.shape[len(s.replicas) :] for s in seen}
    # The op may differ: what one device computes as several products a split may take as one.
    return len(shapes) == 1 and len({(s.tap.scope, s.tap.source, s.tap.names) for s in seen}) == 1


Look = Callable[[str, Heard, Sequence[np.ndarray]], Departure | None]


def _backward(heard: list[Heard], look: Look) -> Departure | None:
    for seen in reversed(heard):
        given = [s.gradient for s in seen if s.gradient is not None]
        made = look("backward", seen, given) if len(given) == len(seen) else None
        if made:
            return made
    return None


def _departure(
    phase: str,
    heard: Heard,
    values: Sequence[np.ndarray],
    sizes: Mapping[str, int],
    budget: Budget,
    types: Collection[str],
) -> Departure | None:
    """Whether the first of four `values` departs from what one device made."""
    seen, (found, single, exact, wide) = heard[0], values
    replicas = seen.replicas if phase == "forward" else ()
    each = found.reshape(-1, *exact.shape) if replicas else found[None]
    if not np.issubdtype(exact.dtype, np.floating):
        exact, wide = exact.astype(np.float64), wide.astype(np.float64)
    against = lambda x: budget.compare("gradient", {"": x}, {"": single}, {"": exact}, wide={"": wide})[0]
    worst = max(map(against, each), key=lambda c: (c.departs, c.share))
    if not worst.departs:
        return None
    want = exact if budget.double else single
    looks = diagnose(Error(found, want, seen.layout, sizes, worst.allowed, replicas, seen.places, types))
    what = seen.title if phase == "forward" else f"the gradient of {seen.title}"
    return Departure(phase, what, seen.layout.text(), placed(seen.layout), worst.error, worst.allowed, looks)


def placed(layout: Layout) -> tuple[str, ...]:
    """Who put what where: `heads/tensor by tensor() FILE:LINE`, a placement each."""

    def one(r: Reason) -> str:
        return f"{r.name}/{r.axis} by {r.rule} {r.source}"

    return tuple(one(r) for r in layout.reasons if r.size > 1)
