"""A hand-written training step in plain JAX: the reference that the framework's own step is measured against.

Decoder transformer (RMSNorm, RoPE, causal grouped-query attention, SwiGLU, untied unembedding), mean cross-entropy,
optax AdamW; unrolled layers, no framework. `build(split, sizes)` gives the same step on one device or laid out by
hand for XLA's partitioner over eight:

    split     mesh                 parameters and optimizer state at rest         in use
    one       1 device             whole                                          whole
    data      data 8               whole on every device                          whole
    fsdp      fsdp 8               every array split eightfold along embed         gathered by the partitioner
    tensor    data 2 x tensor 4    Megatron: heads, kv_heads, mlp, vocab split    split

Weights are a flat dict by name; workload.py documents names and shapes, so that any other program can start from
the same ones. Run alone:

    python benchmarks/hand_written.py --split one --steps 5
"""

# ruff: noqa: E402 (the clock starts before the heavy imports)

from __future__ import annotations

import time

_STARTED = time.perf_counter()

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hand_written_attention import attention
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from workload import Sizes, Training, initial_weights, keep_freed_memory, sample_batch

Split = Literal["one", "data", "fsdp", "tensor"]
SPLITS: tuple[Split, ...] = ("one", "data", "fsdp", "tensor")
Weights = dict[str, jax.Array]
State = dict[str, Any]
Hold = Callable[..., jax.Array]


# --- the model --------------------------------------------------------------------------------------------------
# Capital letters: B batch, L length, D embed, H heads, J kv_heads, G heads per kv_head, K head_dim, F mlp, V vocab.


def rms_norm(x_BLD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last dim, in float32 (Zhang & Sennrich 2019)."""
    x = x_BLD.astype(jnp.float32)
    return (x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale_D).astype(x_BLD.dtype)


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, (length, head_dim / 2), of position * theta^(-2i / head_dim) (Su et al. 2021)."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angle = np.arange(length, dtype=np.float64)[:, None] * frequency
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


def rope(x_BLHK: jax.Array, cos_LK: jax.Array, sin_LK: jax.Array) -> jax.Array:
    """Rotate the first half of head_dim against the second by the position's angles."""
    first, second = jnp.split(x_BLHK, 2, axis=-1)
    cos, sin = cos_LK[:, None, :], sin_LK[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def qkv_together(h: jax.Array, w: Weights, p: Callable[[str], str], hold: Hold) -> tuple[jax.Array, ...]:
    """q, k, v from one product, their columns side by side within each kv head, so that heads split over `tensor`
    give one all-reduce of the gradient of `h` instead of three.
    """
    q, k, v = w[p("query")], w[p("key")], w[p("value")]
    D, J, K = k.shape
    joined = jnp.concatenate([q.reshape(D, J, -1, K), k[:, :, None], v[:, :, None]], axis=2)
    out = hold(jnp.einsum("bld,djgk->bljgk", h, joined), "batch", None, "tensor")
    return out[:, :, :, :-2].reshape(*out.shape[:2], -1, K), out[:, :, :, -2], out[:, :, :, -1]


def gate_up_together(h: jax.Array, gate_up: jax.Array, hold: Hold) -> tuple[jax.Array, ...]:
    """Gate and up from one product: one all-reduce likewise, and on one CPU device 14 % less processor time a step."""
    both = hold(jnp.einsum("bld,dcf->blcf", h, gate_up), "batch", None, None, "tensor")
    return both[:, :, 0], both[:, :, 1]


def loss_fn(w: Weights, batch: dict[str, jax.Array], sizes: Sizes, hold: Hold, together: bool) -> jax.Array:
    """Mean cross-entropy in nats over all tokens. `hold(x, *dims)` pins an activation's layout where that helps;
    `together` joins q, k, v: worth it only where it saves collectives (attention_study.md).
    """
    cos, sin = (t.astype(sizes.dtype) for t in rope_tables(sizes.length, sizes.head_dim, sizes.theta))
    w = {name: x.astype(sizes.dtype) if x.ndim > 1 else x for name, x in w.items()}
    x = hold(jnp.take(w["embedding"], batch["tokens"], axis=0), "batch")
    for i in range(sizes.layers):
        p = partial("layer_{}.{}".format, i)
        h = rms_norm(x, w[p("norm_1")], sizes.norm_eps)
        if together:
            q, k, v = qkv_together(h, w, p, hold)
        else:
            q, k, v = (jnp.einsum("bld,dhk->blhk", h, w[p(n)]) for n in ("query", "key", "value"))
        o = attention(rope(q, cos, sin), rope(k, cos, sin), v)
        x = hold(x + hold(jnp.einsum("blhk,hkd->bld", o, w[p("output")]), "batch"), "batch")
        h = rms_norm(x, w[p("norm_2")], sizes.norm_eps)
        gate, up = gate_up_together(h, w[p("gate_up")], hold)
        x = hold(x + hold((jax.nn.silu(gate) * up) @ w[p("down")], "batch"), "batch")
    x = rms_norm(x, w["norm"], sizes.norm_eps)
    logits = hold(x @ w["unembedding"], "batch", None, "tensor").astype(jnp.float32)
    # A comparison rather than a gather: as fast, and it stays local where the vocabulary is split.
    hit = batch["labels"][..., None] == jnp.arange(sizes.vocab)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.where(hit, logits, 0.0).sum(axis=-1))


def optimizer(sizes: Training) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (warm-up from 0, cosine to floor * peak); decay on matrices only."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, sizes.peak, sizes.warmup, sizes.steps, sizes.floor * sizes.peak
    )
    matrices = partial(jax.tree.map, lambda x: x.ndim >= 2)
    adamw = optax.adamw(
        schedule, sizes.b1, sizes.b2, eps=sizes.eps, weight_decay=sizes.weight_decay, mask=matrices
    )
    return optax.chain(optax.clip_by_global_norm(sizes.clip), adamw)


