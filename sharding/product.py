"""The local product behind every named contraction of two operands, with its backward pass written out.

XLA:CPU copies the left operand of a product so that what is summed lies last. Of a matrix's gradient the left operand
should therefore be what arrives from above, which is in memory, and not the input, which is often computed again for it
and would be written against its layout: (output, input), as autodiff has it. But XLA:CPU also folds the transpose that
follows into the product and then reads both operands against their layout, at half the speed. So the two are held apart
there; elsewhere the gradient is a contraction of its own and comes out as the matrix lies.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from sharding.region import current


def product(formula: str, a: Array, b: Array) -> Array:
    """`jnp.einsum(formula, a, b)` of local arrays that vary over the same mesh axes; dtype: theirs."""
    left, _, result = formula.partition("->")
    first, second = left.split(",")
    # A letter that only one operand has is summed away before the product: its gradient is no contraction.
    alone = (set(first) - set(second) - set(result)) | (set(second) - set(first) - set(result))
    if alone or a.dtype != b.dtype:
        return jnp.einsum(formula, a, b)
    region = current()
    return _product(formula, region is None or region.platform == "cpu", a, b)


def wide_product(formula: str, a: Array, b: Array) -> Array:
    """`jnp.einsum(formula, a, b)` that is accumulated and kept in float32, or in float64 where the operands are."""
    kept = jnp.float64 if a.dtype == jnp.float64 else jnp.float32
    return jnp.einsum(formula, a, b, preferred_element_type=kept)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(formula: str, cpu: bool, a: Array, b: Array) -> Array:
    return jnp.einsum(formula, a, b)


def _forward(formula: str, cpu: bool, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.einsum(formula, a, b), (a, b)


def _backward(formula: str, cpu: bool, kept: tuple[Array, Array], out: Array) -> tuple[Array, Array]:
    a, b = kept
    left, _, result = formula.partition("->")
    first, second = left.split(",")
    of_a = jnp.einsum(f"{result},{second}->{first}", out, b)
    if not cpu or set(first) & set(second) & set(result):
        return of_a, jnp.einsum(f"{first},{result}->{second}", a, out)
    # (output, input): first what `out` and `b` share, then what `a` and `b` share.
    turned = "".join(sorted(second, key=lambda letter: letter in first))
    of_b = lax.optimization_barrier(jnp.einsum(f"{result},{first}->{turned}", out, a))
    return of_a, jnp.einsum(f"{turned}->{second}", of_b)


_product.defvjp(_forward, _backward)
