"""The hand-written step with mixtures of experts over four devices: capacity, all-to-all, in plain `jax.shard_map`.

Mesh data 2 x expert 4: rows of the batch are split over both axes, experts over the second. A token's two experts are
those of the highest scores, weighed by the softmax of these scores (Shazeer et al. 2017); each expert has slots for a row
of the batch, given out in order of position, and a choice that finds none is dropped (Lepikhin et al. 2020). Tokens go into
slots, and back, by gathers only, whose gradients are gathers too. Gradients are summed once, those of the experts over
`data` alone.

Capital letters besides those of hand_written.py: E experts, S slots of an expert for a row, T tokens held here, k choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hand_written import State, Weights, held, layouts, optimizer, rms_norm, rope, rope_tables
from hand_written_attention import attention
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from workload import Sizes, initial_weights

MESH = {"data": 2, "expert": 4}
OF_EXPERTS = ("gate_up", "down")


@jax.custom_vjp
def pick(x_ND: jax.Array, at: jax.Array, back: jax.Array) -> jax.Array:
    """Rows `at` of `x`, zero for N; `back` (N, m) says in which places of the result each row of `x` went, at most m of them
    (the number of places for none), so that the gradient is a gather as well and not a scatter.
    """
    return jnp.take(x_ND, at, axis=0, mode="fill", fill_value=0)


def _pick_forward(x: jax.Array, at: jax.Array, back: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pick(x, at, back), back


def _pick_backward(back: jax.Array, dy: jax.Array) -> tuple[jax.Array, None, None]:
    flat = dy.reshape(-1, dy.shape[-1])
    return jnp.take(flat, back, axis=0, mode="fill", fill_value=0).sum(axis=1), None, None


pick.defvjp(_pick_forward, _pick_backward)


def slots_of(sizes: Sizes) -> int:
    """Slots of an expert for a row: equal shares of its choices times the capacity, up to a multiple of 8."""
    return 8 * math.ceil(math.ceil(sizes.length * sizes.top * sizes.capacity / sizes.experts) / 8)


def places(experts_BLk: jax.Array, sizes: Sizes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """place (B, L, k): slot of each choice, counted (expert, row, slot), E*B*S for none; token (E, B, S): the token in each
    slot, T for none; choice (E*B*S): the choice, T*k for none.
    """
    B, L, k = experts_BLk.shape
    E, S = sizes.experts, slots_of(sizes)
    hit = experts_BLk[..., None] == jnp.arange(E)
    here = hit.sum(axis=2, dtype=jnp.int32)
    before = jnp.cumsum(here, axis=1) - here
    rank = jnp.where(hit, before[:, :, None], 0).sum(axis=-1)
    row = jnp.arange(B)[:, None, None]
    place = jnp.where(rank < S, (experts_BLk * B + row) * S + rank, E * B * S)
    empty = lax.pcast(jnp.full(E * B * S, B * L * k, jnp.int32), tuple(MESH), to="varying")
    choice = empty.at[place.reshape(-1)].set(jnp.arange(B * L * k, dtype=jnp.int32), mode="drop")
    return place, (choice // k).reshape(E, B, S), choice


def mixture(h: jax.Array, w: Weights, p: Callable[[str], str], sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """What the experts make of `h` (B, L, D), and the sum over rows of L times the balance loss (1 where the load is even)."""
    B, L, D = h.shape
    E, k = sizes.experts, sizes.top
    scores = h.astype(jnp.float32) @ w[p("router")]
    best, experts = lax.top_k(scores, k)
    gates = jax.nn.softmax(best, axis=-1)
    share = (experts[..., None] == jnp.arange(E)).sum(axis=(1, 2)) / k
    balance = E * jnp.sum(share * jax.nn.softmax(scores, axis=-1).sum(axis=1)) / L

    place, token, choice = places(experts, sizes)
    sent = pick(h.reshape(B * L, D), token, place.reshape(B * L, k))
    x = lax.all_to_all(sent, "expert", split_axis=0, concat_axis=1, tiled=True)
    both = jnp.einsum("ebsd,edcf->ebscf", x, w[p("gate_up")])
    y = jnp.einsum("ebsf,efd->ebsd", jax.nn.silu(both[:, :, :, 0]) * both[:, :, :, 1], w[p("down")])
    back = lax.all_to_all(y, "expert", split_axis=1, concat_axis=0, tiled=True)
    parts = pick(back.reshape(-1, D), place, choice[:, None])
    return jnp.einsum("blkd,blk->bld", parts, gates), balance


def loss_fn(w: Weights, tokens: jax.Array, labels: jax.Array, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Sums over this device's tokens: what is minimized, and the cross-entropy in nats."""
    cos, sin = rope_tables(sizes.length, sizes.head_dim, sizes.theta)
    x, balance = jnp.take(w["embedding"], tokens, axis=0), 0.0
    for i in range(sizes.layers):
        p = partial("layer_{}.{}".format, i)
        h = rms_norm(x, w[p("norm_1")], sizes.norm_eps)
        q, k, v = (jnp.einsum("bld,dhk->blhk", h, w[p(n)]) for n in ("query", "key", "value"))
        o = attention(rope(q, cos, sin), rope(k, cos, sin), v)
        x = x + jnp.einsum("blhk,hkd->bld", o, w[p("output")])
        made, uneven = mixture(rms_norm(x, w[p("norm_2")], sizes.norm_eps), w, p, sizes)
        x, balance = x + made, balance + uneven
    logits = rms_norm(x, w["norm"], sizes.norm_eps) @ w["unembedding"]
    hit = labels[..., None] == jnp.arange(sizes.vocab)
    nats = jnp.sum(jax.nn.logsumexp(logits, axis=-1) - jnp.where(hit, logits, 0.0).sum(axis=-1))
    return nats + sizes.balance * balance, nats


