"""The operands of a named einsum on a mesh: how they lie, what the plan makes of them, and moving them to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sharding.contraction import Contraction, Plan, parse, plan
from sharding.errors import InputError
from sharding.layout import Dims
from sharding.region import Region, value
from sharding.relayout import varying

Operand = Array | nnx.Param


@dataclass(frozen=True)
class Operands:
    """Operands of an einsum on a mesh, with its plan: ready to be moved and multiplied."""

    arrays: tuple[Array, ...]
    rest: tuple[Dims, ...]
    use: tuple[Dims, ...]
    fixed: tuple[bool, ...]
    """Which are parameters."""
    wanted: Dims
    plan: Plan
    union: frozenset[str]
    """Axes over which the product varies."""

    def moved(self, region: Region) -> list[Array]:
        """The operands as the plan wants them: parameters gathered for use, then everything gathered or sliced."""
        gathered = [
            region.move(x, src, dst, self.union & split_axes(src)) if src != dst else x
            for x, src, dst in zip(self.arrays, self.rest, self.use, strict=True)
        ]
        moves = zip(gathered, self.use, self.plan.operands, strict=True)
        return [region.move(x, src, dst, self.union) for x, src, dst in moves]

    def by_matrix(self) -> bool:
        """Whether a matrix of parameters takes part, and an activation."""
        matrix = any(fixed and x.ndim > 1 for fixed, x in zip(self.fixed, self.arrays, strict=True))
        return matrix and not all(self.fixed)

    def stated(self, region: Region, formula: str) -> Array:
        """The product under XLA's partitioner, which stays free where nothing has to move but the sums.

        Elsewhere the plan is stated, to operands and product, and through their transposes to the gradients: for some
        layouts that it has to bring together by itself, XLA computes another product (decision 0009).
        """
        free = self.plan.only_reduces(self.use, self.wanted)
        laid = []
        for x, fixed, use, dims in zip(self.arrays, self.fixed, self.use, self.plan.operands, strict=True):
            used = region.constrain(x, use) if fixed else x
            laid.append(used if free or (fixed and use == dims) else region.constrain(used, dims))
        made = jnp.einsum(formula, *laid)
        if free or self.plan.produced == self.wanted:
            return made
        return region.constrain(made, self.plan.produced)


def operands_of(
    region: Region,
    spec: str,
    operands: tuple[Operand, ...],
    dtype: jnp.dtype,
    choose: Callable[[Contraction], Plan] = plan,
) -> Operands:
    """Plan an einsum on a mesh; nothing moves yet. In the manual region arrays are shards, under XLA whole."""
    terms, result = parse(spec)
    wanted, sizes = region.dims(result), region.layouts.sizes
    fixed = tuple(isinstance(x, nnx.Variable) for x in operands)
    arrays = tuple(value(x, dtype) for x in operands)
    rest, use, shapes = [], [], []
    for x, array, names in zip(operands, arrays, terms, strict=True):
        at_rest, in_use = operand_lies(region, x, names)
        rest.append(at_rest)
        use.append(in_use)
        parts = _counts(at_rest, sizes) if region.manual else [1] * array.ndim
        shapes.append(_in_parts(spec, array.shape, parts, _counts(in_use, sizes)))
    items, held = tuple(x.dtype.itemsize for x in arrays), tuple(region.held(x) for x in arrays)
    asked = Contraction(spec, tuple(use), tuple(shapes), items, wanted, tuple(sizes.items()), held, fixed)
    best = choose(asked)
    # Over these the product varies: what splits it, and what operands vary over for other reasons than their layout.
    # An axis that was gathered from every operand is not among them: the result is equal over it, and typed so.
    other = (varying(x).difference(*lies) for x, lies in zip(arrays, rest, strict=True))
    union = frozenset().union(*other, *(a for dims in best.operands for a in dims))
    return Operands(arrays, tuple(rest), tuple(use), fixed, wanted, best, union)


def operand_lies(region: Region, x: Operand, names: tuple[str, ...]) -> tuple[Dims, Dims]:
    """How an operand lies here, and how it is used: a parameter at rest and in its `compute` role."""
    if isinstance(x, nnx.Variable):
        layouts = region.param(x)
        return layouts.param.dims, layouts.compute.dims
    return region.dims(names), region.dims(names)


def split_axes(dims: Dims) -> frozenset[str]:
    """Every axis that splits some dim."""
    return frozenset(a for dim in dims for a in dim)


def _counts(dims: Dims, sizes: Mapping[str, int]) -> list[int]:
    """Devices that split each dim."""
    return [math.prod(sizes[a] for a in dim) for dim in dims]


def _in_parts(spec: str, shape: tuple[int, ...], now: list[int], then: list[int]) -> tuple[int, ...]:
    """Shape of one of `then` parts of each dim, given the shape of one of the parts `now`."""
    for n, before, after in zip(shape, now, then, strict=True):
        if n * before % after:
            raise InputError(
                f"einsum {spec!r}: an operand's dim of {n * before} is split into {after} parts, which does not divide. "
                f"Make it a multiple of {after}, or the axes that split it smaller."
            )
    return tuple(n * before // after for n, before, after in zip(shape, now, then, strict=True))
