"""How far the losses of a sweep's splits may be apart before one of them computes something else."""

from __future__ import annotations

import math
from typing import Any

AGREE = 1e-5
"""Largest relative difference of two losses that counts as float32's rounding: 20 times what the longest sweep tried has."""
ROUNDINGS = 16.0
"""Units of a narrower type that the nats of one token may be rounded by, as in `verify`. The loss is a mean of those of n
tokens, each rounded by itself, which rounds by 1 / sqrt(n) of that."""


def agreement(dtype: str, tokens: int) -> float:
    """Largest relative difference of two mean losses over so many tokens, computed in `dtype`, that its rounding explains."""
    from sharding.proof.double import unit

    return AGREE if dtype == "float32" else max(AGREE, ROUNDINGS * unit(dtype) / math.sqrt(tokens))


def loss_dtype(step: Any, batch: Any) -> str:
    """The coarsest type to which a model casts on the way to its loss, by its `dtype` or by itself; "float32" where it casts
    to none that is coarser. `batch`: shapes.
    """
    import jax

    from sharding.proof.double import narrowed, unit

    traced = jax.make_jaxpr(step.evaluation)(step.abstract_state()["params"], batch)
    return max(narrowed(traced.jaxpr) | {"float32"}, key=unit)
