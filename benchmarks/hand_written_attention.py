"""Causal grouped-query attention of the hand-written step, with its backward pass written out.

Capital letters: B batch, L length, H heads, J kv_heads, G heads per kv_head, K head_dim, N = L * G rows of one kv head.
What was tried before it came to this: attention_study.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def _query_blocks(length: int, blocks: int) -> list[tuple[int, int]]:
    """[start, stop) of each block of query positions; the last may be shorter."""
    size = -(-length // min(blocks, length))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _by_kv_head(x_BLHK: jax.Array, kv_heads: int) -> jax.Array:
    """(B, L, H, K) -> (B, J, L*G, K): the rows of one kv head's queries, position-major."""
    B, L, H, K = x_BLHK.shape
    return (
        x_BLHK.reshape(B, L, kv_heads, H // kv_heads, K).transpose(0, 2, 1, 3, 4).reshape(B, kv_heads, -1, K)
    )


def _by_position(x_BJNK: jax.Array, heads: int) -> jax.Array:
    """(B, J, L*G, K) -> (B, L, H, K): the inverse of `_by_kv_head`."""
    B, J, N, K = x_BJNK.shape
    L, G = N * J // heads, heads // J
    return x_BJNK.reshape(B, J, L, G, K).transpose(0, 2, 1, 3, 4).reshape(B, L, heads, K)


def _attend(
    q_BLHK: jax.Array, k_BLJK: jax.Array, v_BLJK: jax.Array, blocks: int
) -> tuple[jax.Array, tuple[Any, ...]]:
    L, H, K = q_BLHK.shape[1:]
    J = k_BLJK.shape[2]
    G = H // J
    q = _by_kv_head(q_BLHK * K**-0.5, J)
    k, v = k_BLJK.transpose(0, 2, 1, 3), v_BLJK.transpose(0, 2, 1, 3)
    out, powers, totals = [], [], []
    for start, stop in _query_blocks(L, blocks):
        s = jnp.einsum(
            "bjnk,bjmk->bjnm",
            q[:, :, start * G : stop * G],
            k[:, :, :stop],
            preferred_element_type=jnp.float32,
        )
        position = start + jnp.arange((stop - start) * G) // G
        # An added bias, not a select: XLA:CPU fuses it into the product.
        s = s + jnp.where(position[:, None] >= jnp.arange(stop), 0.0, -1e30).astype(s.dtype)
        e = jnp.exp(s - s.max(axis=-1, keepdims=True))
        total = e.sum(axis=-1, keepdims=True)
        e = e.astype(q.dtype)
        out.append((jnp.einsum("bjnm,bjmk->bjnk", e, v[:, :, :stop]) / total).astype(q.dtype))
        powers.append(e)
        totals.append(total)
    o = jnp.concatenate(out, axis=2)
    return _by_position(o, H), (q, k, v, o, jnp.concatenate(totals, axis=2), tuple(powers))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(q_BLHK: jax.Array, k_BLJK: jax.Array, v_BLJK: jax.Array, blocks: int = 4) -> jax.Array:
    """Causal grouped-query attention, (B, L, H, K), scaled by head_dim**-0.5, in blocks of query positions that read
    only the keys they can see. Its backward is written out so that no (L, L) array is ever transposed, which XLA:CPU
    pays for dearly: attention_study.md.
    """
    return _attend(q_BLHK, k_BLJK, v_BLJK, blocks)[0]


def _attention_backward(blocks: int, saved: tuple[Any, ...], do_BLHK: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, o, total, powers = saved
    (L, K), (J, H) = k.shape[2:], (k.shape[1], do_BLHK.shape[2])
    G = H // J
    do = (_by_kv_head(do_BLHK, J) / total).astype(q.dtype)
    mean = (do * o).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros_like(k.mT), jnp.zeros_like(v.mT)
    for (start, stop), e in zip(_query_blocks(L, blocks), powers, strict=True):
        rows = slice(start * G, stop * G)
        ds = e * (jnp.einsum("bjnk,bjmk->bjnm", do[:, :, rows], v[:, :, :stop]) - mean[:, :, rows])
        dq.append(jnp.einsum("bjnm,bjmk->bjnk", ds, k[:, :, :stop]))
        # (head_dim, keys) from the small operand's transpose: the (keys, head_dim) form transposes ds and e instead.
        later = ((0, 0), (0, 0), (0, 0), (0, L - stop))
        dk += jnp.pad(jnp.einsum("bjnk,bjnm->bjkm", q[:, :, rows], ds), later)
        dv += jnp.pad(jnp.einsum("bjnk,bjnm->bjkm", do[:, :, rows], e), later)
    dq = _by_position(jnp.concatenate(dq, axis=2), H) * K**-0.5
    return dq, dk.transpose(0, 3, 1, 2), dv.transpose(0, 3, 1, 2)


attention.defvjp(_attend, _attention_backward)


__all__ = ["attention"]
