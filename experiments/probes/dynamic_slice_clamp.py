"""A slice that begins too late is moved inside by each shard on its own, when the sliced dim is split.

Reported: openxla/xla#49122 (September 2026, CPU; open). Wrong with jaxlib 0.10.2, right with 0.12.0
Unsafe:   Auto() with lax.dynamic_slice whose start can leave less room than the slice needs, when the result is split along
          that dim: shards return the same columns twice.
Do:       Clamp the start yourself, jnp.clip(start, 0, size - slice); or keep that dim whole.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.doctor.grid import at, mesh
from experiments.doctor.verdict import Verdict, compare, worst

NEEDS = {"devices": 2}


def probe(devices: list[Any]) -> Verdict:
    """Six columns of eight from starts inside and outside, the result split over two devices."""
    grid = mesh(devices, x=2)
    split = at(grid, None, "x")
    x = np.arange(16, dtype=np.int32).reshape(2, 8)
    run = jax.jit(
        lambda x, start: lax.dynamic_slice(x, (jnp.int32(0), start), (2, 6)),
        in_shardings=(split, at(grid)),
        out_shardings=split,
    )
    found = []
    for start in (0, 1, 2, 3, 7, 20):
        first = min(start, 2)
        want = x[:, first : first + 6]
        found.append(compare(np.asarray(run(x, np.int32(start))), want, what=f"6 columns at {start} of 8"))
    return worst(found)
