"""Links of mesh axes: stand-ins in the compiler's own order, boxes and rings of a torus, islands, by hand-drawn cases."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharding.axes import AXES, MeshShape
from sharding.errors import InputError
from sharding.mesh import device_mesh
from sharding.price.links import Path as Links
from sharding.price.links import Span, path
from sharding.price.standins import grid, stand_ins
from sharding.price.target import parse_target

ROOT = Path(__file__).resolve().parent.parent

# (id, process, coords, core) as libtpu 0.0.35 gives them for jax 0.10.2, in the order of its topology's devices
FROM_THE_COMPILER: dict[str, list[tuple[int, int, tuple[int, int, int], int]]] = {
    "tpu:v5p:2x2x2": [(i, i // 4, (i % 2, i // 2 % 2, i // 4), 0) for i in range(8)],
    "tpu:v5e:4x4": [
        (0, 0, (0, 0, 0), 0), (1, 0, (1, 0, 0), 0), (4, 0, (0, 1, 0), 0), (5, 0, (1, 1, 0), 0),
        (2, 1, (2, 0, 0), 0), (3, 1, (3, 0, 0), 0), (6, 1, (2, 1, 0), 0), (7, 1, (3, 1, 0), 0),
        (8, 2, (0, 2, 0), 0), (9, 2, (1, 2, 0), 0), (12, 2, (0, 3, 0), 0), (13, 2, (1, 3, 0), 0),
        (10, 3, (2, 2, 0), 0), (11, 3, (3, 2, 0), 0), (14, 3, (2, 3, 0), 0), (15, 3, (3, 3, 0), 0),
    ],
    "tpu:v7x:2x2x1": [(i, 0, (i // 2 % 2, i // 4, 0), i % 2) for i in range(8)],
}  # fmt: skip


@pytest.mark.parametrize("text", FROM_THE_COMPILER)
def test_stand_ins_are_the_devices_that_the_compiler_makes(text: str) -> None:
    made = [(d.id, d.process_index, d.coords, d.core_on_chip) for d in stand_ins(parse_target(text))]
    assert made == FROM_THE_COMPILER[text]


def test_slices_number_their_devices_as_the_compiler_does() -> None:
    devices = stand_ins(parse_target("tpu:v5e:2x4x2slices"))
    assert [d.id for d in devices] == [*range(100_000, 100_008), *range(200_000, 200_008)]
    assert [d.process_index for d in devices] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert [d.slice_index for d in devices] == [0] * 8 + [1] * 8


CHILD = """
import json, sys
from jax.experimental import topologies
from sharding.axes import MeshShape
from sharding.mesh import device_mesh
from sharding.price.standins import grid
from sharding.price.target import parse_target
differ = []
for text, sizes in json.loads(sys.argv[1]):
    target = parse_target(text)
    more = {"num_slices": target.islands} if target.islands > 1 else {}
    more |= target.machine.compiler_options
    real = topologies.get_topology_desc(platform="tpu", topology_name=target.topology, **more).devices
    shape = MeshShape(**sizes, slices=target.islands)
    a, b = device_mesh(shape, real).devices, grid(shape, target)
    if [d.id for d in a.flat] != [d.id for d in b.flat] or a.shape != b.shape:
        differ.append([text, sizes])
