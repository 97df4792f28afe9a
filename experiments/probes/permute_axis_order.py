"""A permute over several axes numbers the devices in the mesh's order, not in the order in which the axes are named.

Reported: found here with jax 0.10.2; newer jax numbers them as named, and raises unless
          jax.raise_on_ppermute_sort_diff(False) says that this is meant
Unsafe:   lax.ppermute(x, ("tensor", "data"), ...): axis_index, all_gather and psum_scatter count with data inside, ppermute
          with tensor inside, so blocks go to the wrong devices.
Do:       Name the axes in the mesh's order (replica, stage, data, fsdp, expert, context, tensor), or permute over one axis.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax

from experiments.doctor.grid import P, mesh
from experiments.doctor.verdict import Verdict, compare

NEEDS = {"devices": 4}


def probe(devices: list[Any]) -> Verdict:
    """A ring over two axes, named inner axis first: each device must get what the one with the index before it sent."""
    sizes = (2, len(devices) // 2)
    grid, n = mesh(devices, d=sizes[0], t=sizes[1]), sizes[0] * sizes[1]
    ring = [(i, (i + 1) % n) for i in range(n)]
    spec = P(("t", "d"))
    try:
        run = jax.jit(
            jax.shard_map(
                lambda x: lax.ppermute(x, ("t", "d"), ring), mesh=grid, in_specs=spec, out_specs=spec
            )
        ).lower(np.arange(n, dtype=np.int32))
    except (RuntimeError, TypeError, ValueError) as error:
        return Verdict("ok", f"refused by jax: {type(error).__name__}")
    got = np.asarray(run.compile()(np.arange(n, dtype=np.int32)))
    return compare(got, np.roll(np.arange(n, dtype=np.int32), 1))
