"""Plans of named contractions: which collectives an einsum needs for given layouts, with the fewest bytes. No jax.

A mesh axis can do one of two things while the product is computed: split one of the einsum's names, or nothing. Every
assignment of axes gives a correct plan: operands are gathered or sliced to it, the product is taken locally, sums over
a split name are reduced, and the result is brought to its layout. Of the plans with the fewest local products (no
device repeats another's work where it can be avoided) the one wins in which each device sends the fewest bytes forward.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from sharding.errors import InputError
from sharding.layout import Dims
from sharding.moves import finish_bytes, relayout_bytes

Names = tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What one named contraction does on each device, in order."""

    operands: tuple[Dims, ...]
    """Layout to which each operand is brought before the local product."""
    reduce: tuple[str, ...]
    """Axes over which the local products are partial sums."""
    produced: Dims
    """Layout of the local products (partial sums still to be reduced)."""
    bytes: int
    """Bytes that each device sends in the forward pass."""
    products: int
    """Scalar multiplications on each device."""


@functools.lru_cache(maxsize=4096)
def parse(spec: str) -> tuple[tuple[Names, ...], Names]:
    """Operand and result names of `"batch length embed, embed mlp -> batch length mlp"`; InputError when malformed."""
    left, arrow, right = spec.partition("->")
    terms, result = tuple(tuple(t.split()) for t in left.split(",")), tuple(right.split())
    if not arrow or len(terms) > 2:
        raise InputError(
            f"einsum {spec!r}: write one or two operands, an arrow and the result: 'batch embed, embed mlp -> batch mlp'."
        )
    for term in (*terms, result):
        if len(set(term)) != len(term):
            raise InputError(
                f"einsum {spec!r}: the term {' '.join(term)!r} repeats a name. Give each dim its own name."
            )
    unknown = [n for n in result if not any(n in t for t in terms)]
    if unknown:
        raise InputError(f"einsum {spec!r}: the result's {unknown[0]!r} is in no operand.")
    return terms, result


def plan(
    spec: str,
    layouts: tuple[Dims, ...],
    shapes: tuple[tuple[int, ...], ...],
    itemsizes: tuple[int, ...],
    wanted: Dims,
    sizes: Mapping[str, int],
) -> Plan:
    """The cheapest plan for operands that lie by `layouts` with *local* `shapes`, and a result that must lie by `wanted`.

    `itemsizes` are bytes per element of the operands; the result has the widest of them. Raises InputError when a dim
    that the result's layout splits does not divide.
    """
    return _plan(spec, layouts, shapes, itemsizes, wanted, tuple(sizes.items()))


@functools.lru_cache(maxsize=4096)
def _plan(spec, layouts, shapes, itemsizes, wanted, sizes_items) -> Plan:
    sizes = dict(sizes_items)
    terms, result = parse(spec)
    whole = _global_sizes(spec, terms, layouts, shapes, sizes)
    where: dict[str, dict[str, None]] = {}
    for names, dims in [*zip(terms, layouts, strict=True), (result, wanted)]:
        for name, axes in zip(names, dims, strict=True):
            for axis in axes:
                where.setdefault(axis, {})[name] = None
    axes = [a for a in where if sizes[a] > 1]
    best: Plan | None = None
    for choice in itertools.product(*([*where[a], None] for a in axes)):
        made = _price(
            dict(zip(axes, choice, strict=True)),
            terms,
            result,
            layouts,
            shapes,
            itemsizes,
            wanted,
            sizes,
            whole,
        )
        if made is not None and (best is None or (made.products, made.bytes) < (best.products, best.bytes)):
            best = made
    if best is None:
        raise InputError(
            f"einsum {spec!r}: the result's layout {wanted} does not divide its dims "
            f"{tuple(whole[n] for n in result)} on the mesh {sizes}. Make the dims multiples of the axes that split them."
        )
    return best


def _global_sizes(spec, terms, layouts, shapes, sizes) -> dict[str, int]:
    whole: dict[str, int] = {}
    for names, dims, shape in zip(terms, layouts, shapes, strict=True):
        if len(names) != len(shape):
            raise InputError(
                f"einsum {spec!r}: the operand {' '.join(names)!r} has {len(names)} names but {len(shape)} dims."
            )
        for name, axes, n in zip(names, dims, shape, strict=True):
            size = n * math.prod(sizes[a] for a in axes)
            if whole.setdefault(name, size) != size:
                raise InputError(
                    f"einsum {spec!r}: {name!r} is {whole[name]} in one operand and {size} in the other (whole sizes; "
                    f"local shapes {shapes}, layouts {layouts}). An operand does not lie as its names say."
                )
    return whole


def _price(choice, terms, result, layouts, shapes, itemsizes, wanted, sizes, whole) -> Plan | None:
    """Cost of the plan in which each axis splits the name that `choice` gives it; None when it cannot be done."""
    order = [a for dims in (*layouts, wanted) for dim in dims for a in dim]
    split = {n: tuple(dict.fromkeys(a for a in order if choice.get(a) == n)) for n in whole}
    local = {}
    for name, size in whole.items():
        parts = math.prod(sizes[a] for a in split[name])
        if size % parts:
            return None
        local[name] = size // parts
    if any(whole[n] % math.prod(sizes[a] for a in dim) for n, dim in zip(result, wanted, strict=True)):
        return None
    targets = tuple(tuple(split[n] for n in names) for names in terms)
    sent = sum(
        relayout_bytes(math.prod(shape) * item, src, dst, sizes)
        for shape, item, src, dst in zip(shapes, itemsizes, layouts, targets, strict=True)
    )
    produced = tuple(split[n] for n in result)
    partial = tuple(a for n in whole if n not in result for a in split[n])
    out = math.prod(local[n] for n in result) * max(itemsizes)
    sent += finish_bytes(out, partial, produced, wanted, sizes)
    return Plan(targets, partial, produced, sent, math.prod(local.values()))
