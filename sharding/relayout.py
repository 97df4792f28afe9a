"""Moving an array from one layout to another inside the manual region: gather, slice, all-to-all, reduce.

Every function takes *local* shards and returns local shards; layouts are tuples of axes per dim, major to minor.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array, lax, typeof
from jax.sharding import ManualAxisType

from sharding.axes import AXES
from sharding.errors import InputError
from sharding.layout import Dims
from sharding.moves import common, exchange, scatter_axes


def drops_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Checkpoint policy: keep everything for the backward pass but what a gather returned, which is gathered again.

    A cast to a varying type computes nothing and would otherwise keep the gathered array alive.
    """
    return primitive.name not in ("all_gather", "all_gather_invariant", "pcast", "pvary")


def varying(x: Array) -> frozenset[str]:
    """The axes over which the value of `x` differs between devices, from its type."""
    return frozenset(typeof(x).manual_axis_type.varying)


def varying_of(like: jax.ShapeDtypeStruct) -> frozenset[str]:
    """The axes over which an array of this type varies."""
    kind = like.manual_axis_type
    return frozenset() if kind is None else frozenset(kind.varying)


def retyped(like: Any, axes: frozenset[str]) -> Any:
    """The type of an array like this one that varies over `axes`."""
    if like.manual_axis_type is None:
        return like
    return like.update(manual_axis_type=ManualAxisType(varying=axes))


def vary(x: Array, axes: frozenset[str]) -> Array:
    """`x` typed as varying over `axes` too. Its transpose is the sum over the axes that were added: one all-reduce."""
    missing = tuple(sorted(axes - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def relayout(x: Array, src: Dims, dst: Dims, stays_varying: frozenset[str] = frozenset()) -> Array:
    """Bring `x` from layout `src` to layout `dst` with the fewest bytes.

    An axis that is gathered leaves the result equal on all its devices; it is typed varying all the same when listed
    in `stays_varying`, namely when whatever uses the result varies over that axis anyway: the transpose is then a
    reduce-scatter of different contributions instead of a slice of equal ones.
    """
    if src == dst:
        return x
    moved = exchange(src, dst)
    if moved is not None:
        _parts(x, moved.target, moved.axes)
        x = vary(x, frozenset(moved.axes))
        return lax.all_to_all(x, moved.axes, split_axis=moved.target, concat_axis=moved.source, tiled=True)
    for dim, (have, want) in enumerate(zip(src, dst, strict=True)):
        x = _gather(x, dim, have[common(have, want) :], stays_varying)
    for dim, (have, want) in enumerate(zip(src, dst, strict=True)):
        x = _slice(x, dim, want[common(have, want) :])
    return x


def finish(x: Array, partial: tuple[str, ...], src: Dims, dst: Dims) -> Array:
    """Reduce partial sums over `partial` and bring the result from `src` to `dst`, scattering where `dst` allows."""
    now = list(src)
    for dim, (have, want) in enumerate(zip(src, dst, strict=True)):
        over = scatter_axes(have, want, partial)
        if over:
            _parts(x, dim, over)
            x = lax.psum_scatter(vary(x, frozenset(over)), over, scatter_dimension=dim, tiled=True)
            now[dim] = (*have, *over)
    left = tuple(a for a in partial if not any(a in dim for dim in now))
    if left:
        x = lax.psum(vary(x, frozenset(left)), left)
    return relayout(x, tuple(now), dst)


def permuted(x: Array, axes: tuple[str, ...], send: list[tuple[int, int]]) -> Array:
    """`x` from device to device, `send` in the numbers that the devices have along `axes`, major to minor.

    jax numbers them by the mesh's order of axes in one version and refuses another in the next (the probe
    `permute_axis_order`), so the axes are named in that order.
    """
    sizes = [lax.axis_size(a) for a in axes]
    named = tuple(sorted(axes, key=AXES.index))

    def number(index: int) -> int:
        place = dict(zip(axes, np.unravel_index(index, sizes), strict=True))
        return int(np.ravel_multi_index([place[a] for a in named], [lax.axis_size(a) for a in named]))

    return lax.ppermute(x, named, [(number(i), number(j)) for i, j in send])


def _gather(x: Array, dim: int, axes: tuple[str, ...], stays_varying: frozenset[str]) -> Array:
    if not axes:
        return x
    x = vary(x, frozenset(axes))
    kinds = {a in stays_varying for a in axes}
    if len(kinds) == 2:  # one flavour a call: innermost first keeps the tiles in order
        for axis in reversed(axes):
            x = _gather(x, dim, (axis,), stays_varying)
        return x
    to = "varying" if kinds.pop() else "invarying"
    return lax.all_gather(x, axes, axis=dim, tiled=True, to=to)


def _slice(x: Array, dim: int, axes: tuple[str, ...]) -> Array:
    if not axes:
        return x
    size = x.shape[dim] // _parts(x, dim, axes)
    return lax.dynamic_slice_in_dim(vary(x, frozenset(axes)), lax.axis_index(axes) * size, size, dim)


def _parts(x: Array, dim: int, axes: tuple[str, ...]) -> int:
    """Devices over which a dim is to be split; InputError when it does not divide, instead of a slice that drops rows."""
    parts = lax.axis_size(axes)
    if x.shape[dim] % parts:
        raise InputError(
            f"An activation of local shape {tuple(x.shape)} is to be split in dim {dim} over {' x '.join(axes)} into "
            f"{parts} parts, but {x.shape[dim]} does not divide. Make the dim a multiple of {parts}, or those axes smaller."
        )
    return parts