# --- where arrays lie -------------------------------------------------------------------------------------------

MESHES = {"one": {"data": 1}, "data": {"data": 8}, "fsdp": {"data": 8}, "tensor": {"data": 2, "tensor": 4}}
TENSOR_DIM = {"query": 1, "key": 1, "value": 1, "output": 0, "gate_up": 2, "down": 0, "unembedding": 1}


def held(weights: dict[str, Any]) -> dict[str, Any]:
    """The workload's weights as this step holds them: gate and up of a layer as one array, (embed, 2, mlp), so that no
    step has to join them on every device; of experts (experts, embed, 2, mlp).
    """
    kept = {name: x for name, x in weights.items() if not name.endswith((".gate", ".up"))}
    layers = [name.removesuffix(".gate") for name in weights if name.endswith(".gate")]
    return kept | {
        f"{layer}.gate_up": np.stack([weights[f"{layer}.gate"], weights[f"{layer}.up"]], axis=-2)
        for layer in layers
    }


def weight_spec(split: Split, name: str, shape: tuple[int, ...]) -> P:
    """Layout at rest of one weight (and of its two moments)."""
    last = name.split(".")[-1]
    if split == "tensor" and last in TENSOR_DIM:
        dims: list[str | None] = [None] * len(shape)
        dims[TENSOR_DIM[last]] = "tensor"
        return P(*dims)
    if split == "fsdp":
        dims = [None] * len(shape)
        dims[-1 if last in ("output", "down", "embedding") else 0] = "data"
        return P(*dims)
    return P()


def layouts(state: Any, at_rest: dict[str, NamedSharding], whole: NamedSharding) -> Any:
    """Moments lie as their weights, scalars everywhere: an optimizer leaf's last dict key is a weight's name."""

    def one(path: tuple[Any, ...], _: Any) -> NamedSharding:
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in at_rest]
        return at_rest[keys[-1]] if keys else whole

    return jax.tree_util.tree_map_with_path(one, state)


