"""A model in double precision: the oracle that a split's rounding is measured against."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from sharding.ledger import equations
from sharding.proof.trial import widened
from sharding.step import TrainStep

M = TypeVar("M")


def doubled(model: M) -> M:
    """The model, whose floating parameters and batch entries are float64 from now on. Its own activations must follow
    them: a model that has a `dtype` is built with "float64".
    """
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        old = variable.get_value()
        variable.set_value(jax.ShapeDtypeStruct(old.shape, widened(old.dtype)))
    inputs = getattr(model, "inputs")  # noqa: B009  (a protocol's field, which a type variable does not show)
    wide = {k: replace(e, dtype=str(widened(e.dtype))) for k, e in inputs.items()}
    setattr(model, "inputs", wide)  # noqa: B010  (as above)
    return model


def narrowed(step: TrainStep, rows: int) -> str:
    """The narrowest floating dtype to which a step in double casts something by itself; "" where it casts nothing."""
    with jax.enable_x64(True):
        batch = {
            k: jax.ShapeDtypeStruct(x.shape, widened(x.dtype)) for k, x in step.abstract_batch(rows).items()
        }
        jaxpr = jax.make_jaxpr(step.evaluation)(step.abstract_state()["params"], batch)
    floats = [
        (eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype)
        for eqn, _ in equations(jaxpr.jaxpr, 1)
        if eqn.primitive.name == "convert_element_type"
    ]
    eps = lambda dtype: float(jnp.finfo(dtype).eps)
    to = {
        str(b) for a, b in floats if all(jnp.issubdtype(x, jnp.floating) for x in (a, b)) and eps(b) > eps(a)
    }
    return max(to, key=lambda dtype: float(jnp.finfo(dtype).eps), default="")
