"""Causal grouped-query attention on one device, in blocks of queries, with its backward written out.

A block of queries reads only the keys that it can see, so about 5/8 of the full square is computed with four blocks.
Forward and backward are arranged so that no (length, length) array is ever transposed or selected, which is what
XLA:CPU pays for: the mask is an added bias, and dk and dv are taken head_dim-major and transposed when they are small.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sharding.marks import mark
from sharding.product import wide_product
from sharding.region import wide

BLOCKS = 4
"""Blocks of query positions. More blocks skip more of the square's upper half; each is smaller."""


@jax.custom_vjp
def causal_attention(q: Array, k: Array, v: Array) -> Array:
    """Softmax attention in which position i reads positions 0..i, scaled by head_dim**-0.5; scores in float32.

    q: (batch, length, heads, head_dim); k, v: (batch, length, kv_heads, head_dim); query head h reads key head
    h // (heads / kv_heads). Returns the shape and dtype of q.
    """
    return _forward(q, k, v)[0]


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Any, ...]]:
    heads, groups, scale = q.shape[2], q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    q = by_kv_head(q * jnp.asarray(scale, q.dtype), k.shape[2])
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out, powers, totals = [], [], []
    for start, stop in _query_blocks(k.shape[2]):
        scores = wide_product("bjnk,bjmk->bjnm", q[:, :, start * groups : stop * groups], k[:, :, :stop])
        scores = scores + _mask(start, stop, groups).astype(scores.dtype)
        e = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        total = e.sum(axis=-1, keepdims=True)
        e = e.astype(v.dtype)
        out.append(wide_product("bjnm,bjmk->bjnk", e, v[:, :, :stop]) / total)
        powers.append(e)
        totals.append(total)
    o, sums = (mark(jnp.concatenate(parts, axis=2), "attention") for parts in (out, totals))
    kept = (q, k, v, o, sums, tuple(powers))
    return by_position(o, heads).astype(q.dtype), kept


def _backward(kept: tuple[Any, ...], do_BLHK: Array) -> tuple[Array, ...]:
    q, k, v, o, total, powers = kept
    length, heads, dtype = k.shape[2], do_BLHK.shape[2], do_BLHK.dtype
    groups, scale = heads // k.shape[1], q.shape[3] ** -0.5
    do = by_kv_head(wide(do_BLHK), k.shape[1]) / total
    mean = (do * o).sum(axis=-1, keepdims=True)
    do = do.astype(dtype)
    dq, dk, dv = [], jnp.zeros((), total.dtype), jnp.zeros((), total.dtype)
    for (start, stop), e in zip(_query_blocks(length), powers, strict=True):
        rows = slice(start * groups, stop * groups)
        ds = wide_product("bjnk,bjmk->bjnm", do[:, :, rows], v[:, :, :stop]) - mean[:, :, rows]
        ds = (wide(e) * ds).astype(dtype)
        dq.append(wide_product("bjnm,bjmk->bjnk", ds, k[:, :, :stop]))
        later = ((0, 0), (0, 0), (0, 0), (0, length - stop))
        dk = _add(dk, jnp.pad(wide_product("bjnk,bjnm->bjkm", q[:, :, rows], ds), later))
        dv = _add(dv, jnp.pad(wide_product("bjnk,bjnm->bjkm", do[:, :, rows], e), later))
    dq = by_position(jnp.concatenate(dq, axis=2), heads) * scale
    return dq.astype(dtype), dk.transpose(0, 3, 1, 2).astype(dtype), dv.transpose(0, 3, 1, 2).astype(dtype)


causal_attention.defvjp(_forward, _backward)


def _add(total: Array, part: Array) -> Array:
    return part if total.ndim == 0 else total + part


def _mask(start: int, stop: int, groups: int) -> Array:
    """0 where a row's query sees a key, else -1e30: (rows, keys) with `groups` rows a position."""
    position = start + jnp.arange((stop - start) * groups) // groups
    seen = position[:, None] >= jnp.arange(stop)[None, :]
    return jnp.where(seen, jnp.float32(0.0), jnp.float32(-1e30))[None, None]


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """[start, stop) of each block of query positions; the last may be shorter."""
    size = -(-length // min(BLOCKS, length))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def by_kv_head(x_BLHK: Array, kv_heads: int) -> Array:
    """(B, L, H, K) -> (B, J, L*G, K): all queries of one key head, position-major."""
    b, length, heads, dim = x_BLHK.shape
    x = x_BLHK.reshape(b, length, kv_heads, heads // kv_heads, dim)
    return x.transpose(0, 2, 1, 3, 4).reshape(b, kv_heads, -1, dim)


def by_position(x_BJNK: Array, heads: int) -> Array:
    """(B, J, L*G, K) -> (B, L, H, K): the inverse of `by_kv_head`."""
    b, kv_heads, rows, dim = x_BJNK.shape
    groups = heads // kv_heads
    x = x_BJNK.reshape(b, kv_heads, rows // groups, groups, dim)
    return x.transpose(0, 2, 1, 3, 4).reshape(b, rows // groups, heads, dim)
