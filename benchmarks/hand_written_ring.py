"""The hand-written step with one sequence over eight devices: ring attention in zig-zag order, in plain `jax.shard_map`.

Each device holds two chunks of 2n, i and 2n-1-i, so that every step of the ring is two products of whole chunks without a
mask. Forward and backward are written out; keys, values and their gradients go round by `ppermute`. Parameters and the
optimizer are whole on every device; gradients are summed once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hand_written import State, Weights, held, optimizer, rms_norm, rope
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from workload import Sizes, initial_weights

N = 8
PASS_ON = [(i, (i + 1) % N) for i in range(N)]


def order(length: int) -> np.ndarray:
    """Position of each place when every device holds chunks i and 2n-1-i of 2n."""
    chunks = np.arange(length).reshape(2 * N, -1)
    return np.concatenate([np.concatenate([chunks[i], chunks[2 * N - 1 - i]]) for i in range(N)])


def _product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _merge(
    state: tuple[jax.Array, ...], q: jax.Array, k: jax.Array, v: jax.Array, bias: Any
) -> tuple[jax.Array, ...]:
    """Online softmax: (output, maximum, sum) after these keys."""
    o, top, total = state
    s = _product("bjnk,bjmk->bjnm", q, k) + bias
    higher = jnp.maximum(top, s.max(-1, keepdims=True))
    e, kept = jnp.exp(s - higher), jnp.exp(top - higher)
    return o * kept + _product("bjnm,bjmk->bjnk", e, v), higher, total * kept + e.sum(-1, keepdims=True)


def _pieces(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    first, second = jnp.split(x, 2, axis=2)
    return first, second


def _triangle(rows: int, groups: int) -> jax.Array:
    return jnp.where(jnp.arange(rows * groups)[:, None] // groups >= jnp.arange(rows)[None], 0.0, -1e30)


def _pass_on(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(lax.ppermute(x, "context", PASS_ON) for x in arrays)


@jax.custom_vjp
def ring(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q (B, J, L*G, K), scaled; k, v (B, J, L, K): this device's two chunks. Returns the shape of q, float32."""
    return _forward(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    (q0, q1), (k0, k1), (v0, v1) = _pieces(q), _pieces(k), _pieces(v)
    groups = q.shape[2] // k.shape[2]
    bias = _triangle(k0.shape[2], groups)
    arrived = _pass_on(k, v)
    nothing = (jnp.zeros_like(q0), jnp.full_like(q0[..., :1], -1e30), jnp.zeros_like(q0[..., :1]))
    first = _merge(nothing, q0, k0, v0, bias)
    second = _merge(_merge(nothing, q1, k0, v0, 0.0), q1, k1, v1, bias)

    def meet(both: Any, arrived: Any, step: Any) -> Any:
        first, second = both
        (k0, k1), (v0, v1) = _pieces(arrived[0]), _pieces(arrived[1])
        second = _merge(second, q1, k0, v0, 0.0)
        early = step <= lax.axis_index(
            "context"
        )  # keys of an earlier device: our first chunk sees their first
        pick = partial(jnp.where, early)
        state = tuple(pick(a, b) for a, b in zip(first, second, strict=True))
        state = _merge(state, pick(q0, q1), pick(k0, k1), pick(v0, v1), 0.0)
        first = tuple(pick(a, b) for a, b in zip(state, first, strict=True))
        second = tuple(pick(b, a) for a, b in zip(state, second, strict=True))
        return first, second

    def body(carry: Any, step: jax.Array) -> Any:
        both, arrived = carry
        ahead = _pass_on(*arrived)
        return (meet(both, arrived, step), ahead), None

    (both, arrived), _ = lax.scan(body, ((first, second), arrived), jnp.arange(1, N - 1))
    both = meet(both, arrived, N - 1)
    o = jnp.concatenate([s[0] / s[2] for s in both], axis=2)
    lse = jnp.concatenate([s[1] + jnp.log(s[2]) for s in both], axis=2)
    return o, (q, k, v, o, lse)


def _back(q: Any, k: Any, v: Any, rows: Any, bias: Any) -> tuple[jax.Array, ...]:
    do, mean, lse = rows
    p = jnp.exp(_product("bjnk,bjmk->bjnm", q, k) + bias - lse)
    ds = p * (_product("bjnk,bjmk->bjnm", do, v) - mean)
    return (
        _product("bjnm,bjmk->bjnk", ds, k),
        _product("bjnk,bjnm->bjkm", q, ds).mT,
        _product("bjnk,bjnm->bjkm", do, p).mT,
    )


def _backward(saved: tuple[jax.Array, ...], do: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, o, lse = saved
    (q0, q1), (k0, k1), (v0, v1) = _pieces(q), _pieces(k), _pieces(v)
    r0, r1 = _rows(do, o, lse)
    bias = _triangle(k0.shape[2], q.shape[2] // k.shape[2])
    arrived = _pass_on(k, v)
    a, b, c = _back(q0, k0, v0, r0, bias), _back(q1, k0, v0, r1, 0.0), _back(q1, k1, v1, r1, bias)
    dq = (a[0], b[0] + c[0])
    dk, dv = (jnp.concatenate([a[i] + b[i], c[i]], axis=2) for i in (1, 2))

    def meet(dq: Any, dkv: Any, arrived: Any, step: Any) -> Any:
        (k0, k1), (v0, v1) = _pieces(arrived[0]), _pieces(arrived[1])
        pick = partial(jnp.where, step <= lax.axis_index("context"))
        a = _back(q1, k0, v0, r1, 0.0)
        b = _back(
            pick(q0, q1),
            pick(k0, k1),
            pick(v0, v1),
            tuple(pick(x, y) for x, y in zip(r0, r1, strict=True)),
            0.0,
        )
        none = jnp.zeros_like
        dq = (dq[0] + pick(b[0], none(b[0])), dq[1] + a[0] + pick(none(b[0]), b[0]))
        parts = [
            jnp.concatenate([a[i] + pick(b[i], none(b[i])), pick(none(b[i]), b[i])], axis=2) for i in (1, 2)
        ]
        return dq, tuple(x + part for x, part in zip(dkv, parts, strict=True))

    def body(carry: Any, step: jax.Array) -> Any:
        dq, dkv, arrived = carry
        ahead = _pass_on(*arrived)
        dq, dkv = meet(dq, _pass_on(*dkv), arrived, step)
        return (dq, dkv, ahead), None

    (dq, dkv, arrived), _ = lax.scan(body, (dq, (dk, dv), arrived), jnp.arange(1, N - 1))
    dq, dkv = meet(dq, _pass_on(*dkv), arrived, N - 1)
    return (jnp.concatenate(dq, axis=2), *_pass_on(*dkv))


def _rows(do: jax.Array, o: jax.Array, lse: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Of each chunk of queries: the output's gradient, its product with the output, the log-sum-exp."""
    halves = [_pieces(x) for x in (do, (do * o).sum(-1, keepdims=True), lse)]
    return tuple(h[0] for h in halves), tuple(h[1] for h in halves)


ring.defvjp(_forward, _backward)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """(B, L, H, K) with (B, L, J, K): causal attention over all devices."""
    B, L, H, K = q.shape
    J = k.shape[2]
    rows = (q * K**-0.5).reshape(B, L, J, H // J, K).transpose(0, 2, 1, 3, 4).reshape(B, J, -1, K)
    o = ring(rows, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    return o.reshape(B, J, L, H // J, K).transpose(0, 2, 1, 3, 4).reshape(B, L, H, K).astype(q.dtype)


def loss_fn(
    w: Weights, tokens: jax.Array, labels: jax.Array, positions: jax.Array, sizes: Sizes
) -> jax.Array:
    """Sum of the cross-entropies of this device's tokens, in nats."""
    angle = positions[:, None] * sizes.theta ** (-jnp.arange(0, sizes.head_dim, 2) / sizes.head_dim)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x = jnp.take(w["embedding"], tokens, axis=0)
    for i in range(sizes.layers):
        p = partial("layer_{}.{}".format, i)
        h = rms_norm(x, w[p("norm_1")], sizes.norm_eps)
        q, k, v = (jnp.einsum("bld,dhk->blhk", h, w[p(n)]) for n in ("query", "key", "value"))
        o = attention(rope(q, cos, sin), rope(k, cos, sin), v)
        x = x + jnp.einsum("blhk,hkd->bld", o, w[p("output")])
        h = rms_norm(x, w[p("norm_2")], sizes.norm_eps)
        both = jnp.einsum("bld,dcf->blcf", h, w[p("gate_up")])
        x = x + (jax.nn.silu(both[:, :, 0]) * both[:, :, 1]) @ w[p("down")]
    logits = rms_norm(x, w["norm"], sizes.norm_eps) @ w["unembedding"]
    hit = labels[..., None] == jnp.arange(sizes.vocab)
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - jnp.where(hit, logits, 0.0).sum(axis=-1))


def build(
    sizes: Sizes, weights: dict[str, Any] | None = None
) -> tuple[Any, State, Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]]:
    """`step, state, put_batch` as `hand_written.build` has them; needs 8 devices."""
    mesh = Mesh(np.asarray(jax.devices()[:N]), ("context",), axis_types=(AxisType.Auto,))
    whole, along = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "context"))
    transform, at = optimizer(sizes), order(sizes.length)

    def local(
        w: Weights, tokens: jax.Array, labels: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Weights]:
        mine = jax.tree.map(lambda x: lax.pcast(x, "context", to="varying"), w)
        loss, grads = jax.value_and_grad(loss_fn)(mine, tokens, labels, positions, sizes)
        tokens_in_all = sizes.batch * sizes.length
        return jax.tree.map(lambda x: lax.psum(x, "context") / tokens_in_all, (loss, grads))

    over = P(None, "context")
    both = jax.shard_map(local, mesh=mesh, in_specs=(P(), over, over, P("context")), out_specs=(P(), P()))

    def train(state: State, batch: dict[str, jax.Array]) -> tuple[State, jax.Array]:
        places = lax.with_sharding_constraint(jnp.asarray(at, jnp.float32), NamedSharding(mesh, P("context")))
        loss, grads = both(state["weights"], batch["tokens"], batch["labels"], places)
        updates, opt = transform.update(grads, state["optimizer"], state["weights"])
        return {"weights": optax.apply_updates(state["weights"], updates), "optimizer": opt}, loss

    kept = held(initial_weights(sizes) if weights is None else weights)
    placed = {name: jax.device_put(jnp.asarray(x), whole) for name, x in kept.items()}
    start = lambda w: {"weights": jax.tree.map(jnp.copy, w), "optimizer": transform.init(w)}
    state = jax.jit(start, out_shardings=whole)(placed)
    step = jax.jit(train, donate_argnums=0, out_shardings=(whole, whole))
    return step, state, lambda batch: {k: jax.device_put(x[:, at], along) for k, x in batch.items()}