def build(
    split: Split, sizes: Sizes, weights: dict[str, Any] | None = None
) -> tuple[Any, State, Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]]:
    """`step, state, put_batch`: jitted `step(state, batch) -> (state, loss)` donating its state, the state from
    `weights` (default: `initial_weights(sizes)`), and `put_batch`, which lays {"tokens", "labels"} on the mesh.
    Needs 1 device for "one", 8 for the others.
    """
    axes = MESHES[split]
    count = int(np.prod(list(axes.values())))
    devices = np.asarray(jax.devices()[:count]).reshape(tuple(axes.values()))
    mesh = Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    weights = held(initial_weights(sizes) if weights is None else weights)
    spec = {name: weight_spec(split, name, x.shape) for name, x in weights.items()}
    at_rest = {name: NamedSharding(mesh, s) for name, s in spec.items()}
    rows = NamedSharding(mesh, P("data"))
    whole = NamedSharding(mesh, P())
    transform = optimizer(sizes)

    def hold(x: jax.Array, *dims: str | None) -> jax.Array:
        if split == "one":
            return x
        names = ["data" if d == "batch" else d if d in axes else None for d in dims]
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(*names)))

    def use(w: Weights) -> Weights:
        if split != "fsdp":
            return w
        return {name: lax.with_sharding_constraint(x, whole) for name, x in w.items()}

    def init(w: Weights) -> State:
        return {"weights": w, "optimizer": transform.init(w)}

    def train(state: State, batch: dict[str, jax.Array]) -> tuple[State, jax.Array]:
        loss, grads = jax.value_and_grad(lambda w: loss_fn(use(w), batch, sizes, hold, split == "tensor"))(
            state["weights"]
        )
        updates, opt = transform.update(grads, state["optimizer"], state["weights"])
        return {"weights": optax.apply_updates(state["weights"], updates), "optimizer": opt}, loss

    placed = {name: jax.device_put(jnp.asarray(x), at_rest[name]) for name, x in weights.items()}
    lies = layouts(jax.eval_shape(init, placed), at_rest, whole)
    # `copy` so that a donated state never consumes the caller's own arrays.
    state = jax.jit(lambda w: jax.tree.map(jnp.copy, init(w)), out_shardings=lies)(placed)
    step = jax.jit(train, donate_argnums=0, in_shardings=(lies, rows), out_shardings=(lies, whole))
    return step, state, lambda batch: jax.device_put(batch, rows)


def main() -> None:
    """Time one split alone and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--split", choices=SPLITS, default="one")
    parser.add_argument("--steps", type=int, default=5)
    for name in ("kv_heads", "layers", "length", "batch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Sizes(), name))
    parser.add_argument(
        "--memory", choices=("keep", "return"), default="keep", help="freed memory: see workload.py"
    )
    args = vars(parser.parse_args())
    split, steps, memory_kept = args.pop("split"), args.pop("steps"), args.pop("memory") == "keep"
    memory_kept = memory_kept and keep_freed_memory()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1 if split == "one" else 8)
    sizes = Sizes(**args)
    step, state, put_batch = build(split, sizes)
    batch = put_batch(sample_batch(sizes))
    compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    seconds, cpu_seconds, losses, first = [], [], [], 0.0
    for i in range(steps + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        state, loss = compiled(state, batch)
        losses.append(float(loss))
        if i == 0:
            first = time.perf_counter() - _STARTED
        else:
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    result = {
        "program": "hand_written",
        "split": split,
        "parameters": sum(x.size for x in jax.tree.leaves(state["weights"])),
        "start_to_first_step_s": round(first, 3),
        "median_step_s": round(float(np.median(seconds)), 4),
        "min_step_s": round(min(seconds), 4),
        "median_step_cpu_s": round(float(np.median(cpu_seconds)), 4),
        "freed_memory_kept": memory_kept,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "losses": losses,
        "sizes": asdict(sizes),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
