"""Gradients through collectives in a region: each must be the transpose of what it does, none scaled by the axis size.

Reported: jax-ml/jax#3970 (open: psum's gradient under pmap), jax-ml/jax#36886 (open: a gradient taken inside shard_map)
Unsafe:   Manual(), whose backward pass is made of these: gradients off by the size of an axis.
Do:       Do not train with Manual() on this jax; Auto() does not depend on it. Inside shard_map take per-device gradients
          only of values made varying with lax.pcast(x, axis, to="varying").
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.doctor.grid import P, integers, mesh
from experiments.doctor.verdict import Verdict, compare, worst

NEEDS = {"devices": 2, "seconds": 90.0}

REGION: dict[str, Any] = {
    "all-reduce": lambda x, n: lax.psum(x, "x") * (1 + lax.axis_index("x")).astype(x.dtype),
    "all-gather": lambda x, n: lax.all_gather(x, "x", tiled=True),
    "reduce-scatter": lambda x, n: lax.psum_scatter(x, "x", tiled=True),
    "all-to-all": lambda x, n: lax.all_to_all(x, "x", split_axis=0, concat_axis=0, tiled=True),
    "permute": lambda x, n: lax.ppermute(x, "x", [(i, (i + 1) % n) for i in range(n)]),
    "permute in part": lambda x, n: lax.ppermute(x, "x", [(0, n - 1)]),
}


def probe(devices: list[Any]) -> Verdict:
    """Each collective: <c, A x> = <A' c, x> for all unit x, A read off the forward pass; and both kinds of gradient."""
    n = len(devices)
    grid = mesh(devices, x=n)
    found = []
    for name, call in REGION.items():
        run = jax.shard_map(lambda x, call=call: call(x, n), mesh=grid, in_specs=P("x"), out_specs=P("x"))
        y, back = jax.vjp(jax.jit(run), jnp.zeros(n * n, jnp.float32))
        forward = np.asarray(jax.jit(jax.vmap(run))(np.eye(n * n, dtype=np.float32)))
        cotangent = integers(y.shape)
        found.append(compare(np.asarray(back(cotangent)[0]), forward @ cotangent, what=name))
    return worst([*found, *_inside(grid, n)])


def _inside(grid: Any, n: int) -> list[Verdict]:
    """Of an invariant value, the gradient inside a region is the sum over devices; of a varying one, each device's own."""
    samples, w = integers((n, 3)), np.ones((1, 3), np.float32)

    def gradient(w: Any, x: Any) -> Any:
        return jax.grad(lambda w: jnp.sum(w * x))(w)

    def own(w: Any, x: Any) -> Any:
        return gradient(lax.pcast(w, "x", to="varying"), x)

    summed = jax.jit(jax.shard_map(gradient, mesh=grid, in_specs=(P(), P("x")), out_specs=P()))(w, samples)
    each = jax.jit(jax.shard_map(own, mesh=grid, in_specs=(P(), P("x")), out_specs=P("x")))(w, samples)
    return [
        compare(np.asarray(summed)[0], samples.sum(0), what="gradient of an invariant value"),
        compare(np.asarray(each).reshape(n, 3), samples, what="gradient of a varying value"),
    ]
