"""Rows into slots and back, on one device: `place` says where each choice of a token goes, `choice` which one sits in a slot.

Both ways are gathers, and the gradient of the one is the other: nothing is ever added up by a scatter, whose order of sums
is no one's to say and which compilers have got wrong.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sharding.region import wide
from sharding.relayout import vary, varying


@jax.custom_vjp
def spread(x: Array, place: Array, choice: Array) -> Array:
    """Tokens (rows, tokens, width) in slots (rows, slots, width), an empty slot zero; `Seats` says place and choice."""
    return _take(x, choice // place.shape[2])


def _spread_forward(x: Array, place: Array, choice: Array) -> tuple[Array, tuple[Array]]:
    return spread(x, place, choice), (place,)


def _spread_backward(kept: tuple[Array], ds: Array) -> tuple[Array, Any, Any]:
    (place,) = kept
    parts = _take(ds, place.reshape(place.shape[0], -1)).reshape(*place.shape, -1)
    return wide(parts).sum(axis=2).astype(ds.dtype), _none(place.shape), _none((place.shape[0], ds.shape[1]))


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def collect(s: Array, gates: Array, place: Array, choice: Array) -> Array:
    """Slots (rows, slots, width) back to tokens (rows, tokens, width): the sum over a token's choices, weighed by gates."""
    parts = _take(s, place.reshape(place.shape[0], -1)).reshape(*place.shape, -1)
    return jnp.sum(wide(parts) * gates[..., None].astype(wide(parts).dtype), axis=2).astype(s.dtype)


def _collect_forward(s: Array, gates: Array, place: Array, choice: Array) -> tuple[Array, tuple[Array, ...]]:
    return collect(s, gates, place, choice), (s, gates, place, choice)


def _collect_backward(kept: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Any, Any]:
    s, gates, place, choice = kept
    rows, k = place.shape[0], place.shape[2]
    of_slot = _take(gates.reshape(rows, -1, 1), choice)
    ds = wide(_take(dy, choice // k)) * of_slot.astype(wide(dy).dtype)
    parts = wide(_take(s, place.reshape(rows, -1))).reshape(*place.shape, -1)
    dgates = jnp.sum(parts * wide(dy)[:, :, None, :], axis=-1)
    return ds.astype(s.dtype), dgates.astype(gates.dtype), _none(place.shape), _none(choice.shape)


collect.defvjp(_collect_forward, _collect_backward)


def inverse(place: Array, slots: int) -> Array:
    """(rows, slots): which of a row's choices, counted over its tokens (rows, tokens, choices), is placed in each slot; their
    number for an empty slot. What is placed at `slots` is left out.
    """
    rows, length, k = place.shape
    kinds = varying(place)
    empty = vary(jnp.full((rows, slots), length * k, jnp.int32), kinds)
    numbers = vary(jnp.arange(length * k, dtype=jnp.int32), kinds)
    return jax.vmap(lambda e, p: e.at[p].set(numbers, mode="drop"))(empty, place.reshape(rows, -1))


def _take(x: Array, index: Array) -> Array:
    """Rows `index` (rows, m) of `x` (rows, n, width); an index of n is zero."""
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="fill", fill_value=0)


def one_hot(index: Array, count: int, dtype: Any) -> Array:
    """1 where a last dim of `count` counts the index, else 0; an index beyond it is nowhere."""
    shape = (*index.shape, count)
    return (index[..., None] == lax.broadcasted_iota(index.dtype, shape, len(shape) - 1)).astype(dtype)


def _none(shape: tuple[int, ...]) -> np.ndarray:
    """The cotangent of integers."""
    return np.zeros(shape, jax.dtypes.float0)
