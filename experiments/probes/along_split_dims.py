"""cumsum, sort, top_k, argmax and their like along a dim that is split: each shard answers for itself.

Reported: jax-ml/jax#21403 (cumsum, GPU), jax-ml/jax#19271 (top_k, 8 GPUs, open), tenstorrent/tt-mlir#8623 (argmax)
Unsafe:   Auto() with such a function along a dim that is split: positions from cumsum of a mask, routing of experts with
          top_k, sampling with argmax over a split vocabulary.
Do:       Constrain the operand to be whole along that dim first; or use Manual(), whose named ops gather by name.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.doctor.grid import at, mesh
from experiments.doctor.verdict import Verdict, compare, worst

NEEDS = {"devices": 2, "seconds": 120.0, "quick": False}

FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "cumsum": (lambda x: jnp.cumsum(x, -1), lambda x: x.cumsum(-1)),
    "cummax": (lambda x: lax.cummax(x, 1), lambda x: np.maximum.accumulate(x, -1)),
    "sort": (lambda x: jnp.sort(x, -1), lambda x: np.sort(x, -1)),
    "argsort": (lambda x: jnp.argsort(x, -1), lambda x: np.argsort(x, -1).astype(np.int32)),
    "argmax": (lambda x: jnp.argmax(x, -1), lambda x: np.argmax(x, -1).astype(np.int32)),
    "top_k": (lambda x: lax.top_k(x, 5)[0], lambda x: -np.sort(-x, -1)[:, :5]),
    "top_k places": (lambda x: lax.top_k(x, 5)[1], lambda x: np.argsort(-x, -1)[:, :5].astype(np.int32)),
    "roll": (lambda x: jnp.roll(x, 3, -1), lambda x: np.roll(x, 3, -1)),
    "flip": (lambda x: x[:, ::-1], lambda x: x[:, ::-1]),
    "shift": (lambda x: x[:, 1:] - x[:, :-1], lambda x: x[:, 1:] - x[:, :-1]),
    "pad": (lambda x: jnp.pad(x, ((0, 0), (3, 5))), lambda x: np.pad(x, ((0, 0), (3, 5)))),
    "every third": (lambda x: x[:, 1::3], lambda x: x[:, 1::3]),
    "flatten": (lambda x: x.reshape(-1), lambda x: x.reshape(-1)),
}
"""What runs on the devices and what NumPy says; the numbers are distinct integers, so all results are exact."""


def probe(devices: list[Any]) -> Verdict:
    """Each function with its dim over one axis, and over two of which the inner comes first."""
    n = 1 << (len(devices).bit_length() - 1)
    x = np.random.default_rng(0).permutation(4 * 16 * n).reshape(4, 16 * n).astype(np.float32)
    layouts: list[tuple[Any, Any]] = [(mesh(devices, x=n), "x")]
    if n > 2:
        layouts.append((mesh(devices, x=2, y=n // 2), ("y", "x")))
    return worst(
        compare(
            np.asarray(jax.jit(run, in_shardings=at(grid, None, over))(x)), say(x), what=f"{name} over {over}"
        )
        for grid, over in layouts
        for name, (run, say) in FUNCTIONS.items()
    )
