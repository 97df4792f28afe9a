"""A small transformer that reads an image row by row, in plain Flax Linen: a guest that knows nothing of shardlab.

It names no dims and calls no named op. `configs/foreign_linen.py` says by path what its arrays' dims mean.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and beside a residual (Vaswani et al. 2017; pre-norm)."""

    heads: int
    mlp: int

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        # No biases: that of the keys moves every score of a query alike, so its gradient is rounding and nothing else.
        attention = nn.MultiHeadDotProductAttention(self.heads, use_bias=False, name="attention")
        x_BLD = x_BLD + attention(nn.LayerNorm()(x_BLD))
        h_BLF = nn.gelu(nn.Dense(self.mlp, name="up")(nn.LayerNorm()(x_BLD)))
        return x_BLD + nn.Dense(x_BLD.shape[-1], name="down")(h_BLF)


class Rows(nn.Module):
    """Classifier of square images given as features `batch (rows x rows)`; each row of pixels is a token."""

    rows: int
    embed: int
    heads: int
    mlp: int
    layers: int
    classes: int

    @nn.compact
    def __call__(self, features: Array) -> Array:
        x_BLD = nn.Dense(self.embed, name="enter")(features.reshape(-1, self.rows, self.rows))
        x_BLD = x_BLD + self.param("positions", nn.initializers.normal(0.02), (1, self.rows, self.embed))
        for _ in range(self.layers):
            x_BLD = Block(self.heads, self.mlp)(x_BLD)
        return nn.Dense(self.classes, name="leave")(nn.LayerNorm()(x_BLD).mean(axis=1))


def start(net: Rows, key: Array) -> Any:
    """The module's own initial parameters."""
    return net.init(key, jnp.zeros((1, net.rows**2)))["params"]


def sums(net: Rows, params: Any, batch: dict[str, Array]) -> dict[str, Array]:
    """Sums over examples: `loss` in nats, `correct`, `weight`. Batch: features, labels (int32) and weights."""
    logits: Any = net.apply({"params": params}, batch["features"])
    nats_B = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    right_B = (jnp.argmax(logits, axis=-1) == batch["labels"]).astype(nats_B.dtype)
    of_batch = lambda x_B: jnp.sum(x_B * batch["weights"])
    return {"loss": of_batch(nats_B), "correct": of_batch(right_B), "weight": jnp.sum(batch["weights"])}
