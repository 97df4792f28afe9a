"""Meshes: sizes are filled and checked with the number to change, and slow networks carry the outermost axes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.axes import AXES, MeshShape
from sharding.errors import InputError
from sharding.mesh import abstract_mesh, device_mesh


@dataclass(frozen=True, order=True)
class Fake:
    """A device that is not there, with what mesh_utils asks of one."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    platform: str = "gpu"
    device_kind: str = "pretend"


def islands(slices: int, each: int, by: str = "slice") -> list[Fake]:
    """Devices on several slow-network islands, shuffled; islands are TPU slices or processes."""
    made = [Fake(i, i // each, i // each if by == "slice" else 0) for i in range(slices * each)]
    return [made[i] for i in np.random.default_rng(0).permutation(len(made))]


def test_the_axes_are_those_of_the_design_outermost_first() -> None:
    assert AXES == ("replica", "stage", "data", "fsdp", "expert", "context", "tensor")
    mesh = device_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape.values()) == (1, 1, 2, 2, 1, 1, 2)
    ids = np.array([d.id for d in mesh.devices.flat])
    assert list(ids) == sorted(ids), "the innermost axis holds neighbours"


@given(
    sizes=st.dictionaries(st.sampled_from(AXES), st.sampled_from([1, 2, 3, 4]), max_size=4),
    fill=st.sampled_from(AXES),
    rest=st.integers(1, 5),
)
def test_one_axis_is_filled_so_that_the_product_is_the_devices(
    sizes: dict[str, int], fill: str, rest: int
) -> None:
    fixed = math.prod(n for a, n in sizes.items() if a != fill)
    shape = MeshShape(**{**sizes, fill: -1}).resolve(fixed * rest)
    assert math.prod(shape.sizes().values()) == fixed * rest
    assert shape.sizes()[fill] == rest
    assert shape.resolve(fixed * rest) == shape
    assert tuple(abstract_mesh(shape, fixed * rest).shape.values()) == tuple(shape.sizes().values())


REFUSED = {
    "the product is not the devices": (MeshShape(data=2, fsdp=3), 8, ("asks for 6 devices", "there are 8")),
    "more devices asked than present": (
        MeshShape(tensor=16),
        8,
        ("tensor=16 asks for 16 devices", "there are 8"),
    ),
    "two axes to fill": (MeshShape(data=-1, fsdp=-1), 8, ("Only one mesh axis", "data and fsdp")),
    "the fill does not go evenly": (
        MeshShape(data=-1, tensor=3),
        8,
        ("8 devices to be divided by 3", "data = -1"),
    ),
    "the fill has nothing left": (MeshShape(data=-1, tensor=16), 8, ("8 devices to be divided by 16",)),
    "a size of nothing": (MeshShape(data=0), 8, ("at least 1", "'data': 0")),
    "a negative size": (MeshShape(data=-2), 8, ("at least 1", "'data': -2")),
    "no slices": (MeshShape(data=8, slices=0), 8, ("at least 1", "'slices': 0")),
    "slices to fill": (MeshShape(data=8, slices=-1), 8, ("at least 1", "'slices': -1")),
    "no devices": (MeshShape(data=-1), 0, ("0 devices",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sizes_that_do_not_fit_are_refused_with_the_numbers(case: str) -> None:
    shape, devices, words = REFUSED[case]
    for ask in (
        lambda: shape.resolve(devices),
        lambda: device_mesh(shape, jax.devices()[:devices]),
        lambda: abstract_mesh(shape, devices),
    ):
        with pytest.raises(InputError) as caught:
            ask()
        assert all(word in str(caught.value) for word in words), caught.value


def test_unknown_and_repeated_axes_are_refused() -> None:
    assert MeshShape.of(("data", 2), ("tensor", 4)) == MeshShape(data=2, tensor=4)
    assert MeshShape.of() == MeshShape()
    with pytest.raises(InputError, match=r"axis 'tenser', which does not exist \(nearest: 'tensor'\)"):
        MeshShape.of(("data", 2), ("tenser", 4))
    with pytest.raises(InputError, match=r"'data' twice, with sizes 2 and 4"):
        MeshShape.of(("data", 2), ("tensor", 1), ("data", 4))
    with pytest.raises(InputError, match="'slices', which does not exist"):
        MeshShape.of(("slices", 2))


def test_a_mesh_is_described_by_the_axes_that_matter() -> None:
    assert MeshShape(data=2, tensor=4).describe() == "data=2 tensor=4"
    assert MeshShape(fsdp=-1).describe() == "fsdp=-1"
    assert MeshShape().describe() == "one device"


def test_processes_hold_neighbouring_inner_coordinates() -> None:
    made = [Fake(7 - i, i // 4, 0, platform="cpu") for i in range(8)]
    grid = device_mesh(MeshShape(data=2, tensor=4), made).devices.reshape(2, 4)  # type: ignore[arg-type]
    assert [[d.process_index for d in row] for row in grid] == [[0] * 4, [1] * 4]
    assert [d.id for d in grid[0]] == [4, 5, 6, 7]


@pytest.mark.parametrize("by", ["slice", "process"])
@pytest.mark.parametrize(
    ("shape", "across"),
    [
        (MeshShape(data=2, fsdp=4, slices=2), {"data": 2}),
        (MeshShape(data=4, tensor=2, slices=2), {"data": 2}),
        (MeshShape(data=2, fsdp=4, slices=4), {"data": 2, "fsdp": 2}),
        (MeshShape(replica=2, fsdp=-1, slices=2), {"replica": 2}),
        (MeshShape(fsdp=8, slices=2), {"fsdp": 2}),
        (MeshShape(data=6, fsdp=4, slices=4), {"data": 2, "fsdp": 2}),
    ],
)
def test_the_outermost_axes_lie_across_islands(shape: MeshShape, across: dict[str, int], by: str) -> None:
    count = 24 if shape.data == 6 else 8
    grid = device_mesh(shape, islands(shape.slices, count // shape.slices, by)).devices  # type: ignore[arg-type]
    assert len({d.id for d in grid.flat}) == count
    island = np.vectorize(lambda d: d.process_index)(grid)
    for at, axis in enumerate(AXES):
        lines = np.moveaxis(island, at, 0).reshape(island.shape[at], -1)
        crossed = {len(set(line)) for line in lines.T}
        assert crossed == {across.get(axis, 1)}, axis
    for axis, n in across.items():  # within an axis, an island's devices are neighbours
        line = np.moveaxis(island, AXES.index(axis), 0).reshape(island.shape[AXES.index(axis)], -1)[:, 0]
        assert len(list(itertools.groupby(line))) == n


def test_islands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"2 slices, but the 8 devices lie in 1 processes.*slices to 1"):
        device_mesh(MeshShape(data=8, slices=2), islands(1, 8, "process"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"2 slices, but the 8 devices lie in 4"):
        device_mesh(MeshShape(data=8, slices=2), islands(4, 2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"cannot be laid over 3 slices.*multiple of 3"):
        device_mesh(MeshShape(data=2, tensor=4, slices=3), islands(2, 4))  # type: ignore[arg-type]
