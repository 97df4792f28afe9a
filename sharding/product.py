"""The local product behind every named contraction of two operands, with its backward pass written out.

Autodiff makes a matrix's gradient as (output, input) and transposes it; XLA:CPU folds that transpose into a product
whose operands it then reads against their layout, at half the speed. Written as a contraction of its own, the gradient
comes out as the matrix lies.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def product(formula: str, a: Array, b: Array) -> Array:
    """`jnp.einsum(formula, a, b)` of local arrays that vary over the same mesh axes; dtype: theirs."""
    left, _, result = formula.partition("->")
    first, second = left.split(",")
    # A letter that only one operand has is summed away before the product: its gradient is no contraction.
    alone = (set(first) - set(second) - set(result)) | (set(second) - set(first) - set(result))
    return jnp.einsum(formula, a, b) if alone or a.dtype != b.dtype else _product(formula, a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(formula: str, a: Array, b: Array) -> Array:
    return jnp.einsum(formula, a, b)


def _forward(formula: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.einsum(formula, a, b), (a, b)


def _backward(formula: str, kept: tuple[Array, Array], out: Array) -> tuple[Array, Array]:
    a, b = kept
    left, _, result = formula.partition("->")
    first, second = left.split(",")
    of_a = jnp.einsum(f"{result},{second}->{first}", out, b)
    of_b = jnp.einsum(f"{first},{result}->{second}", a, out)
    return of_a, of_b


_product.defvjp(_forward, _backward)
