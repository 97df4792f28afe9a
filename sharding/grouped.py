"""Experts without capacity: no choice is ever dropped, and the work is that of the tokens there are.

Shapes are static, so whatever the router does must fit: all tokens of the devices that share the experts may go to one
of them. Those tokens are therefore gathered (a device with an all-to-all would have to make room for as many, and send
min(k, experts held) copies of each), every device takes the choices that fall on its experts, sorted by expert, and the
results are reduce-scattered to where the tokens were. Products run over groups of rows, one group an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from sharding.errors import InputError
from sharding.layout import Dims, spec_of
from sharding.operands import operand_lies, split_axes
from sharding.region import Region, current, names_of, tap, value, wide
from sharding.relayout import vary, varying
from sharding.routing import TOKEN, TOKENS, Route
from sharding.scope import named
from sharding.slots import collect, inverse, one_hot, spread

BLOCK = 64
"""Rows of one product where groups are multiplied block by block: each group is filled up to a multiple of it."""

C = TypeVar("C")
Product = Callable[[Array, nnx.Param], Array]
Expert = Callable[[Array, Product], Array]


@named
def dropless(x: Array, route: Route, expert: Expert, *matrices: nnx.Param) -> Array:
    """Tokens `batch length embed` through the experts that they chose: the sum over a token's choices, weighed by their gates.

    `expert(rows, product)` computes one expert for rows (n, embed): `product(rows, matrix)` multiplies each row with its own
    expert's matrix, one of `matrices` (`expert embed ...` or `expert mlp embed`: the second dim is summed over). Between
    products it may do what treats each row by itself. Where `mlp` is split, the second product's sums are partial until the
    end. Raises InputError where the rules split `embed`, or a matrix otherwise than by expert and mlp.
    """
    region = current()
    lies = [_in_use(region, w) for w in matrices]
    if region is None or region.mesh is None:
        held = {id(w): value(w, x.dtype) for w in matrices}
        return tap("dropless", TOKEN, _local(region, x, route, expert, held, (), (), ()))
    tokens, at = region.dims(TOKEN), (*region.dims(TOKENS), ())
    over, whole = _axes(tokens, lies)
    if region.manual:
        used = frozenset().union(*(varying(x), varying(route.experts)))
        held = {}
        for w, dims in zip(matrices, lies, strict=True):
            rest, _ = operand_lies(region, w, names_of(w) or ())
            held[id(w)] = region.move(value(w, x.dtype), rest, dims, used & split_axes(rest))
        own = (*tokens[:2], ())
        experts, gates = (region.move(y, at, own) for y in (route.experts, route.gates))
        route = Route(experts, gates, region.move(route.present, at[:2], own[:2]), route.count)
        return tap("dropless", TOKEN, _local(region, x, route, expert, held, over, whole, lies[0][0]))
    # XLA's partitioner has no rule for products over groups: this op is a manual region of its own in its program.
    given = [region.constrain(value(w, x.dtype), dims) for w, dims in zip(matrices, lies, strict=True)]

    def run(x: Array, experts: Array, gates: Array, present: Array, given: list[Array]) -> Array:
        mine = Route(experts, gates, present, route.count)
        held = {id(w): array for w, array in zip(matrices, given, strict=True)}
        return _local(region, x, mine, expert, held, over, whole, lies[0][0])

    a, b = spec_of(tokens), spec_of((*tokens[:2], ()))
    made = jax.shard_map(
        run,
        mesh=region.mesh,
        in_specs=(a, b, b, spec_of(tokens[:2]), [spec_of(d) for d in lies]),
        out_specs=a,
    )(x, route.experts, route.gates, route.present, given)
    return tap("dropless", TOKEN, region.constrain(made, tokens))


def _local(
    region: Region | None,
    x: Array,
    route: Route,
    expert: Expert,
    held: dict[int, Array],
    over: tuple[str, ...],
    whole: tuple[str, ...],
    split: tuple[str, ...],
) -> Array:
    """`dropless` on one device: tokens are gathered along `over`, sums are partial over `over` and `whole`, and experts are
    split over `split`.
    """
    rows, length, width = x.shape
    k, mine = route.experts.shape[-1], next(iter(held.values())).shape[0]
    union = frozenset(over) | frozenset(whole) | frozenset(split)
    union = union.union(*(varying(y) for y in (x, route.experts, *held.values())))
    experts = jnp.where(route.present[..., None], route.experts, -1).reshape(1, -1, k)
    tokens, gates = x.reshape(1, -1, width), route.gates.reshape(1, -1, k)
    if over:
        tokens, gates, experts = (
            lax.all_gather(vary(y, frozenset(over)), over, axis=1, tiled=True, to="varying")
            for y in (tokens, gates, experts)
        )
    tokens, gates, experts = (vary(y, union) for y in (tokens, gates, experts))
    if split:
        experts = experts - (lax.axis_index(split) * mine).astype(jnp.int32)
    block = BLOCK if region is None or region.platform == "cpu" else 1
    place, sizes, slots = _places(experts.reshape(-1), mine, tokens.shape[1] * min(k, mine), block)
    place = place.reshape(1, -1, k)
    choice = inverse(place, slots)
    held = {key: vary(w, union) for key, w in held.items()}
    multiply = _by_blocks if block > 1 else lax.ragged_dot

    def product(rows: Array, matrix: nnx.Param) -> Array:
        w = held[id(matrix)]
        made = multiply(rows, w.reshape(*w.shape[:2], -1), sizes)
        return made.reshape(len(rows), *w.shape[2:])

    made = expert(spread(tokens, place, choice)[0], product)
    made = collect(made[None], gates, place, choice)[0]
    if over:
        made = lax.psum_scatter(made, over, scatter_dimension=0, tiled=True)
    if whole:
        made = lax.psum(made, whole)
    return made.reshape(rows, length, width)


def _places(experts: Array, count: int, most: int, block: int) -> tuple[Array, Array, int]:
    """Row of each choice when choices are sorted by expert and each expert's rows are filled up to a multiple of `block`;
    the rows of each expert; all rows. A choice of an expert that is not here gets the row after the last.
    """
    taken = one_hot(experts, count, jnp.int32)
    sizes = -(-jnp.sum(taken, axis=0, dtype=jnp.int32) // block) * block
    starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    rows = -(-(most + count * (block - 1)) // block) * block
    before = jnp.cumsum(taken, axis=0, dtype=jnp.int32) - taken
    place = jnp.sum(taken * (starts[None] + before), axis=1, dtype=jnp.int32)
    return jnp.where((experts >= 0) & (experts < count), place, rows), sizes, rows


@jax.custom_vjp
def _by_blocks(x: Array, w: Array, sizes: Array) -> Array:
    """Rows (n, a) times each group's matrix (groups, a, b), BLOCK rows at a time; `sizes` are multiples of it that add up to
    at most n. Only blocks that a group has are computed. XLA:CPU makes of `lax.ragged_dot` one product a group over all rows.
    """
    made = _zeros((len(x), w.shape[2]), x, w, sizes)
    return _each(sizes, lambda at, of, made: _put(made, _get(x, at) @ _matrix(w, of), at), made)


def _blocks_forward(x: Array, w: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _by_blocks(x, w, sizes), (x, w, sizes)


def _blocks_backward(kept: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, Any]:
    x, w, sizes = kept

    def one(at: Array, of: Array, made: tuple[Array, Array]) -> tuple[Array, Array]:
        part = _get(dy, at)
        more = jnp.einsum("na,nb->ab", _get(x, at), part, preferred_element_type=made[1].dtype)
        of_w = lax.dynamic_update_index_in_dim(made[1], _matrix(made[1], of) + more, of, 0)
        return _put(made[0], part @ _matrix(w, of).T, at), of_w

    begin = (_zeros(x.shape, x, w, sizes), wide(_zeros(w.shape, x, w, sizes)))
    dx, dw = _each(sizes, one, begin)
    return dx, dw.astype(w.dtype), np.zeros(sizes.shape, jax.dtypes.float0)


_by_blocks.defvjp(_blocks_forward, _blocks_backward)


def _each(sizes: Array, one: Callable[[Array, Array, C], C], made: C) -> C:
    """`made` through `one(first row, group, made)` for each block that a group has."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)

    def step(carry: tuple[Array, C]) -> tuple[Array, C]:
        at, made = carry
        return at + BLOCK, one(at, jnp.sum(ends <= at, dtype=jnp.int32), made)

    begin = vary(jnp.zeros((), jnp.int32), varying(sizes))
    return lax.while_loop(lambda carry: carry[0] < ends[-1], step, (begin, made))[1]


