"""Parameters that no gradient moves: each step they go a fixed way against the sign of an error.

Such a parameter says so itself (`variable.set_metadata(rate=...)`), and a model gives it its error as a gradient, by a term
of the loss that is zero. Gradients are summed over devices and micro-batches, so the sign is that of the whole batch's error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx


def rates(model: Any) -> dict[str, float]:
    """path -> step of the parameters that are moved by sign."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, k)): v.get_metadata()["rate"] for k, v in flat if "rate" in v.get_metadata()}


def signed(
    optimizer: optax.GradientTransformation, rates: Mapping[str, float]
) -> optax.GradientTransformation:
    """The optimizer, for a dict of parameters by path, but the parameters in `rates` move by -rate x sign(gradient)."""
    if not rates:
        return optimizer

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        moved: tuple[Any, Any] = optimizer.update(updates, state, params)
        own = {p: jnp.asarray(-rate, updates[p].dtype) * jnp.sign(updates[p]) for p, rate in rates.items()}
        return {**moved[0], **own}, moved[1]

    return optax.GradientTransformation(optimizer.init, update)
