"""The hand-written step with the length split over four devices, two ways, in plain `jax.shard_map`.

    split       mesh                  what crosses devices in a layer
    sequence    data 2 x tensor 4     Megatron with sequence parallelism (Korthikanti et al. 2022): the residual stream is split
                                      along the length; gathered before, and reduce-scattered after, matrices that are split
    ulysses     data 2 x context 4    parameters are whole; q, k, v and the result of attention change between length split and
                                      heads split by all-to-all (Jacobs et al. 2023)

With `sequence` the vocabulary is split too: of a token's scores three numbers cross devices, maximum, sum of exponentials
and label's score (Shoeybi et al. 2019, section 3). Gradients are summed once, each over the axes that its weight is not
split over.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hand_written import (
    TENSOR_DIM,
    State,
    Weights,
    held,
    layouts,
    optimizer,
    qkv_together,
    rms_norm,
    rope,
    rope_tables,
)
from hand_written_attention import attention
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from workload import Sizes, initial_weights

Split = Literal["sequence", "ulysses"]
AXIS = {"sequence": "tensor", "ulysses": "context"}
"""The mesh axis that splits the length."""
ROWS, N = 2, 4
VOCAB_DIM = {"embedding": 0}


def gathered(x: jax.Array) -> jax.Array:
    """(B, L/n, D) -> (B, L, D)."""
    return lax.all_gather(x, "tensor", axis=1, tiled=True)


def scattered(x: jax.Array) -> jax.Array:
    """Summands (B, L, D) on every device -> their sum (B, L/n, D)."""
    return lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)


def embedded(table: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Rows of a table whose rows are split, for the tokens of the whole length: (B, L/n, D)."""
    local = tokens_BL - lax.axis_index("tensor") * table.shape[0]
    inside = (local >= 0) & (local < table.shape[0])
    found = jnp.take(table, jnp.clip(local, 0, table.shape[0] - 1), axis=0, mode="clip")
    return scattered(jnp.where(inside[..., None], found, 0.0))


def nats_of(logits: jax.Array, labels: jax.Array, split: bool) -> jax.Array:
    """Cross-entropy of each token; where the columns are split, equal on all devices that share them."""
    first = lax.axis_index("tensor") * logits.shape[-1] if split else 0
    top = lax.stop_gradient(logits).max(axis=-1)
    top = lax.pmax(top, "tensor") if split else top
    total = jnp.exp(logits - top[..., None]).sum(axis=-1)
    hit = labels[..., None] == first + jnp.arange(logits.shape[-1])
    chosen = jnp.where(hit, logits, 0.0).sum(axis=-1)
    if split:
        total, chosen = lax.psum((total, chosen), "tensor")
    return jnp.log(total) + top - chosen


def megatron(w: Weights, tokens: jax.Array, labels: jax.Array, sizes: Sizes) -> jax.Array:
    """Sum of the cross-entropies in nats of this device's rows, tokens and labels of the whole length."""
    cos, sin = rope_tables(sizes.length, sizes.head_dim, sizes.theta)
    x = embedded(w["embedding"], tokens)
    for i in range(sizes.layers):
        p = partial("layer_{}.{}".format, i)
        h = gathered(rms_norm(x, w[p("norm_1")], sizes.norm_eps))
        q, k, v = qkv_together(h, w, p, lambda x, *_: x)
        o = attention(rope(q, cos, sin), rope(k, cos, sin), v)
        x = x + scattered(jnp.einsum("blhk,hkd->bld", o, w[p("output")]))
        h = gathered(rms_norm(x, w[p("norm_2")], sizes.norm_eps))
        both = jnp.einsum("bld,dcf->blcf", h, w[p("gate_up")])
        x = x + scattered((jax.nn.silu(both[:, :, 0]) * both[:, :, 1]) @ w[p("down")])
    logits = gathered(rms_norm(x, w["norm"], sizes.norm_eps)) @ w["unembedding"]
    return nats_of(logits, labels, split=True).sum()


def to_heads(x: jax.Array) -> jax.Array:
    """(B, L/n, H, K) -> (B, L, H/n, K)."""
    return lax.all_to_all(x, "context", split_axis=2, concat_axis=1, tiled=True)


def to_length(x: jax.Array) -> jax.Array:
    """(B, L, H/n, K) -> (B, L/n, H, K)."""
    return lax.all_to_all(x, "context", split_axis=1, concat_axis=2, tiled=True)


