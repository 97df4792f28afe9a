"""Stand-ins for the devices of a target, and the grid that they are laid in: the order that the real ones would have.

`mesh_utils` orders TPU devices by their place in the torus, so the stand-ins carry what it asks of a `jax.Device`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.mesh import device_grid
from sharding.price.target import Target


@dataclass(frozen=True)
class StandIn:
    """A device that need not be there, with a `jax.Device`'s attributes of the same names."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int = 0
    coords: tuple[int, int, int] = (0, 0, 0)
    """Of its chip in the torus of its slice."""
    core_on_chip: int = 0

    @property
    def island(self) -> int:
        """Of what it shares the fast network with: its TPU slice, its host otherwise."""
        return self.slice_index if self.platform == "tpu" else self.process_index


def stand_ins(target: Target) -> list[StandIn]:
    """The target's devices in the order of `jax.devices()` there: host by host, in a host x before y before z before core."""
    if target.platform == "tpu":
        return [device for island in range(target.islands) for device in _slice(target, island)]
    kind, each = target.machine.device_kind, target.island_devices
    return [StandIn(i, target.platform, kind, i // each) for i in range(target.devices)]


def grid(shape: MeshShape, target: Target) -> np.ndarray:
    """The stand-ins of a target laid out over the axes of a mesh, as `sharding.mesh.device_mesh` lays the real ones.

    An array of `StandIn`s of the sizes of AXES, -1 filled. Raises InputError when the mesh does not fit the target, and
    where it is laid over one network but the target has several slices.
    """
    full = shape.resolve(target.devices)
    if target.platform == "tpu" and full.slices != target.islands:
        raise InputError(
            f"The mesh {shape.describe()} is laid over {full.slices} slice{'s' * (full.slices > 1)}, but the target "
            f"{target.text} has {target.islands}. Set mesh.slices to {target.islands}."
        )
    return device_grid(full, stand_ins(target))


def _slice(target: Target, island: int) -> Iterator[StandIn]:
    """The devices of one TPU slice. Ids go through the whole torus, x first; hosts are blocks of it."""
    machine = target.machine
    chips, block = (*target.shape, 1, 1)[:3], (*machine.host, 1, 1)[:3]
    hosts = tuple(n // b for n, b in zip(chips, block, strict=True))
    first = 0 if target.islands == 1 else 100_000 * (island + 1)
    for process, host in enumerate(_places(hosts)):
        for within in _places(block):
            x, y, z = (h * b + w for h, b, w in zip(host, block, within, strict=True))
            number = first + machine.cores * (x + chips[0] * (y + chips[1] * z))
            index = island * math.prod(hosts) + process
            for core in range(machine.cores):
                yield StandIn(
                    number + core, "tpu", machine.device_kind, index, island, (x, y, z), core_on_chip=core
                )


def _places(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every place in a box, x fastest."""
    for place in itertools.product(*(range(n) for n in reversed(sizes))):
        yield place[::-1]
