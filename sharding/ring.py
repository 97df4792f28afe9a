"""Attention whose keys may lie on other devices: blocks of keys and values go round a ring, queries stay.

Liu et al. 2023 (ring attention, arXiv:2310.01889), with the softmax put together online from tile to tile
(`sharding.tiles`) and its backward written out: keys and values go round again, and their gradients with them, home. In
zig-zag order under a causal mask (`sharding.order.ZigZag`) every device has the same work at every step, and no
arriving block needs a mask: of two times two chunks exactly two pairs are seen whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sharding.causal import by_kv_head, by_position
from sharding.marks import mark
from sharding.order import Order
from sharding.region import wide
from sharding.relayout import permuted, vary, varying
from sharding.tiles import Bias, Index, Pairs, attend, attend_back, finished, start

TILE = 512
"""Positions of a tile at most: scores of one pair of tiles are all that is ever held of the square."""
SCAN_FROM = 3
"""Steps of a ring from which those after the first are scanned, where each does the same."""


@dataclass(frozen=True)
class Sight:
    """Which keys a query sees, and how both lie."""

    mask: Literal["causal", "full"] = "causal"
    window: int = 0
    """Keys at a distance of `window` or more are not seen; 0: no bound."""
    queries: tuple[str, ...] = ()
    """Axes that split the queries."""
    keys: tuple[str, ...] = ()
    """Axes that split the keys: the same as the queries' (a ring), or none."""
    order: Order | None = None
    """The order in which positions lie; None: their own."""
    parts: int = 1
    """Devices of the order's axis."""


