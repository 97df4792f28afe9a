"""The device mesh: seven named axes over real, pretend or abstract devices, slow networks outermost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from sharding.axes import AXES, MeshShape
from sharding.errors import InputError

_AUTO = (AxisType.Auto,) * len(AXES)  # an Explicit mesh refuses manual regions whose inputs lie otherwise


def device_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `shape` over `devices` (`jax.Device`s; all of them by default), -1 filled, in the order of `device_grid`."""
    devices = list(jax.devices() if devices is None else devices)
    return Mesh(device_grid(shape, devices), AXES, axis_types=_AUTO)


def device_grid(shape: MeshShape, devices: Sequence[Any]) -> np.ndarray:
    """`devices` laid out over the axes of `shape` (an array of AXES' sizes, -1 filled); they need not be real ones.

    On one fast network the order follows the hardware (`mesh_utils.create_device_mesh`). With `shape.slices` > 1 the
    outermost axes are laid across islands, which are TPU slices where devices have a `slice_index`, processes
    otherwise. Raises InputError when the shape does not fit the devices.
    """
    full = shape.resolve(len(devices))
    sizes = tuple(full.sizes().values())
    if full.slices > 1:
        across = _across(full, len(devices))
        within = tuple(n // m for n, m in zip(sizes, across, strict=True))
        by_process = len({getattr(d, "slice_index", 0) for d in devices}) != full.slices
        islands = {getattr(d, "process_index" if by_process else "slice_index", 0) for d in devices}
        if len(islands) != full.slices:
            raise InputError(
                f"The mesh asks for {full.slices} slices, but the {len(devices)} devices lie in {len(islands)} "
                f"{'processes' if by_process else 'slices'}. Set mesh slices to {len(islands)}, or to 1 for one network."
            )
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, process_is_granule=by_process, allow_split_physical_axes=True
        )
    if devices[0].platform == "cpu":  # a process holds neighbouring inner coordinates
        return np.array(sorted(devices, key=lambda d: (d.process_index, d.id))).reshape(sizes)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def abstract_mesh(shape: MeshShape, devices: int) -> AbstractMesh:
    """A mesh of the same shape without devices, for tracing what would run on `devices` of them.

    Raises InputError as `device_mesh` does, but for what only the devices can tell: how many islands they lie in.
    """
    full = shape.resolve(devices)
    if full.slices > 1:
        _across(full, devices)
    return AbstractMesh(tuple(full.sizes().values()), AXES, axis_types=_AUTO)


def _across(shape: MeshShape, devices: int) -> tuple[int, ...]:
    """Factor of each axis that lies across islands: the outermost axes are used up first."""
    left, across = shape.slices, []
    for size in shape.sizes().values():
        across.append(math.gcd(left, size))
        left //= across[-1]
    if left != 1:
        raise InputError(
            f"The mesh {shape.describe()} cannot be laid over {shape.slices} slices of {devices // shape.slices} devices: "
            f"the outer axes leave a factor {left}. Make the product of the outermost axes a multiple of {shape.slices}."
        )
    return tuple(across)
