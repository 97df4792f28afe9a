"""What probes lay arrays out with: a mesh of given axes over the first devices, and arrays placed on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

P = PartitionSpec


def mesh(devices: Sequence[Any], kind: Literal["auto", "explicit"] = "auto", **axes: int) -> Mesh:
    """A mesh of these axes, in this order, over the first devices; XLA's partitioner decides layouts unless "explicit"."""
    count = math.prod(axes.values())
    types = (AxisType.Auto if kind == "auto" else AxisType.Explicit,) * len(axes)
    return Mesh(np.array(devices[:count]).reshape(tuple(axes.values())), tuple(axes), axis_types=types)


def at(grid: Mesh, *spec: Any) -> NamedSharding:
    """`at(grid, "data", None)`: the first dim over data, the second whole. Without a spec: whole on every device."""
    return NamedSharding(grid, PartitionSpec(*spec))


def put(x: Any, grid: Mesh, *spec: Any) -> jax.Array:
    """An array laid out on a mesh."""
    return jax.device_put(x, at(grid, *spec))


def integers(shape: tuple[int, ...], most: int = 8, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Whole numbers from -most to most, the same on every call: their sums need no rounding."""
    return np.random.default_rng(seed).integers(-most, most, shape, endpoint=True).astype(dtype)
