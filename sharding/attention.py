"""Rotary positions and grouped-query attention as named ops."""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from sharding.causal import causal_attention
from sharding.errors import InputError
from sharding.layout import Dims
from sharding.ops import back, positions, whole
from sharding.region import Region, current, tap, wide
from sharding.relayout import vary, varying
from sharding.ring import Sight, seen_attention
from sharding.scope import named

KEEP_UP_TO = 1024
"""Positions up to which causal attention on whole sequences keeps its (length, length) array for the backward pass, which
is fastest; beyond it the backward pass computes scores again, tile by tile."""


@named
def rope(x: Array, names: str, theta: float = 10000.0, at: Array | None = None) -> Array:
    """Rotary position embedding (Su et al. 2021, eq. 34) over the last of `names`; positions along `length`.

    The first half of the last dim is rotated against its second half, in float32 (float64 stays). at: positions of their
    own, int32 `batch length` (of packed documents each counts from 0), instead of those in the row.
    """
    words = tuple(names.split())
    x, lies = whole(x, names, words[-1])  # a rotation pairs the two halves of the last dim
    half = x.shape[-1] // 2
    x32 = wide(x)
    frequency = theta ** (-jnp.arange(half, dtype=x32.dtype) / half)
    if at is None:
        turned, kept = positions(x, names), ("length",)
    else:
        region, of = current(), tuple("batch length".split())
        at = (
            at
            if region is None or not region.manual
            else region.move(at, region.dims(of), (lies[0], lies[words.index("length")]))
        )
        turned, kept = at, of
    angle = turned.astype(x32.dtype)[..., None] * frequency.reshape((1,) * turned.ndim + (half,))
    shape = [x.shape[d] if n in kept else 1 for d, n in enumerate(words[:-1])] + [half]
    cos, sin = jnp.cos(angle).reshape(shape), jnp.sin(angle).reshape(shape)
    a, b = jnp.split(x32, 2, axis=-1)
    return back(jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype), names, lies)


@named
def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Literal["causal", "full"] = "causal",
    window: int = 0,
    segments: Array | None = None,
) -> Array:
    """Softmax attention; q: `batch length heads head_dim`, k and v: `batch length kv_heads head_dim`, and so the result.

    Query head h reads key head h // (heads / kv_heads) (Ainslie et al. 2023). Scores are scaled by head_dim**-0.5 and
    taken in float32. mask: "causal" sees keys up to the query's position, "full" all; window: only keys less than so many
    positions away (0: no bound); segments: int32 `batch length`, a query sees keys of its own segment only.

    Inside, positions are called `queries` and `keys`, and lie as the rules say of `batch queries heads head_dim` and
    `batch keys kv_heads head_dim`: whole where no rule speaks of them, so that each device attends with its own heads;
    split over the same axes, keys and values go round a ring (`sharding.ring`).
    """
    names = tuple("batch length heads head_dim".split())
    if mask not in ("causal", "full") or window < 0:
        raise InputError(
            f"attention(mask={mask!r}, window={window}): mask is 'causal' or 'full', window a number of positions of at "
            f"least 1, or 0 for no bound. Change it."
        )
    region, dims, sight, pair = current(), None, Sight(mask, window), None
    if region is not None and region.mesh is not None:
        _check_fit(region, q, "heads", "queries")
        _check_fit(region, k, "kv_heads", "keys")
    if region is not None and region.manual:
        dims, of_k = _inside(region)
        sight = Sight(mask, window, dims[1], of_k[1], *region.ordered("length"))
        src = region.dims(("batch", "length"))
        if segments is not None:
            pair = tuple(region.move(segments, src, (dims[0], at[1])) for at in (dims, of_k))
        q = region.move(q, region.dims(names), dims)
        lies = region.dims(tuple("batch length kv_heads head_dim".split()))
        # Of use with queries that differ from device to device: what is gathered is then reduced and scattered back.
        over = frozenset(axis for dim in dims for axis in dim)
        k, v = region.move(k, lies, of_k, over), region.move(v, lies, of_k, over)
        if of_k[2] != dims[2]:
            k, v = (_heads_of(q, x, dims[2]) for x in (k, v))
    elif segments is not None:
        pair = (segments, segments)
    if q.shape[2] % k.shape[2]:
        raise InputError(
            f"attention has {q.shape[2]} query heads for {k.shape[2]} key heads. Make heads a multiple of kv_heads."
        )
    if dims is not None:
        union = frozenset().union(*(varying(x) for x in (q, k, v, *(pair or ()))))
        q, k, v = (vary(x, union) for x in (q, k, v))
        pair = tuple(vary(x, union) for x in pair) if pair else None
    if region is not None and region.mesh is not None and not region.manual:
        of_q, of_k = _inside(region)  # stated: XLA does not bring whole key heads to split query heads
        q, k, v = region.constrain(q, of_q), region.constrain(k, of_k), region.constrain(v, of_k)
    made = _attend(q, k, v, sight, pair)
    if region is not None:
        lies = region.dims(names)
        made = region.move(made, dims, lies) if dims else region.constrain(made, lies)
    return tap("attention", names, made)


def _attend(q: Array, k: Array, v: Array, sight: Sight, segments: tuple[Array, ...] | None) -> Array:
    """Attention of local shards, by the form that suits them."""
    if sight == Sight() and segments is None and q.shape[1] == k.shape[1] <= KEEP_UP_TO:
        return causal_attention(q, k, v)
    return seen_attention(q, k, v, sight, segments)  # type: ignore[arg-type]  # a pair


def _inside(region: Region) -> tuple[Dims, Dims]:
    """How queries and keys lie inside attention; head_dim is whole, and the batch of the keys as the queries have it."""
    of_q = region.dims(tuple("batch queries heads head_dim".split()))
    of_k = region.dims(tuple("batch keys kv_heads head_dim".split()))
    if of_k[1] and of_k[1] != of_q[1]:
        raise InputError(
            f"Inside attention the rules split queries over {' x '.join(of_q[1]) or 'nothing'} and keys over "
            f"{' x '.join(of_k[1])}: keys go round a ring only where queries are split alike. Split `queries` and `keys` over "
            f"the same axes, or leave `keys` whole."
        )
    same = of_k[2] == of_q[2]
    return (*of_q[:3], ()), (of_q[0], of_k[1], of_q[2] if same else (), ())


def _check_fit(region: Region, x: Array, heads: str, places: str) -> None:
    """InputError, with rule and line, where queries or keys do not divide as they are split inside attention."""
    outside, sizes = region.dims(("batch", "length", heads, "head_dim")), region.layouts.sizes
    counts = [math.prod(sizes[a] for a in axes) if region.manual else 1 for axes in outside]
    shape = tuple(n * k for n, k in zip(x.shape, counts, strict=True))
    region.layouts.check_fits("inside attention", ("batch", places, heads, "head_dim"), shape)


def _heads_of(q: Array, kv: Array, axes: tuple[str, ...]) -> Array:
    """The key or value head of each query head held here, when key heads lie whole: one each."""
    split = lax.axis_size(axes) if axes else 1
    first = lax.axis_index(axes) * q.shape[2] if axes else 0
    group = q.shape[2] * split // kv.shape[2]
    return jnp.take(kv, (first + jnp.arange(q.shape[2], dtype=jnp.int32)) // group, axis=2)