def ulysses(w: Weights, tokens: jax.Array, labels: jax.Array, sizes: Sizes) -> jax.Array:
    """Sum of the cross-entropies in nats of this device's tokens, (B, L/n)."""
    n = tokens.shape[1]
    tables = rope_tables(sizes.length, sizes.head_dim, sizes.theta)
    cos, sin = (lax.dynamic_slice_in_dim(t, lax.axis_index("context") * n, n) for t in tables)
    x = jnp.take(w["embedding"], tokens, axis=0)
    for i in range(sizes.layers):
        p = partial("layer_{}.{}".format, i)
        h = rms_norm(x, w[p("norm_1")], sizes.norm_eps)
        q, k, v = (jnp.einsum("bld,dhk->blhk", h, w[p(name)]) for name in ("query", "key", "value"))
        o: Any = attention(to_heads(rope(q, cos, sin)), to_heads(rope(k, cos, sin)), to_heads(v))
        x = x + jnp.einsum("blhk,hkd->bld", to_length(o), w[p("output")])
        h = rms_norm(x, w[p("norm_2")], sizes.norm_eps)
        both = jnp.einsum("bld,dcf->blcf", h, w[p("gate_up")])
        x = x + (jax.nn.silu(both[:, :, 0]) * both[:, :, 1]) @ w[p("down")]
    logits = rms_norm(x, w["norm"], sizes.norm_eps) @ w["unembedding"]
    return nats_of(logits, labels, split=False).sum()


def weight_spec(split: Split, name: str, ndim: int) -> P:
    """Layout of a weight: with `sequence` heads, features and vocabulary are split, with `ulysses` nothing."""
    at = (TENSOR_DIM | VOCAB_DIM).get(name.split(".")[-1])
    return P(*("tensor" if d == at else None for d in range(ndim))) if split == "sequence" else P()


def build(
    split: Split, sizes: Sizes, weights: dict[str, Any] | None = None
) -> tuple[Any, State, Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]]:
    """`step, state, put_batch` as `hand_written.build` has them; needs 8 devices."""
    axes = ("data", AXIS[split])
    devices = np.asarray(jax.devices()[: ROWS * N]).reshape(ROWS, N)
    mesh = Mesh(devices, axes, axis_types=(AxisType.Auto,) * 2)
    kept = held(initial_weights(sizes) if weights is None else weights)
    spec = {name: weight_spec(split, name, x.ndim) for name, x in kept.items()}
    at_rest = {name: NamedSharding(mesh, s) for name, s in spec.items()}
    tokens = P("data") if split == "sequence" else P("data", "context")
    rows, whole = NamedSharding(mesh, tokens), NamedSharding(mesh, P())
    transform, loss_fn = optimizer(sizes), megatron if split == "sequence" else ulysses
    # With `sequence` every device of the axis has the sum of all tokens of its rows.
    summed = ("data",) if split == "sequence" else axes

    def local(w: Weights, tokens: jax.Array, labels: jax.Array) -> tuple[jax.Array, Weights]:
        over = {name: tuple(a for a in axes if a not in spec[name]) for name in w}
        mine = {name: lax.pcast(x, over[name], to="varying") for name, x in w.items()}
        loss, grads = jax.value_and_grad(loss_fn)(mine, tokens, labels, sizes)
        in_all = sizes.batch * sizes.length
        return lax.psum(loss, summed) / in_all, {
            name: lax.psum(g, over[name]) / in_all for name, g in grads.items()
        }

    both = jax.shard_map(local, mesh=mesh, in_specs=(spec, tokens, tokens), out_specs=(P(), spec))

    def train(state: State, batch: dict[str, jax.Array]) -> tuple[State, jax.Array]:
        loss, grads = both(state["weights"], batch["tokens"], batch["labels"])
        updates, opt = transform.update(grads, state["optimizer"], state["weights"])
        return {"weights": optax.apply_updates(state["weights"], updates), "optimizer": opt}, loss

    start = lambda w: {"weights": jax.tree.map(jnp.copy, w), "optimizer": transform.init(w)}
    placed = {name: jax.device_put(jnp.asarray(x), at_rest[name]) for name, x in kept.items()}
    lies = layouts(jax.eval_shape(start, placed), at_rest, whole)
    state = jax.jit(start, out_shardings=lies)(placed)
    step = jax.jit(train, donate_argnums=0, out_shardings=(lies, whole))
    return step, state, lambda batch: {k: jax.device_put(x, rows) for k, x in batch.items()}
