"""Random numbers drawn inside a jitted function depend on how the result is split.

Reported: jax-ml/jax#40232 (jax 0.8.3, 256 devices), jax-ml/jax#21232 (open; without jax_threefry_partitionable)
Unsafe:   initial parameters, dropout and data noise differ from mesh to mesh, so a run cannot be compared with one on
          another mesh, nor gone on with there.
Do:       Keep jax_threefry_partitionable at its default (true); draw on one device and lay the result out with
          jax.device_put.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from experiments.doctor.grid import at, mesh
from experiments.doctor.verdict import Verdict, compare, worst

NEEDS = {"devices": 2, "seconds": 120.0}

DRAWS: dict[str, Any] = {
    "normal": lambda key, shape: jax.random.normal(key, shape),
    "truncated_normal": lambda key, shape: jax.random.truncated_normal(key, -2.0, 2.0, shape),
    "bernoulli": lambda key, shape: jax.random.bernoulli(key, 0.1, shape),
}


def probe(devices: list[Any]) -> Verdict:
    """Three distributions, bitwise equal to one device, with either dim and both dims split."""
    n = 1 << (len(devices).bit_length() - 1)
    grids = [(mesh(devices, x=n), ("x",))]
    if n > 2:
        two = mesh(devices, x=2, y=n // 2)
        grids += [(two, ("x", "y")), (two, (None, "x")), (two, (("y", "x"),))]
    shape, key = (31 * n, 62), jax.random.key(0)
    found = []
    for name, draw in DRAWS.items():
        want = np.asarray(jax.jit(lambda key, draw=draw: draw(key, shape))(key))
        for grid, over in grids:
            if any(size % n for size, axes in zip(shape, over, strict=False) if axes and size != shape[0]):
                continue
            run = jax.jit(lambda key, draw=draw: draw(key, shape), out_shardings=at(grid, *over))
            found.append(compare(np.asarray(run(key)), want, what=f"{name} split {over}"))
    return worst(found)
