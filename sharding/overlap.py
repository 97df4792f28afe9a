"""Collective matmul: the gather before a product, or the reduce-scatter after one, as a ring of partial products.

Wang et al. 2023 ("Overlap communication with dependent computation via decomposition in large deep learning models",
ASPLOS): while one block is multiplied the next one travels to the neighbour, so that a compiler with asynchronous
permutes hides all traffic but the first block's. The bytes are those of the collective that the ring takes the place of:
n - 1 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from sharding.layout import Dims
from sharding.operands import Operands, split_axes
from sharding.product import product
from sharding.region import Region
from sharding.relayout import finish, vary

Names = tuple[str, ...]


@dataclass(frozen=True)
class Ring:
    """One dim of one operand, cut into a block a device of `axis`; the result has the dim too and the other operand not."""

    operand: int
    name: str
    axis: str


def ring_product(
    region: Region, formula: str, terms: tuple[Names, ...], result: Names, ready: Operands
) -> Array | None:
    """The product of planned operands, at its layout, with one collective as a ring; None where the plan has none that
    can be: an activation gathered over one axis along a dim of the result, or a sum over one axis that is scattered along
    an activation's dim.
    """
    if len(terms) != 2:
        return None
    plan, wanted = ready.plan, ready.wanted
    ring = _gathers(terms, result, ready)
    if ring is not None:
        other = _brought(region, ready, 1 - ring.operand)
        blocks = _travelling(region, ready, ring, terms[ring.operand].index(ring.name))
        parts = [_product(formula, ring, block, other) for block in blocks]
        at = result.index(ring.name)
        made = _turned(jnp.concatenate(parts, axis=at), ring.axis, at, len(parts))
        return finish(made, plan.reduce, plan.produced, wanted)
    ring = _scatters(terms, result, ready)
    if ring is None:
        return None
    x, other = (_brought(region, ready, i) for i in (ring.operand, 1 - ring.operand))
    n, at = lax.axis_size(ring.axis), terms[ring.operand].index(ring.name)
    # Block i - 1, i - 2, ... of device i: its partial sum has come from device i - 1, which added the same block before.
    turned = _turned(vary(x, frozenset({ring.axis})), ring.axis, at, n, back=True)
    made = None
    for block in reversed(lax.split(turned, (x.shape[at] // n,) * n, at)):
        part = _product(formula, ring, block, other)
        made = part if made is None else _to_next(made, ring.axis, n) + part
    return made


def _gathers(terms: tuple[Names, ...], result: Names, ready: Operands) -> Ring | None:
    """The ring in the place of a gather: the one activation that moves loses the last axis of one dim."""
    moved = [i for i, fixed in enumerate(ready.fixed) if not fixed and ready.use[i] != ready.plan.operands[i]]
    if len(moved) != 1:
        return None
    (at,) = moved
    found = _one_axis(ready.plan.operands[at], ready.use[at])
    if found is None:
        return None
    name = terms[at][found[0]]
    alone = name in result and name not in terms[1 - at] and found[1] in ready.union
    return Ring(at, name, found[1]) if alone else None


def _scatters(terms: tuple[Names, ...], result: Names, ready: Operands) -> Ring | None:
    """The ring in the place of a reduce-scatter: the sum's only axis is laid on one dim of the result, inside its split."""
    found = _one_axis(ready.plan.produced, ready.wanted)
    if found is None or ready.plan.reduce != (found[1],):
        return None
    name = result[found[0]]
    holders = [i for i, term in enumerate(terms) if name in term and not ready.fixed[i]]
    alone = len(holders) == 1 and sum(name in term for term in terms) == 1
    return Ring(holders[0], name, found[1]) if alone else None


def _one_axis(less: Dims, more: Dims) -> tuple[int, str] | None:
    """(dim, axis) where `more` is `less` with one axis at the end of one dim, else None."""
    differ = [d for d, (a, b) in enumerate(zip(less, more, strict=True)) if a != b]
    if len(differ) != 1 or more[differ[0]][:-1] != less[differ[0]]:
        return None
    return differ[0], more[differ[0]][-1]


def _brought(region: Region, ready: Operands, at: int) -> Array:
    """One operand as the plan wants it: a parameter gathered for use, then gathered or sliced."""
    x, rest, use = ready.arrays[at], ready.rest[at], ready.use[at]
    x = x if rest == use else region.move(x, rest, use, ready.union & split_axes(rest))
    return region.move(x, use, ready.plan.operands[at], ready.union)


def _travelling(region: Region, ready: Operands, ring: Ring, at: int) -> list[Array]:
    """This device's block of the operand, then that of the next device, and so on; shared by every product of it."""
    lies, n = ready.use[ring.operand], lax.axis_size(ring.axis)
    block = region.move(ready.arrays[ring.operand], lies, lies, ready.union)
    blocks = [block]
    for _ in range(n - 1):
        block = region.once(block, ("ring", ring.axis, at), lambda x=block: _to_previous(x, ring.axis, n))
        blocks.append(block)
    return blocks


def _to_previous(x: Array, axis: str, n: int) -> Array:
    return lax.ppermute(x, axis, [(i, (i - 1) % n) for i in range(n)])


def _to_next(x: Array, axis: str, n: int) -> Array:
    return lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


def _product(formula: str, ring: Ring, block: Array, other: Array) -> Array:
    return product(formula, *((block, other) if ring.operand == 0 else (other, block)))


def _turned(x: Array, axis: str, at: int, n: int, back: bool = False) -> Array:
    """Dim `at`, whose n blocks begin with this device's own, turned so that they begin with block 0; `back`: the inverse."""
    shift = lax.axis_index(axis) * (x.shape[at] // n)
    return jnp.roll(x, -shift if back else shift, axis=at)
