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

from sharding.partitioner import Manual
from sharding.region import current
from sharding.scaled import Scaling, scaled_product


def product(formula: str, a: Array, b: Array, scaled_over: tuple[str, ...] | None = None) -> Array:
    """`jnp.einsum(formula, a, b)` of local arrays that vary over the same mesh axes; dtype: theirs.

    scaled_over: the axes that split what is summed over, where the product may be one in 8 bits (`Manual(products=...)`);
    None where it may not.
    """
    left, _, result = formula.partition("->")
    first, second = left.split(",")
    # A letter that only one operand has is summed away before the product: its gradient is no contraction.
    alone = (set(first) - set(second) - set(result)) | (set(second) - set(first) - set(result))
    if alone or a.dtype != b.dtype:
        return jnp.einsum(formula, a, b)
    region = current()
    by, scaling = region.partitioner if region else None, None
    if isinstance(by, Manual) and by.products != "none" and scaled_over is not None:
        scaling = Scaling(by.products, scaled_over)
    return _product(formula, region is None or region.platform == "cpu", scaling, a, b)


def wide_product(formula: str, a: Array, b: Array) -> Array:
    """`jnp.einsum(formula, a, b)` that is accumulated and kept in float32, or in float64 where the operands are."""
    kept = jnp.float64 if a.dtype == jnp.float64 else jnp.float32
    return jnp.einsum(formula, a, b, preferred_element_type=kept)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(formula: str, cpu: bool, scaling: Scaling | None, a: Array, b: Array) -> Array:
    return _computed(formula, scaling, a, b)


def _computed(formula: str, scaling: Scaling | None, a: Array, b: Array) -> Array:
    return jnp.einsum(formula, a, b) if scaling is None else scaled_product(formula, scaling, a, b)


def _forward(
    formula: str, cpu: bool, scaling: Scaling | None, a: Array, b: Array
) -> tuple[Array, tuple[Array, Array]]:
    # not by `_product`: a call within hides the product from remat="dots"
    return _computed(formula, scaling, a, b), (a, b)


def _backward(
    formula: str, cpu: bool, scaling: Scaling | None, kept: tuple[Array, Array], out: Array
) -> tuple[Array, Array]:
    """Of the product as it would be unscaled: what rounding does to operands passes gradients straight through."""
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