def build(
    sizes: Sizes, weights: dict[str, Any] | None = None
) -> tuple[Any, State, Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]]:
    """`step, state, put_batch` as `hand_written.build` has them; needs 8 devices."""
    devices = np.asarray(jax.devices()[: math.prod(MESH.values())]).reshape(tuple(MESH.values()))
    mesh = Mesh(devices, tuple(MESH), axis_types=(AxisType.Auto,) * len(MESH))
    kept = held(initial_weights(sizes) if weights is None else weights)
    spec = {name: P("expert") if name.endswith(OF_EXPERTS) else P() for name in kept}
    at_rest = {name: NamedSharding(mesh, s) for name, s in spec.items()}
    rows, whole = NamedSharding(mesh, P(tuple(MESH))), NamedSharding(mesh, P())
    transform = optimizer(sizes)

    def local(w: Weights, tokens: jax.Array, labels: jax.Array) -> tuple[jax.Array, Weights]:
        over = {name: ("data",) if name.endswith(OF_EXPERTS) else tuple(MESH) for name in w}
        mine = {name: lax.pcast(x, over[name], to="varying") for name, x in w.items()}
        (_, nats), grads = jax.value_and_grad(loss_fn, has_aux=True)(mine, tokens, labels, sizes)
        in_all = sizes.batch * sizes.length
        return lax.psum(nats, tuple(MESH)) / in_all, {
            name: lax.psum(g, over[name]) / in_all for name, g in grads.items()
        }

    both = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, P(tuple(MESH)), P(tuple(MESH))), out_specs=(P(), spec)
    )

    def train(state: State, batch: dict[str, jax.Array]) -> tuple[State, jax.Array]:
        loss, grads = both(state["weights"], batch["tokens"], batch["labels"])
        updates, opt = transform.update(grads, state["optimizer"], state["weights"])
        return {"weights": optax.apply_updates(state["weights"], updates), "optimizer": opt}, loss

    def start(w: Weights) -> State:
        return {"weights": jax.tree.map(jnp.copy, w), "optimizer": transform.init(w)}

    placed = {name: jax.device_put(jnp.asarray(x), at_rest[name]) for name, x in kept.items()}
    lies = layouts(jax.eval_shape(start, placed), at_rest, whole)
    state = jax.jit(start, out_shardings=lies)(placed)
    step = jax.jit(train, donate_argnums=0, out_shardings=(lies, whole))
    return step, state, lambda batch: {k: jax.device_put(x, rows) for k, x in batch.items()}
