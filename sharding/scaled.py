"""Experiment: matrix products of small integers or 8-bit floats, rows and columns scaled by their largest entries.

Each operand is divided, along what is summed over, by its largest absolute entry there: one scale a token of the
activations and one a column of the matrix (Dettmers et al. 2022, arXiv:2208.07339, section 2.1; Micikevicius et al. 2022,
arXiv:2209.05433, for the floats). Where axes split the sum, the largest entry is that of all their devices, so scales and
rounded operands are the same on every mesh; and a token's scale is its own, so that neither the batch nor its
micro-batches change it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from sharding.region import wide

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
"""Type -> the value that a row's largest entry is brought to: for floats the type's largest, for int8 symmetric to 0."""


@dataclass(frozen=True)
class Scaling:
    """How one product is scaled."""

    dtype: str
    sums: tuple[str, ...]
    """Mesh axes that split what is summed over."""


def scaled_product(formula: str, scaling: Scaling, a: Array, b: Array) -> Array:
    """`jnp.einsum(formula, a, b)` of local arrays in the type of `scaling`, summed in int32 or float32 (of float64: in that).

    A product that sums over nothing is computed as it is. Of rows that are not finite the result is not finite either.
    """
    left, _, result = formula.partition("->")
    first, second = left.split(",")
    summed = set(first) & set(second) - set(result)
    if not summed:
        return jnp.einsum(formula, a, b)
    (x, of_a), (y, of_b) = (_rounded(z, term, summed, scaling) for z, term in ((a, first), (b, second)))
    held = jnp.int32 if scaling.dtype == "int8" else of_a.dtype
    made = jnp.einsum(formula, x, y, preferred_element_type=held)
    made = made.astype(of_a.dtype) * _along(of_a, first, result) * _along(of_b, second, result)
    return made.astype(a.dtype)


def _rounded(x: Array, term: str, summed: set[str], scaling: Scaling) -> tuple[Array, Array]:
    """(x / scale in the small type, scale); the scale has the dims of x, those that are summed over of size 1."""
    x = wide(x)
    top = jnp.max(jnp.abs(x), axis=tuple(d for d, n in enumerate(term) if n in summed), keepdims=True)
    if scaling.sums:
        top = lax.pmax(top, scaling.sums)
    least = jnp.asarray(
        jnp.finfo(x.dtype).tiny, x.dtype
    )  # a smaller scale is flushed to zero, and x / 0 is infinite
    scale = jnp.maximum(top / jnp.asarray(LARGEST[scaling.dtype], x.dtype), least)
    y = x / scale
    return (jnp.round(y) if scaling.dtype == "int8" else y).astype(scaling.dtype), scale


def _along(scale: Array, term: str, result: str) -> Array:
    """A scale, whose dims are `term`, with the dims of `result`: size 1 where it has no such dim."""
    own = sorted((n for n in term if n in result), key=result.index)
    turned = jnp.einsum(f"{term}->{''.join(own)}", scale)
    size = dict(zip(own, turned.shape, strict=True))
    return turned.reshape([size.get(n, 1) for n in result])