print(json.dumps(differ))
"""

MESHES = [
    ("tpu:v5p:2x2x2", {"fsdp": 4, "tensor": 2}),
    ("tpu:v5p:4x4x8", {"data": 2, "fsdp": 16, "tensor": 4}),
    ("tpu:v5e:2x4", {"data": 2, "fsdp": 4}),
    ("tpu:v5e:4x4", {"fsdp": 16}),
    ("tpu:v5e:4x8", {"data": 4, "fsdp": 2, "tensor": 4}),
    ("tpu:v6e:4x4x2slices", {"data": 2, "fsdp": 16}),
    ("tpu:v4:4x4x4", {"fsdp": 8, "tensor": 8}),
    ("tpu:v7x:2x2x1", {"fsdp": 4, "tensor": 2}),
]


def test_meshes_of_stand_ins_are_those_of_the_compilers_devices(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the TPU compiler is installed; elsewhere the pinned order above speaks for it."""
    python = next(
        (p for p in (ROOT / ".venv-compilers/bin/python", Path(sys.executable)) if _has_compiler(p)), None
    )
    if python is None:
        pytest.skip("the TPU compiler (libtpu) is installed neither here nor in .venv-compilers")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": str(ROOT)}
    command = [str(python), "-c", CHILD, json.dumps(MESHES)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


def _has_compiler(python: Path) -> bool:
    if python == Path(sys.executable):
        return importlib.util.find_spec("libtpu") is not None
    return python.exists() and bool(
        list(python.parents[1].glob("lib/python*/site-packages/libtpu/libtpu.so"))
    )


def test_pretend_devices_lie_as_the_real_pretend_ones() -> None:
    shape = MeshShape(data=2, fsdp=2, tensor=2)
    ids = [d.id for d in grid(shape, parse_target("cpu:8")).flat]
    assert ids == [d.id for d in device_mesh(shape).devices.flat]


def links(text: str, axes: str, **sizes: int) -> Links:
    target = parse_target(text)
    return path(grid(MeshShape(**sizes), target), tuple(axes.split()), target)


def test_an_axis_over_whole_dims_has_all_their_links() -> None:
    found = links("tpu:v5e:16x16", "fsdp", fsdp=256)
    assert found.spans == (Span(0, 16, True, 1, 1), Span(1, 16, True, 1, 1))
    assert (found.devices, found.inside, found.islands, found.ring) == (256, 256, 1, 0)


def test_a_part_of_a_ring_is_a_line_and_interleaved_parts_share_it() -> None:
    """A dim of 16 split in 4 x 4: the inner axis has neighbours on an open line, the outer one rings of every fourth."""
    sizes = {"data": 4, "fsdp": 16, "tensor": 4}
    assert links("tpu:v5e:16x16", "tensor", **sizes).spans == (Span(0, 4, False, 1, 1),)
    assert links("tpu:v5e:16x16", "data", **sizes).spans == (Span(0, 4, True, 4, 4),)
    assert links("tpu:v5e:16x16", "fsdp", **sizes).spans == (Span(1, 16, True, 1, 1),)


def test_an_open_dim_shares_its_middle_link() -> None:
    assert links("tpu:v5e:4x4", "data", data=2, fsdp=8).spans == (Span(1, 2, False, 2, 2),)


def test_a_group_that_is_no_box_is_a_ring() -> None:
    """mesh_utils lays a ring through 2x2 chips: the outer axis then pairs the chips of the diagonals."""
    found = links("tpu:v5e:2x2", "fsdp", fsdp=2, tensor=2)
    assert found.spans == ()
    assert found.ring == 2
    assert links("tpu:v5e:2x2", "fsdp tensor", fsdp=2, tensor=2).spans == (
        Span(0, 2, False, 1, 1),
        Span(1, 2, False, 1, 1),
    )


def test_two_devices_of_a_chip_share_its_links() -> None:
    sizes = {"fsdp": 64, "tensor": 2}
    assert links("tpu:v7x:4x4x4", "tensor", **sizes).spans == (Span(3, 2, False, 1, 1),)
    assert {s.shared for s in links("tpu:v7x:4x4x4", "fsdp", **sizes).spans} == {2}
    assert {s.shared for s in links("tpu:v7x:4x4x4", "fsdp tensor", **sizes).spans if s.dim < 3} == {1}


def test_islands_are_slices_or_hosts() -> None:
    two = {"data": 2, "fsdp": 256, "slices": 2}
    assert links("tpu:v6e:16x16x2slices", "data", **two).islands == 2
    assert links("tpu:v6e:16x16x2slices", "fsdp", **two).islands == 1
    assert links("gpu:h100:4x8", "fsdp", data=4, fsdp=8).islands == 1
    assert links("gpu:h100:4x8", "data", data=4, fsdp=8) == Links(("data",), 4, 1, 4)
    assert links("gpu:h100:4x8", "fsdp", fsdp=32) == Links(("fsdp",), 32, 8, 4)
    assert links("gpu:h100:4x8", "fsdp", fsdp=8, tensor=4) == Links(("fsdp",), 8, 2, 4)


@pytest.mark.parametrize("text", ["tpu:v5p:4x4x8", "tpu:v5e:4x8", "tpu:v7x:4x4x4", "gpu:b200:4x8"])
def test_every_axis_of_every_mesh_has_a_path_that_holds_its_devices(text: str) -> None:
    target = parse_target(text)
    draw = np.random.default_rng(0)
    for _ in range(20):
        sizes = [1] * len(AXES)
        for factor in _factors(target.devices):
            sizes[draw.integers(len(AXES))] *= factor
        laid = grid(MeshShape(*sizes), target)
        for axis, size in zip(AXES, sizes, strict=True):
            found = path(laid, (axis,), target)
            assert found.devices == size
            held = math.prod(s.places for s in found.spans)
            assert held in (found.inside, 1) or found.ring


def _factors(n: int) -> list[int]:
    return [2] * int(math.log2(n)) if n & (n - 1) == 0 else [n]


def test_a_mesh_over_the_wrong_number_of_slices_is_refused() -> None:
    def asked(**sizes: Any) -> None:
        grid(MeshShape(**sizes), parse_target("tpu:v6e:4x4x2slices"))

    with pytest.raises(InputError, match=r"laid over 1 slice, but .* has 2\. Set mesh\.slices to 2"):
        asked(data=2, fsdp=16)
    with pytest.raises(InputError, match="asks for 16 devices, but there are 32"):
        asked(fsdp=16, slices=2)
