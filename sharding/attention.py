"""Rotary positions and causal grouped-query attention as named ops."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from sharding.causal import causal_attention
from sharding.errors import InputError
from sharding.ops import back, positions, whole
from sharding.region import current, tap, wide
from sharding.relayout import vary, varying


def rope(x: Array, names: str, theta: float = 10000.0) -> Array:
    """Rotary position embedding (Su et al. 2021, eq. 34) over the last of `names`; positions along `length`.

    The first half of the last dim is rotated against its second half, in float32 (float64 stays).
    """
    words = tuple(names.split())
    x, lies = whole(x, names, words[-1])  # a rotation pairs the two halves of the last dim
    half = x.shape[-1] // 2
    x32 = wide(x)
    frequency = theta ** (-jnp.arange(half, dtype=x32.dtype) / half)
    angle = positions(x, names).astype(x32.dtype)[:, None] * frequency[None, :]
    shape = [1] * x.ndim
    shape[words.index("length")], shape[-1] = x.shape[words.index("length")], half
    cos, sin = jnp.cos(angle).reshape(shape), jnp.sin(angle).reshape(shape)
    a, b = jnp.split(x32, 2, axis=-1)
    return back(jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype), names, lies)


def attention(q: Array, k: Array, v: Array) -> Array:
    """Causal softmax attention; q: `batch length heads head_dim`, k and v: `batch length kv_heads head_dim`.

    Query head h reads key head h // (heads / kv_heads) (Ainslie et al. 2023). Scores are scaled by head_dim**-0.5 and
    taken in float32. Where heads are split, each device attends with its own; length and head_dim are made whole.
    """
    of_q, of_kv = "batch length heads head_dim", "batch length kv_heads head_dim"
    q, lies = whole(q, of_q, "length", "head_dim")
    region = current()
    if region is not None and region.manual:
        src = region.dims(tuple(of_kv.split()))
        same = src[2] == lies[2]
        dst = (lies[0], (), src[2] if same else (), ())  # the batch as the queries have it
        k, v = region.move(k, src, dst), region.move(v, src, dst)
        if not same:
            k, v = (_heads_of(q, x, lies[2]) for x in (k, v))
    if q.shape[2] % k.shape[2]:
        raise InputError(
            f"attention has {q.shape[2]} query heads for {k.shape[2]} key heads. Make heads a multiple of kv_heads."
        )
    if region is not None and region.manual:
        union = varying(q) | varying(k) | varying(v)
        q, k, v = (vary(x, union) for x in (q, k, v))
    return tap("attention", tuple(of_q.split()), back(causal_attention(q, k, v), of_q, lies))


def _heads_of(q: Array, kv: Array, axes: tuple[str, ...]) -> Array:
    """The key or value head of each query head held here, when key heads lie whole: one each."""
    split = lax.axis_size(axes) if axes else 1
    first = lax.axis_index(axes) * q.shape[2] if axes else 0
    group = q.shape[2] * split // kv.shape[2]
    return jnp.take(kv, (first + jnp.arange(q.shape[2], dtype=jnp.int32)) // group, axis=2)
