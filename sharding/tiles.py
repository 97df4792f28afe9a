"""Softmax attention over a list of pairs (tile of queries, tile of keys), in memory that grows with the length only.

One pair is one small product; the softmax is put together online (Milakov and Gimelshein 2018; Dao et al. 2022,
arXiv:2205.14135), and the backward pass computes a pair's scores again from the log-sum-exp that was kept. Which pairs
there are is data: a causal mask lists the lower triangle, a window a band, a ring what the arriving keys let be seen.

Shapes: q (B, J, L*G, K), scaled, all queries of one key head together, position-major; k, v (B, J, M, K).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sharding.product import wide_product
from sharding.relayout import vary, varying

UNROLL_UP_TO = 4
"""Pairs up to which they are written out instead of scanned."""

Index = Array | int
"""Number of a tile: an int where the trace knows it, so that tiles are cut out for good and not by an index of the run."""
Bias = Callable[[Index, Index], Array]
"""(tile of queries, tile of keys) -> what is added to their scores, broadcast to (B, J, rows, keys)."""


@dataclass(frozen=True)
class Pairs:
    """Which tiles meet: int32 arrays of equal length, of NumPy where the trace knows them, and what is added to their scores
    (None: nothing).
    """

    queries: Array | np.ndarray
    keys: Array | np.ndarray
    bias: Bias | None


Softmax = tuple[Array, Array, Array]
"""Unnormalized output (B, J, L*G, K), running maximum and sum (B, J, L*G, 1) of the scores seen; all float32 or wider."""


def start(q: Array) -> Softmax:
    """Nothing seen yet."""
    kind = _wide(q.dtype)
    column = (*q.shape[:3], 1)
    made = (jnp.zeros(q.shape, kind), jnp.full(column, -1e30, kind), jnp.zeros(column, kind))
    o, top, total = (vary(x, varying(q)) for x in made)
    return o, top, total


def attend(state: Softmax, q: Array, k: Array, v: Array, pairs: Pairs, rows: int, keys: int) -> Softmax:
    """The state after these pairs; `rows` rows make a tile of queries, `keys` positions a tile of keys."""

    def one(state: Softmax, pair: tuple[Index, Index]) -> Softmax:
        i, j = pair
        o, top, total = (_tile(x, i, rows) for x in state)
        scores = _scores(_tile(q, i, rows), _tile(k, j, keys), pairs.bias, pair)
        higher = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
        e, kept = jnp.exp(scores - higher), jnp.exp(top - higher)
        total = total * kept + e.sum(axis=-1, keepdims=True)
        o = o * kept + wide_product("bjnm,bjmk->bjnk", e.astype(v.dtype), _tile(v, j, keys))
        a, b, c = (_placed(x, new, i, rows) for x, new in zip(state, (o, higher, total), strict=True))
        return a, b, c

    return _over(pairs, one, state)


def finished(state: Softmax) -> tuple[Array, Array]:
    """Output and log-sum-exp of all that was seen; a row that saw nothing is a fault of its mask."""
    o, top, total = state
    return o / total, top + jnp.log(total)


Grads = tuple[Array, Array, Array]
"""Gradients of q, k and v, float32 or wider."""


def attend_back(
    grads: Grads,
    q: Array,
    kv: tuple[Array, Array],
    out: tuple[Array, Array, Array],
    pairs: Pairs,
    rows: int,
    keys: int,
) -> Grads:
    """The gradients after these pairs; `out`: the output's gradient, its row-wise product with the output, and the
    log-sum-exp of all pairs that its rows saw.
    """
    k, v = kv

    def one(grads: Grads, pair: tuple[Index, Index]) -> Grads:
        i, j = pair
        q_i, k_j, v_j = _tile(q, i, rows), _tile(k, j, keys), _tile(v, j, keys)
        do, mean, lse = (_tile(x, i, rows) for x in out)
        p = jnp.exp(_scores(q_i, k_j, pairs.bias, pair) - lse)
        ds = (p * (wide_product("bjnk,bjmk->bjnm", do, v_j) - mean)).astype(k.dtype)
        dq, dk, dv = grads
        # dk and dv with head_dim first, transposed when they are small: no (rows, keys) array is (see causal.py).
        return (
            _added(dq, wide_product("bjnm,bjmk->bjnk", ds, k_j), i, rows),
            _added(dk, jnp.swapaxes(wide_product("bjnk,bjnm->bjkm", q_i, ds), 2, 3), j, keys),
            _added(dv, jnp.swapaxes(wide_product("bjnk,bjnm->bjkm", do, p.astype(do.dtype)), 2, 3), j, keys),
        )

    return _over(pairs, one, grads)


def _scores(q: Array, k: Array, bias: Bias | None, pair: tuple[Index, Index]) -> Array:
    scores = wide_product("bjnk,bjmk->bjnm", q, k)
    return scores if bias is None else scores + bias(*pair).astype(scores.dtype)


def _wide(kind: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if kind == jnp.float64 else jnp.float32)


def _over(pairs: Pairs, one: Callable[[Any, tuple[Index, Index]], Any], state: Any) -> Any:
    n = pairs.queries.shape[0]
    if n > UNROLL_UP_TO:
        lists = jnp.asarray(pairs.queries), jnp.asarray(pairs.keys)
        return lax.scan(lambda s, pair: (one(s, pair), None), state, lists)[0]
    for at in range(n):
        i, j = (int(x[at]) if isinstance(x, np.ndarray) else x[at] for x in (pairs.queries, pairs.keys))
        state = one(state, (i, j))
    return state


def _tile(x: Array, at: Index, size: int) -> Array:
    if x.shape[2] == size:
        return x
    if isinstance(at, int):
        return lax.slice_in_dim(x, at * size, (at + 1) * size, axis=2)
    return lax.dynamic_slice_in_dim(x, at * size, size, 2)


def _placed(x: Array, new: Array, at: Index, size: int) -> Array:
    if x.shape[2] == size:
        return new
    if isinstance(at, int):  # XLA sees that a tile is one of the parts; an update would copy them all
        before, after = x[:, :, : at * size], x[:, :, (at + 1) * size :]
        return jnp.concatenate([before, new, after], axis=2)
    return lax.dynamic_update_slice_in_dim(x, new, at * size, 2)


def _added(x: Array, new: Array, at: Index, size: int) -> Array:
    return _placed(x, _tile(x, at, size) + new, at, size)
