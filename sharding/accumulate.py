"""Gradient accumulation: one batch in several micro-batches, summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from sharding.errors import InputError
from sharding.relayout import vary, varying_of

T = TypeVar("T")
Order = Literal["consecutive", "interleaved"]


def accumulated(
    one: Callable[[Mapping[str, Array]], T], batch: Mapping[str, Array], n: int, order: Order
) -> T:
    """Sum of `one` over `n` micro-batches of a batch: arrays whose first dim counts the rows held here.

    order: micro-batch i takes "consecutive" rows (of what a device holds, inside a manual region), or rows i, i + n,
    ... "interleaved", so that under XLA's partitioner each micro-batch keeps rows on every device. Raises InputError
    when the rows do not divide.
    """
    if n == 1:
        return one(batch)
    rows = next(iter(batch.values())).shape[0]
    if rows % n:
        raise InputError(
            f"{rows} rows on a device cannot be accumulated in {n} micro-batches. Make the batch a multiple of "
            f"accumulate x the devices that split it, or accumulate a divisor of {rows}."
        )
    parts = {name: _parts(x, n, order) for name, x in batch.items()}
    # From zero, so that the scan's body is all of the program: beginning with the first micro-batch would compile twice.
    sums = jax.eval_shape(one, {name: x[0] for name, x in parts.items()})

    def add(total: T, part: Mapping[str, Array]) -> tuple[T, None]:
        return jax.tree.map(jnp.add, total, one(part)), None

    return lax.scan(add, jax.tree.map(zero_like, sums), parts)[0]


def zero_like(like: jax.ShapeDtypeStruct) -> Array:
    """Zeros of a shape, dtype and, inside a manual region, of the varying type that a sum over them will have."""
    return vary(jnp.zeros(like.shape, like.dtype), varying_of(like))


def _parts(x: Array, n: int, order: Order) -> Array:
    size, rest = x.shape[0] // n, x.shape[1:]
    return (
        x.reshape(n, size, *rest) if order == "consecutive" else jnp.swapaxes(x.reshape(size, n, *rest), 0, 1)
    )
