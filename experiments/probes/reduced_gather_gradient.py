"""The gradient through a `reduced` array, gathered where rows are whole over a reduced axis: too large by that axis's size.

Reported: found with this probe on jax 0.10.2 and 0.12.0; near openxla/xla#42481, where the rows are split
Unsafe:   Explicit meshes: `w.at[i].get(out_sharding=...)` of a `w` that is `reduced` over an axis over which i and the
          result are whole. jax accepts it, and the gradient of w comes out times the size of the axis.
Do:       Name in `reduced=` only axes that split the tokens; or use Manual() or Auto(), which are right here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.doctor.grid import P, integers, mesh, put
from experiments.doctor.verdict import Verdict, compare

NEEDS = {"devices": 4}


def probe(devices: list[Any]) -> Verdict:
    """One gradient against np.add.at; when jax refuses the program by its types, that is well too."""
    grid = mesh(devices, "explicit", d=2, t=len(devices) // 2)
    tokens = np.random.default_rng(1).integers(0, 32, (4, 8)).astype(np.int32)
    cotangent = integers((4, 8, 4))
    want = np.zeros((32, 4), np.float32)
    np.add.at(want, tokens, cotangent)
    with jax.set_mesh(grid):

        def loss(w: Any, i: Any, c: Any) -> Any:
            whole = jax.sharding.reshard(w, P(None, None, reduced=frozenset("t")))
            return jnp.sum(whole.at[i].get(out_sharding=P("d", None, None)) * c)

        given = (put(np.zeros_like(want), grid, "t"), put(tokens, grid, "d"), put(cotangent, grid, "d"))
        try:
            run = jax.jit(jax.grad(loss)).lower(*given)
        except (TypeError, ValueError) as error:
            return Verdict("ok", f"refused by jax's types: {type(error).__name__}")
        return compare(np.asarray(run.compile()(*given)), want)
