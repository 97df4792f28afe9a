"""A model in double precision: the oracle that a split's rounding is measured against."""

from __future__ import annotations

from typing import TypeVar

import jax
from flax import nnx

from sharding.params import Entry
from sharding.proof.trial import widened

M = TypeVar("M")


def doubled(model: M) -> M:
    """The model, whose floating parameters and batch entries are float64 from now on. Its own activations must follow
    them: a model that has a `dtype` is built with "float64".
    """
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        old = variable.get_value()
        variable.set_value(jax.ShapeDtypeStruct(old.shape, widened(old.dtype)))
    inputs = getattr(model, "inputs")  # noqa: B009  (a protocol's field, which a type variable does not show)
    wide = {k: Entry(e.names, e.row, str(widened(e.dtype))) for k, e in inputs.items()}
    setattr(model, "inputs", wide)  # noqa: B010
    return model
