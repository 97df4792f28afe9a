"""Arrays joined along a dim that is split: each copy is added, so results are too large by the size of the other axis.

Reported: jax-ml/jax#19106 (open) and jax-ml/jax#24576 (jax 0.4.21 to 0.4.34; CPU, GPU)
Unsafe:   Auto(), and jnp outside of jit, with concatenate along a dim that is split over some of several mesh axes.
Do:       Constrain the operands to be whole along that dim before joining them, or join inside shard_map.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.doctor.grid import mesh, put
from experiments.doctor.verdict import Verdict, compare, worst

NEEDS = {"devices": 4}


def probe(devices: list[Any]) -> Verdict:
    """Layouts of two operands on a mesh of two axes, with and without jit."""
    n = len(devices) // 2
    grid = mesh(devices, d=n, t=2)
    lengths = {(): 3, ("d",): 2 * n, ("t",): 10, (("d", "t"),): 4 * n}
    found = []
    for left, right in (
        ((), ("t",)),
        (("d",), ("d",)),
        (("t",), ("d",)),
        (("d",), ()),
        ((("d", "t"),), ("t",)),
    ):
        a = np.arange(lengths[left], dtype=np.float32)
        b = 100 + np.arange(lengths[right], dtype=np.float32)
        for join in (lambda a, b: jnp.concatenate([a, b]), jax.jit(lambda a, b: jnp.concatenate([a, b]))):
            got = np.asarray(join(put(a, grid, *left), put(b, grid, *right)))
            found.append(compare(got, np.concatenate([a, b]), what=f"{left} and {right}"))
    return worst(found)