def _zeros(shape: tuple[int, ...], x: Array, w: Array, sizes: Array) -> Array:
    return vary(jnp.zeros(shape, x.dtype), varying(x) | varying(w) | varying(sizes))


def _get(x: Array, at: Array) -> Array:
    return lax.dynamic_slice_in_dim(x, at, BLOCK, 0)


def _put(x: Array, rows: Array, at: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(x, rows, at, 0)


def _matrix(w: Array, of: Array) -> Array:
    return lax.dynamic_index_in_dim(w, of, 0, keepdims=False)


# how they lie


def _in_use(region: Region | None, w: nnx.Param) -> Dims:
    """Layout of a matrix as it is used; InputError where it is split otherwise than this op can."""
    names = names_of(w) or ()
    if region is None or region.mesh is None:
        return ((),) * len(names)
    dims = region.param(w).compute.dims
    bad = [n for n, axes in zip(names, dims, strict=True) if axes and n not in ("expert", "mlp")]
    if names[:1] != ("expert",) or bad:
        raise InputError(
            f"dropless: {w.path} ({region.param(w).compute.text()} in use) must have experts as its first dim, and be split by "
            f"expert and mlp at most. Choose rules that leave the others whole, or a capacity factor."
        )
    return dims


def _axes(tokens: Dims, lies: list[Dims]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes along which tokens are gathered, other parts of the experts being there, and those along which they are equal."""
    if tokens[2]:
        raise InputError(
            f"dropless: the rules split embed over {' x '.join(tokens[2])}, but a token goes to its experts whole. Choose "
            f"rules that leave embed whole, or a capacity factor."
        )
    used = dict.fromkeys(a for dims in lies for dim in dims for a in dim)
    mine = {a for dim in tokens for a in dim}
    return tuple(a for a in used if a in mine), tuple(a for a in used if a not in mine)
