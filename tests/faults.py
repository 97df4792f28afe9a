"""Faults that tests plant in the core, each in the place of the function that it names: values of the right type, wrong."""

from __future__ import annotations

from typing import Any

from jax import lax

from sharding.relayout import vary


def reduced_twice(self: Any, path: str, g: Any) -> Any:
    """For `TrainStep._reduce`: a gradient that is n times too large over every axis of size n it is summed over."""
    over = tuple(sorted(self._partial(g, self.layouts[path].gradient)))
    return lax.psum(vary(lax.psum(g, over), frozenset(over)), over) if over else g


def other_block(x: Any, dim: int, axes: tuple[str, ...]) -> Any:
    """For `sharding.relayout._slice`: each device takes the block of its mirror image over `axes`."""
    if not axes:
        return x
    size = x.shape[dim] // lax.axis_size(axes)
    last = lax.axis_size(axes) - 1 - lax.axis_index(axes)
    return lax.dynamic_slice_in_dim(vary(x, frozenset(axes)), last * size, size, dim)
