"""Several products of one activation, as one where that is faster."""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sharding.errors import InputError
from sharding.marks import mark
from sharding.operands import operands_of
from sharding.ops import einsum
from sharding.partitioner import Manual
from sharding.product import product
from sharding.region import current, names_of, tap
from sharding.scope import named


@named
def project(x: Array, names: str, *weights: nnx.Param) -> tuple[Array, ...]:
    """The product of `x`, whose dims are `names`, with each parameter over the names they share.

    `q, k, v = project(x, "batch length embed", self.q, self.k, self.v)` is three einsums: a result's dims are those of
    `x` and then those of the parameter, without the shared ones. Where an axis splits the parameters in use, and nothing
    has to move afterwards, the local products are taken as one: split matrices are narrow, and a narrow product leaves a
    processor idle. Raises InputError when a parameter shares no name with `x`.
    """
    words = tuple(names.split())
    specs, results = [], []
    for weight in weights:
        own = names_of(weight) or ()
        shared = [n for n in words if n in own]
        if not shared:
            raise InputError(f"project: {weight.path} ({' '.join(own)}) shares no name with {names!r}.")
        results.append(tuple(n for n in (*words, *own) if n not in shared))
        specs.append(f"{names}, {' '.join(own)} -> {' '.join(results[-1])}")
    joined = _joined(x, words, weights, specs)
    if joined is None:
        joined = [einsum(spec, x, weight) for spec, weight in zip(specs, weights, strict=True)]
        return tuple(mark(y, "project", names) for names, y in zip(results, joined, strict=True))
    # also called einsum, so that what a remat policy names does not depend on the mesh
    return tuple(
        mark(tap("project", names, y), "einsum", names) for names, y in zip(results, joined, strict=True)
    )


def _joined(
    x: Array, words: tuple[str, ...], weights: tuple[nnx.Param, ...], specs: list[str]
) -> list[Array] | None:
    """The results of one local product, or None where the products are better, or only, taken one by one."""
    region = current()
    if region is None or not region.manual or len(weights) < 2:
        return None
    last = words[-1]
    if any((names_of(w) or ())[:1] != (last,) or set(words[:-1]) & set(names_of(w) or ()) for w in weights):
        return None  # only "... embed" with "embed ...": anything else would be transposed to be joined
    ready = [operands_of(region, spec, (x, w), x.dtype) for spec, w in zip(specs, weights, strict=True)]
    alike = all(r.plan.operands[0] == ready[0].plan.operands[0] and r.union == ready[0].union for r in ready)
    settled = all(not r.plan.reduce and r.plan.produced == r.wanted for r in ready)
    split = any(axes for r in ready for axes in r.plan.operands[1])
    rings = isinstance(region.partitioner, Manual) and region.partitioner.overlap == "ring"
    if rings and ready[0].use[0] != ready[0].plan.operands[0]:
        return None  # one by one, off the same ring
    if not (alike and settled and split):
        return None
    moved = [r.moved(region) for r in ready]
    parts = [w.reshape(w.shape[0], -1) for _, w in moved]
    rows = "abcdefghij"[: x.ndim - 1]
    both = product(f"{rows}y,yz->{rows}z", moved[0][0], jnp.concatenate(parts, axis=1), ())
    ends = [sum(p.shape[1] for p in parts[: i + 1]) for i in range(len(parts) - 1)]
    pieces = jnp.split(both, ends, axis=-1)
    shapes = [w.shape[1:] for _, w in moved]
    assert all(math.prod(s) == p.shape[-1] for s, p in zip(shapes, pieces, strict=True))
    return [p.reshape(*p.shape[:-1], *s) for p, s in zip(pieces, shapes, strict=True)]
