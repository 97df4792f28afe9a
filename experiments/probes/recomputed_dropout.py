"""Dropout under rematerialization: the backward pass draws another mask than the forward pass.

Reported: jax-ml/jax#21046 (open: rbg keys, automatic partitioning), near jax-ml/jax#17982 (open)
Unsafe:   Auto() with remat and random numbers inside the recomputed part: gradients of a function that was not computed.
Do:       Keep the threefry keys that are jax's default; or draw the mask outside of the part that is recomputed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.doctor.grid import at, integers, mesh
from experiments.doctor.verdict import Verdict, compare, worst

NEEDS = {"devices": 2}


def probe(devices: list[Any]) -> Verdict:
    """The mask that the gradient shows, against the one that the forward pass shows, recomputed on a split mesh."""
    n = len(devices)
    grid = mesh(devices, x=n)
    x = integers((4 * n, 8 * n)) + 20  # never 0: a masked entry is told from a value of 0

    def dropped(x: Any, key: Any) -> Any:
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0)

    def loss(x: Any, key: Any) -> Any:
        y = jax.checkpoint(lambda x: dropped(x, key) ** 2)(x)
        return jnp.sum(y), y

    found = []
    for over in (("x",), (None, "x")):
        split = at(grid, *over)
        run = jax.jit(jax.grad(loss, has_aux=True), in_shardings=(split, at(grid)), out_shardings=split)
        gradient, squares = (np.asarray(a) for a in run(x, jax.random.key(3)))
        found.append(
            compare(gradient, np.where(squares > 0, 2 * x, 0).astype(np.float32), what=f"split {over}")
        )
    return worst(found)
