"""An update at an index past the end is dropped when the updated dim is split; one device moves it inside.

Reported: openxla/xla#49118 (September 2026, CPU)
Unsafe:   Auto() with lax.dynamic_update_slice whose start can leave less room than the update needs, on a dim that is
          split: a cache that is written past its length, a ring buffer without modulo. The update is lost in silence.
Do:       Clamp the start yourself, jnp.clip(start, 0, size - update); or keep that dim whole.
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
    """Starts inside and outside, updates of one and of three columns of eight, split over two devices."""
    grid = mesh(devices, x=2)
    split, whole = at(grid, None, "x"), at(grid)
    x = np.arange(16, dtype=np.int32).reshape(2, 8)
    found = []
    for width in (1, 3):
        update = np.full((2, width), 99, np.int32)
        run = jax.jit(
            lambda x, update, start: lax.dynamic_update_slice(x, update, (jnp.int32(0), start)),
            in_shardings=(split, whole, whole),
            out_shardings=split,
        )
        for start in (0, 3, 5, 7, 8, 20):
            want, first = x.copy(), min(start, 8 - width)
            want[:, first : first + width] = 99
            got = np.asarray(run(x, update, np.int32(start)))
            found.append(compare(got, want, what=f"{width} columns at {start} of 8"))
    return worst(found)
