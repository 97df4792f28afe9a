"""A model in double precision: the oracle that a split's rounding is measured against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr

from sharding.ledger import equations, subjaxprs
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


def narrowed(step: TrainStep, rows: int) -> dict[str, str]:
    """Kind of array -> the narrowest floating dtype to which a step in double casts something by itself on the way to it;
    no entry where it casts nothing. For gradients forward and backward pass count, for what follows the optimizer too;
    a cast on the way to a metric alone counts for metrics.
    """
    with jax.enable_x64(True):
        batch = {
            k: jax.ShapeDtypeStruct(x.shape, widened(x.dtype)) for k, x in step.abstract_batch(rows).items()
        }
        traced, made = jax.make_jaxpr(step.updated, return_shape=True)(step.abstract_state(), batch)
    state, metrics, gradients = jax.tree.unflatten(jax.tree.structure(made), traced.jaxpr.outvars)
    behind = lambda *ends: _narrowest(_behind(traced.jaxpr, jax.tree.leaves(ends)))
    after = behind(state)  # what later updates begin with
    found = {
        "gradient": behind(gradients),
        "loss": behind(state, metrics),
        "parameter": after,
        "optimizer": after,
    }
    return {kind: dtype for kind, dtype in found.items() if dtype}


def _behind(jaxpr: Jaxpr, ends: Iterable[Any]) -> list[Any]:
    """The equations that some results of a jaxpr come from."""
    needed, found = set(map(id, ends)), []
    for eqn in reversed(jaxpr.eqns):
        if any(id(v) in needed for v in eqn.outvars):
            needed |= set(map(id, eqn.invars))
            found.append(eqn)
    return found


def _narrowest(eqns: Iterable[Any]) -> str:
    """The coarsest dtype that a cast from a finer one leads to, inner equations included; "" without such a cast."""
    eps = lambda dtype: float(jnp.finfo(dtype).eps)
    to: set[str] = set()
    for outer in eqns:
        bodies = list(subjaxprs(outer.params))
        for eqn in [eqn for body in bodies for eqn, *_ in equations(body)] if bodies else [outer]:
            if eqn.primitive.name == "convert_element_type":
                a, b = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
                if all(jnp.issubdtype(x, jnp.floating) for x in (a, b)) and eps(b) > eps(a):
                    to.add(str(b))
    return max(to, key=eps, default="")
