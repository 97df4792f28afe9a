"""Collectives over the axes of a mesh, against NumPy on the host.

Each device holds a block of its own random numbers, so that a swapped rank, a block read from the wrong place, a missing or a
doubled reduction all show. Sums are of small integers in floats and of whole-range integers that wrap, so they must be equal
to the bit; with `values="normal"` they are of rounded numbers, and held to gamma_g * sum |x| for a group of g devices, in
whatever order they are added (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 4.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.doctor.cases import Axes, Case
from experiments.doctor.verdict import Verdict, compare, worst


@dataclass(frozen=True)
class Collective:
    """`call(block, axes, g)` runs on a device, `block` [n]; `expected(blocks)` says on the host what must come out:
    [groups, g, n] -> [groups, g, m], where row i is what the i-th device of a group holds.
    """

    call: Callable[[Any, Axes, int], Any]
    expected: Callable[[np.ndarray], np.ndarray]


def _ring(g: int) -> list[tuple[int, int]]:
    return [(i, (i + 1) % g) for i in range(g)]


def _to_last(x: np.ndarray) -> np.ndarray:
    """The first of a group sends to the last; who receives nothing holds zeros."""
    return np.concatenate([np.zeros_like(x[:, 1:]), x[:, :1]], axis=1)


def _exchanged(x: np.ndarray) -> np.ndarray:
    groups, g, n = x.shape
    return x.reshape(groups, g, g, n // g).swapaxes(1, 2).reshape(groups, g, n)


def _sum(x: np.ndarray) -> np.ndarray:
    return x.sum(1, dtype=x.dtype)


COLLECTIVES: dict[str, Collective] = {
    "all-reduce": Collective(
        lambda x, axes, g: lax.psum(x, axes),
        lambda x: np.broadcast_to(_sum(x)[:, None], x.shape),
    ),
    "all-reduce max": Collective(
        lambda x, axes, g: lax.pmax(x, axes),
        lambda x: np.broadcast_to(x.max(1, keepdims=True), x.shape),
    ),
    "reduce-scatter": Collective(
        lambda x, axes, g: lax.psum_scatter(x, axes, tiled=True),
        lambda x: _sum(x).reshape(x.shape[0], x.shape[1], -1),
    ),
    "all-gather": Collective(
        lambda x, axes, g: lax.all_gather(x, axes, tiled=True),
        lambda x: np.broadcast_to(x.reshape(len(x), 1, -1), (*x.shape[:2], x.shape[1] * x.shape[2])),
    ),
    "all-to-all": Collective(
        lambda x, axes, g: lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True), _exchanged
    ),
    "permute": Collective(
        lambda x, axes, g: lax.ppermute(x, axes, _ring(g)), lambda x: np.roll(x, 1, axis=1)
    ),
    "permute first to last": Collective(lambda x, axes, g: lax.ppermute(x, axes, [(0, g - 1)]), _to_last),
}
"""Every collective that a training step uses, by the names of `experiments.doctor.cases`."""


def examine(case: Case, mesh: Mesh, table: Mapping[str, Collective] = COLLECTIVES) -> Verdict:
    """Run a case on a mesh of every process's devices and hold this process's shards against NumPy.

    Raises whatever the backend raises. Seeds are fixed: every process makes the same numbers.
    """
    collective = table[case.collective]
    with jax.enable_x64(case.dtype == "float64"):
        names = tuple(mesh.axis_names)
        g = math.prod(mesh.shape[a] for a in case.axes)
        dtype = jnp.dtype(case.dtype)
        n = g * max(1, case.size // dtype.itemsize // g)
        x = _blocks(case, mesh.size, n, g)
        spec = PartitionSpec(names)
        run = jax.shard_map(
            lambda block: collective.call(block, case.axes, g), mesh=mesh, in_specs=spec, out_specs=spec
        )
        flat = x.reshape(-1)
        y = jax.jit(run)(
            jax.make_array_from_callback(flat.shape, NamedSharding(mesh, spec), lambda i: flat[i])
        )
        shards = [(s.index[0].start or 0, np.asarray(s.data)) for s in y.addressable_shards]
    wide = x if case.values == "exact" else x.astype(np.longdouble if dtype == np.float64 else np.float64)
    want, bound = _expected(collective, wide, mesh, case)
    return worst(
        compare(part, want[p].astype(dtype), bound[p], f"device {p}")
        for start, part in shards
        for p in (start // want.shape[1],)
    )


def _blocks(case: Case, devices: int, n: int, g: int) -> np.ndarray:
    """[devices, n] numbers, other ones in each block."""
    draw, dtype = np.random.default_rng(len(case.axes) + n), jnp.dtype(case.dtype)
    if case.dtype == "bool":
        return draw.integers(0, 2, (devices, n)).astype(bool)
    if not jnp.issubdtype(dtype, jnp.floating):
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        return draw.integers(least, most, (devices, n), dtype=dtype, endpoint=True)
    if case.values == "normal":
        return draw.standard_normal((devices, n)).astype(dtype)
    # integers whose sums over a group, in any order, are integers that the dtype holds exactly
    most = max(1, min(127, int(2 / float(jnp.finfo(dtype).eps)) // g))
    return draw.integers(-most, most, (devices, n), dtype=np.int8, endpoint=True).astype(dtype)


def _expected(collective: Collective, x: np.ndarray, mesh: Mesh, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """What each device must hold [devices, m], and by how much it may depart ([devices, m], or zeros)."""
    shape = [mesh.shape[a] for a in mesh.axis_names]
    where = [mesh.axis_names.index(a) for a in case.axes]
    order = [*(i for i in range(len(shape)) if i not in where), *where]
    g = math.prod(shape[i] for i in where)

    def grouped(blocks: np.ndarray) -> np.ndarray:
        return blocks.reshape(*shape, -1).transpose(*order, len(shape)).reshape(-1, g, blocks.shape[1])

    def ungrouped(result: np.ndarray) -> np.ndarray:
        inner = [shape[i] for i in order]
        back = [*np.argsort(order), len(shape)]
        return result.reshape(*inner, -1).transpose(*back).reshape(len(x), -1)

    want = ungrouped(collective.expected(grouped(x)))
    if case.values == "exact":
        return want, np.zeros(len(x))
    unit = g * float(jnp.finfo(jnp.dtype(case.dtype)).eps) / 2
    return want, ungrouped(collective.expected(grouped(np.abs(x)))).astype(float) * (unit / (1 - unit))