@dataclass(frozen=True)
class _Work:
    """One call on local shards: sizes, and which tiles meet at each step of the ring."""

    sight: Sight
    length: int
    """Positions of the queries held here."""
    keys: int
    """Positions of a block of keys."""
    groups: int
    """Query heads a key head."""
    steps: int
    tile: int
    segments: tuple[Array | None, Array | None]

    @property
    def devices(self) -> int:
        """Devices of the ring."""
        return lax.axis_size(self.sight.keys) if self.sight.keys else 1

    @property
    def zigzag(self) -> bool:
        """Whether the pairs that are seen are known without looking at positions, in zig-zag order."""
        s = self.sight
        return s.order is not None and s.mask == "causal" and s.queries == s.keys == (s.order.axis,)

    @property
    def masked(self) -> bool:
        """Whether every pair needs a mask."""
        return bool(self.sight.window) or self.segments[0] is not None

    def pairs(self, step: Any, segments: Array | None) -> list[Pairs]:
        """The pairs of tiles that meet at a step; `segments` are those of the keys that have arrived."""
        bias = self.bias(step, segments)
        diagonal, seen, hidden = self._zigzag(step) if self.zigzag else self._natural(step)
        lists = [(diagonal, bias), (hidden, bias), (seen, bias if self.masked else None)]
        made = []
        for (queries, keys), mask in lists:
            if len(queries):
                made.append(Pairs(queries.astype(np.int32), keys.astype(np.int32), mask))
        return made

    def bias(self, step: Any, arrived: Array | None) -> Bias:
        """What is added to the scores of a pair of tiles at a step: 0 where a key is seen, else -1e30."""
        s, t = self.sight, self.tile
        here = lax.axis_index(s.queries) if s.queries else 0
        there = (here - step) % self.devices if s.keys else 0
        mine, groups = self.segments[0], self.groups

        def bias(i: Index, j: Index) -> Array:
            row = (
                self._position(here * self.length + i * t) + jnp.arange(t * groups, dtype=jnp.int32) // groups
            )
            key = self._position(there * self.keys + j * t) + jnp.arange(t, dtype=jnp.int32)
            far = row[:, None] - key[None, :]
            seen = (far >= 0) if s.mask == "causal" else jnp.full(far.shape, True)
            if s.window:
                seen = seen & (jnp.abs(far) < s.window)
            if mine is None or arrived is None:
                return jnp.where(seen, jnp.float32(0.0), jnp.float32(-1e30))[None, None]
            ours = jnp.repeat(lax.dynamic_slice_in_dim(mine, i * t, t, 1), groups, axis=1)
            theirs = lax.dynamic_slice_in_dim(arrived, j * t, t, 1)
            same = ours[:, :, None] == theirs[:, None, :]
            return jnp.where(seen[None] & same, jnp.float32(0.0), jnp.float32(-1e30))[:, None]

        return bias

    def _position(self, index: Any) -> Any:
        order = self.sight.order
        index = jnp.asarray(index, jnp.int32)
        return index if order is None else order.position(index, self._whole(), self.sight.parts)

    def _whole(self) -> int:
        """Positions of the whole sequence."""
        return self.keys * self.devices

    def _zigzag(self, step: Any) -> tuple[Any, Any, Any]:
        """(diagonal, seen whole, to be masked): queries' and keys' tiles of each, two chunks of tiles a device."""
        n = self.length // (2 * self.tile)
        block = np.array([(a, b) for a in range(n) for b in range(n)], np.int32)
        second = block + np.array(
            [[n, 0]], np.int32
        )  # the second chunk's queries see the first chunk's keys, always
        nothing = np.zeros((2, 0), np.int32)
        if isinstance(step, int) and step == 0:
            lower = np.array([(a, b) for a in range(n) for b in range(a)]).reshape(-1, 2)
            seen = np.concatenate([second, lower, lower + n])
            return (np.arange(2 * n),) * 2, seen.T, nothing
        # keys from an earlier device: our first chunk sees their first; from a later one: our second their second
        later = jnp.where(step <= lax.axis_index(self.sight.keys), jnp.int32(0), jnp.int32(n))
        both = [
            jnp.concatenate([jnp.asarray(second[:, d]), jnp.asarray(block[:, d]) + later]) for d in (0, 1)
        ]
        return nothing, both, nothing

    def _natural(self, step: Any) -> tuple[Any, Any, Any]:
        """The same for positions in their own order, or in any: then everything is masked."""
        s, nothing = self.sight, np.zeros((2, 0), np.int32)
        rows, keys = self.length // self.tile, self.keys // self.tile
        every = np.array([(a, b) for a in range(rows) for b in range(keys)])
        if s.order is not None or s.queries != s.keys:
            known = s.mask == "full" and not self.masked
            return nothing, every.T if known else nothing, nothing if known else every.T
        static = isinstance(step, int)
        if s.window and static:
            # The arriving block lies `step` blocks before ours, or the ring's rest behind.
            away = [step * keys, (step - self.devices) * keys]
            near = np.array(
                [min(abs(d + a - b) - 1 for d in away) * self.tile + 1 < s.window for a, b in every]
            )
            every = every[near]
        if s.mask == "full":
            return nothing, every.T, nothing
        if not (static and step == 0):
            return nothing, nothing, every.T  # from a later device nothing is seen
        on, below = every[every[:, 0] == every[:, 1]], every[every[:, 0] > every[:, 1]]
        return on.T, below.T, nothing

    def walk(self, one: Callable[..., Any], carry: Any, moving: Any, also: Callable[[Any], Any]) -> Any:
        """`one(carry, moving, step)` for every step, while `moving` goes on to the next device; `also`: what of the carry
        goes on with it after each step but the last.
        """
        steps = self.steps
        for step in range(1 if self._alike() else steps):
            ahead = self.send(moving) if step + 1 < steps else moving
            carry = one(carry, moving, step)
            carry, moving = (also(carry), ahead) if step + 1 < steps else (carry, ahead)
        if not self._alike():
            return carry

        def body(state: tuple[Any, Any], step: Array) -> tuple[tuple[Any, Any], None]:
            carry, moving = state
            ahead = self.send(moving)
            return (also(one(carry, moving, step)), ahead), None

        (carry, moving), _ = lax.scan(body, (carry, moving), jnp.arange(1, steps - 1, dtype=jnp.int32))
        return one(carry, moving, jnp.int32(steps - 1))

    def _alike(self) -> bool:
        return self.steps >= SCAN_FROM and not self.sight.window

    def send(self, x: Any, by: int = 1) -> Any:
        """Arrays to the device `by` places further round."""
        n = self.devices
        to = [(i, (i + by) % n) for i in range(n)]
        return jax.tree.map(lambda a: permuted(a, self.sight.keys, to), x)


