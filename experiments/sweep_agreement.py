"""How far the losses of a sweep's splits may be apart before one of them computes something else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sharding.partitioner import Manual

AGREE = 1e-5
"""Largest relative difference of two losses that counts as float32's rounding: 20 times what the longest sweep tried has."""
ROUNDINGS = 16.0
"""Units of a narrower type that the nats of one token may be rounded by, as in `verify`."""
MOST = 1 / 16
"""Largest relative difference that any type's rounding explains: 16 units of bfloat16, and of int8 to a percent. Sixteen units
of an 8-bit float would be a loss as large again, which few faults exceed; the splits measured in one were 1.3e-3 apart."""
INT8_UNIT = 1 / 254
"""Half a step of a number whose row's largest entry is brought to 127 (`sharding.scaled`), relative to that entry."""


@dataclass(frozen=True)
class Rounding:
    """The coarsest rounding on the way to a model's loss."""

    dtype: str
    """The type that is rounded to; "float32" where none is coarser."""
    where: str
    """What is in that type, in words that follow its name."""
    unit: float
    """Its unit roundoff."""

    def explains(self, update: int, tokens: int) -> float:
        """Largest relative difference of two mean losses over so many tokens, at an update counted from 1, that it explains.

        At update 1 all splits have the same weights: each token is rounded by itself, and the mean of n of them by 1 / sqrt(n)
        of that. From then on rounded gradients have made the weights differ, which all tokens have in common.
        """
        if self.dtype == "float32":
            return AGREE
        alone = math.sqrt(tokens) if update == 1 else 1.0
        return max(AGREE, min(MOST, ROUNDINGS * self.unit / alone))


def rounding(step: Any, batch: Any, partitioner: Any) -> Rounding:
    """The coarsest rounding of a step's loss: of what its model casts to, by its `dtype` or by itself, or of the type in which
    the partitioner takes products, where float noise tips a rounding by a whole step of 8 bits. `batch`: shapes.
    """
    import jax

    from sharding.proof.double import narrowed, unit

    traced = jax.make_jaxpr(step.evaluation)(step.abstract_state()["params"], batch)
    cast = max(narrowed(traced.jaxpr) | {"float32"}, key=unit)
    model = Rounding(cast, "in which the model computes", unit(cast))
    if not isinstance(partitioner, Manual) or partitioner.products == "none":
        return model
    small = partitioner.products
    products = Rounding(
        small, "in which its products are taken", INT8_UNIT if small == "int8" else unit(small)
    )
    return max(products, model, key=lambda r: r.unit)
