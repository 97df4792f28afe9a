"""A product left unreduced, then laid out part split, part whole: the partitioner leaves out an all-reduce.

Reported: openxla/xla#40034 (open; seen on 4096 GPUs)
Unsafe:   Explicit meshes: `reshard` from `unreduced={...}` over several axes to a layout that names only some of them:
          replicas keep different partial sums.
Do:       Reshard in two steps, one axis at a time, and check the replicas; or use Manual(), which reduces by name.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.doctor.grid import P, integers, mesh, put
from experiments.doctor.verdict import Verdict, compare, worst

NEEDS = {"devices": 8}

TARGETS = (
    P(None, None),
    P("a", None),
    P(None, "b"),
    P("c", "a"),
    P(("a", "b"), None),
    P(None, ("b", "c")),
    P(("c", "a"), "b"),
)


def probe(devices: list[Any]) -> Verdict:
    """Every shard of every replica, for contractions over two and three axes and seven layouts of the result."""
    grid = mesh(devices, "explicit", a=2, b=2, c=2)
    x, w = integers((8, 16), 4), integers((16, 8), 4, seed=1)
    want = x @ w
    found = []
    with jax.set_mesh(grid):
        for over in (("a", "b"), ("c", "a"), ("a", "b", "c")):
            for target in TARGETS:

                def product(x: Any, w: Any, over: tuple = over, target: Any = target) -> Any:
                    partial = jnp.einsum(
                        "ik,kj->ij", x, w, out_sharding=P(None, None, unreduced=frozenset(over))
                    )
                    return jax.sharding.reshard(partial, target)

                y = jax.jit(product)(put(x, grid, None, over), put(w, grid, over, None))
                for s in y.addressable_shards:
                    name = f"unreduced over {over} to {target}, {s.device}"
                    found.append(compare(np.asarray(s.data), want[s.index], what=name))
    return worst(found)