def seen_attention(
    q: Array, k: Array, v: Array, sight: Sight, segments: tuple[Array, Array] | None = None
) -> Array:
    """Softmax attention scaled by head_dim**-0.5, scores in float32, over the keys that `sight` lets be seen.

    q: (batch, queries, heads, head_dim); k, v: (batch, keys, kv_heads, head_dim), local shards; query head h reads key
    head h // (heads / kv_heads). segments: int32 (batch, queries) and (batch, keys); a query sees keys of its own segment
    only. Returns the shape and dtype of q. Memory grows with the length, not with its square.
    """
    ours, theirs = segments or (None, None)
    return _attention(sight, q, k, v, ours, theirs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(sight: Sight, q: Array, k: Array, v: Array, ours: Array | None, theirs: Array | None) -> Array:
    return _forward(sight, q, k, v, ours, theirs)[0]


def _work(sight: Sight, q: Array, keys: int, kv_heads: int, segments: tuple[Any, Any]) -> _Work:
    length = q.shape[1]
    devices = lax.axis_size(sight.keys) if sight.keys else 1
    unit = math.gcd(length, keys, *((keys * devices // (2 * sight.parts),) if sight.order else ()))
    steps = devices
    if sight.window and sight.mask == "causal" and sight.order is None and sight.queries == sight.keys:
        steps = min(devices, 1 + -(-(sight.window - 1) // keys))
    return _Work(sight, length, keys, q.shape[2] // kv_heads, steps, _tile_of(unit), segments)


def _tile_of(unit: int) -> int:
    """The largest tile that divides `unit`, at most TILE; the whole of a unit that has no divisor worth a tile."""
    if unit <= TILE:
        return unit
    best = max(t for t in range(1, TILE + 1) if unit % t == 0)
    return best if best >= TILE // 8 else unit


def _forward(
    sight: Sight, q: Array, k: Array, v: Array, ours: Any, theirs: Any
) -> tuple[Array, tuple[Any, ...]]:
    work = _work(sight, q, k.shape[1], k.shape[2], (ours, theirs))
    heads, rows = q.shape[2], work.tile * work.groups
    q = by_kv_head(q * jnp.asarray(q.shape[3] ** -0.5, q.dtype), k.shape[2])
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def one(state: Any, moving: Any, step: Any) -> Any:
        k, v, arrived = moving
        for pairs in work.pairs(step, arrived):
            state = attend(state, q, k, v, pairs, rows, work.tile)
        return state

    o, lse = (
        mark(x, "attention") for x in finished(work.walk(one, start(q), (k, v, theirs), lambda carry: carry))
    )
    return by_position(o, heads).astype(q.dtype), (q, k, v, ours, theirs, o, lse)


def _backward(sight: Sight, kept: tuple[Any, ...], do_BLHK: Array) -> tuple[Any, ...]:
    q, k, v, ours, theirs, o, lse = kept
    heads, scale, dtype = do_BLHK.shape[2], q.shape[3] ** -0.5, do_BLHK.dtype
    work = _work(sight, do_BLHK, k.shape[2], k.shape[1], (ours, theirs))
    rows = work.tile * work.groups
    do = by_kv_head(wide(do_BLHK), k.shape[1])
    out = (do.astype(dtype), (do * o).sum(axis=-1, keepdims=True), lse)
    zeros = lambda x: vary(jnp.zeros(x.shape, lse.dtype), varying(q))

    def one(grads: Any, moving: Any, step: Any) -> Any:
        k, v, arrived = moving
        for pairs in work.pairs(step, arrived):
            grads = attend_back(grads, q, (k, v), out, pairs, rows, work.tile)
        return grads

    onward = lambda grads: (grads[0], *work.send(grads[1:]))
    dq, dk, dv = work.walk(one, (zeros(q), zeros(k), zeros(v)), (k, v, theirs), onward)
    if work.steps > 1:
        dk, dv = work.send((dk, dv), work.devices - work.steps + 1)
    dq = (by_position(dq, heads) * scale).astype(dtype)
    return dq, dk.transpose(0, 2, 1, 3).astype(dtype), dv.transpose(0, 2, 1, 3).astype(dtype), None, None


_attention.defvjp(_forward, _backward)
