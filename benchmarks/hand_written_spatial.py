"""The hand-written step of a convolutional network whose images are cut into bands of rows, in plain `jax.shard_map`.

Mesh data 2 x context 4: examples are split over the first axis, rows of each image over the second. Before a convolution
each device fetches the rows beside its band from both neighbours (zeros at the image's edges); scores are summed over the
axis, and gradients once over both. Blocks: norm, convolution that widens, GELU, product that narrows, residual
(EfficientNetV2's fused inverted bottleneck, Tan and Le 2021); 2 x 2 means between stages.

Capital letters: B batch, Y rows, X columns, D embed, F mlp, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hand_written import State, Weights, optimizer, rms_norm
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from workload import Images, initial_weights

MESH = {"data": 2, "context": 4}


def with_halo(x: jax.Array, rows: int) -> jax.Array:
    """`x` (B, Y, X, ...) with `rows` rows of the band above and of the band below."""
    n = MESH["context"]
    above = lax.ppermute(x[:, -rows:], "context", [(i, i + 1) for i in range(n - 1)])
    below = lax.ppermute(x[:, :rows], "context", [(i + 1, i) for i in range(n - 1)])
    return jnp.concatenate([above, x, below], axis=1)


def convolve(x_BYXD: jax.Array, kernel: jax.Array) -> jax.Array:
    """Every window of an odd size, zeros around the image."""
    reach = kernel.shape[0] // 2
    x = with_halo(x_BYXD, reach)
    return lax.conv_general_dilated(
        x, kernel, (1, 1), [(0, 0), (reach, reach)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def halved(x_BYXD: jax.Array) -> jax.Array:
    """Means of 2 x 2 positions."""
    B, Y, X, D = x_BYXD.shape
    return x_BYXD.reshape(B, Y // 2, 2, X // 2, 2, D).mean(axis=(2, 4))


def loss_fn(w: Weights, pixels: jax.Array, labels: jax.Array, sizes: Images) -> jax.Array:
    """Sum of the cross-entropies of this device's examples, in nats; equal on all devices that share them."""
    x = convolve(pixels, w["enter"])
    for stage in range(sizes.stages):
        x = halved(x) if stage else x
        for i in range(sizes.layers):
            block = f"block_{stage}_{i}"
            h = convolve(rms_norm(x, w[f"{block}.norm"], sizes.norm_eps), w[f"{block}.up"])
            x = x + jax.nn.gelu(h) @ w[f"{block}.down"]
    # Scores are linear in the positions' sum, and few: those are what crosses devices.
    scores = rms_norm(x, w["norm"], sizes.norm_eps).sum(axis=(1, 2)) @ w["leave"]
    positions = sizes.height * sizes.width // 4 ** (sizes.stages - 1)
    scores_BC = lax.psum(scores, "context") / positions
    hit = labels[:, None] == jnp.arange(sizes.classes)
    return jnp.sum(jax.nn.logsumexp(scores_BC, axis=-1) - jnp.where(hit, scores_BC, 0.0).sum(axis=-1))


def build(
    sizes: Images, weights: dict[str, Any] | None = None
) -> tuple[Any, State, Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]]:
    """`step, state, put_batch` as `hand_written.build` has them, for {"pixels", "labels"}; needs 8 devices."""
    devices = np.asarray(jax.devices()[: math.prod(MESH.values())]).reshape(tuple(MESH.values()))
    mesh = Mesh(devices, tuple(MESH), axis_types=(AxisType.Auto,) * len(MESH))
    bands = {"pixels": P("data", "context"), "labels": P("data")}
    lies, whole = {k: NamedSharding(mesh, s) for k, s in bands.items()}, NamedSharding(mesh, P())
    transform = optimizer(sizes)

    def local(w: Weights, pixels: jax.Array, labels: jax.Array) -> tuple[jax.Array, Weights]:
        mine = lax.pcast(w, tuple(MESH), to="varying")
        loss, grads = jax.value_and_grad(loss_fn)(mine, pixels, labels, sizes)
        mean = lambda x, axes: jax.tree.map(lambda x: lax.psum(x, axes) / sizes.batch, x)
        return mean(loss, "data"), mean(grads, tuple(MESH))

    both = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), bands["pixels"], bands["labels"]), out_specs=(P(), P())
    )

    def train(state: State, batch: dict[str, jax.Array]) -> tuple[State, jax.Array]:
        loss, grads = both(state["weights"], batch["pixels"], batch["labels"])
        updates, opt = transform.update(grads, state["optimizer"], state["weights"])
        return {"weights": optax.apply_updates(state["weights"], updates), "optimizer": opt}, loss

    start = lambda w: {"weights": jax.tree.map(jnp.copy, w), "optimizer": transform.init(w)}
    kept = initial_weights(sizes) if weights is None else weights
    placed = {name: jax.device_put(jnp.asarray(x), whole) for name, x in kept.items()}
    state = jax.jit(start, out_shardings=whole)(placed)
    step = jax.jit(train, donate_argnums=0, out_shardings=(whole, whole))
    return step, state, lambda batch: {k: jax.device_put(x, lies[k]) for k, x in batch.items()}
