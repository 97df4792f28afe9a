"""Bringing arrays to the order in which the rules lay positions (`sharding.order`), and back to their own."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from sharding.region import Region


def ordered(region: Region, x: Array, dim: int, name: str) -> Array:
    """`x`, whose dim `dim` is whole and in its natural order, with that dim in the order of `name`."""
    return _taken(region, x, dim, name, np.asarray)


def natural(region: Region, x: Array, dim: int, name: str) -> Array:
    """`x`, whose dim `dim` is whole and in the order of `name`, with that dim in its natural order."""
    return _taken(region, x, dim, name, np.argsort)


def enter(region: Region, x: Array, names: tuple[str, ...]) -> Array:
    """An input, in its natural order when it enters the manual region, in the order that the rules lay it in."""
    return _each_dim(region, x, names, ordered)


def leave(region: Region, x: Array, names: tuple[str, ...]) -> Array:
    """A result in its natural order, as it leaves the manual region."""
    return _each_dim(region, x, names, natural)


def _each_dim(region: Region, x: Array, names: tuple[str, ...], turn: Callable[..., Array]) -> Array:
    lies = region.dims(names)
    for dim, name in enumerate(names):
        if region.ordered(name)[0] is not None:
            whole = (*lies[:dim], (), *lies[dim + 1 :])
            x = region.move(turn(region, region.move(x, lies, whole), dim, name), whole, lies)
    return x


def _taken(region: Region, x: Array, dim: int, name: str, of: Callable[[np.ndarray], np.ndarray]) -> Array:
    order, parts = region.ordered(name)
    if order is None:
        return x
    order.check(x.shape[dim], parts, name)
    taken = of(order.position(np.arange(x.shape[dim]), x.shape[dim], parts))
    return jnp.take(x, jnp.asarray(taken, jnp.int32), axis=dim)
