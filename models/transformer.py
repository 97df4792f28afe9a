"""A decoder transformer (RMSNorm, RoPE, grouped-query attention, SwiGLU) in named ops."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array, nn

from models.transformer_config import TransformerConfig
from sharding.attention import attention, rope
from sharding.errors import InputError
from sharding.layers import layers
from sharding.ops import einsum, embed, rms_norm
from sharding.params import Entry, normal, ones, param, stack
from sharding.project import project
from sharding.recomputed import recomputed
from sharding.unembed import unembed


class Attention(nnx.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, c: TransformerConfig):
        self.q = param("embed heads head_dim", (c.embed, c.heads, c.head_dim), normal(c.embed**-0.5))
        self.k = param("embed kv_heads head_dim", (c.embed, c.kv_heads, c.head_dim), normal(c.embed**-0.5))
        self.v = param("embed kv_heads head_dim", (c.embed, c.kv_heads, c.head_dim), normal(c.embed**-0.5))
        out = (c.heads * c.head_dim * 2 * c.layers) ** -0.5
        self.out = param("heads head_dim embed", (c.heads, c.head_dim, c.embed), normal(out))
        self.theta = c.theta

    def __call__(
        self, x_BLD: Array, segments_BL: Array | None = None, positions_BL: Array | None = None
    ) -> Array:
        q_BLHK, k_BLJK, v_BLJK = project(x_BLD, "batch length embed", self.q, self.k, self.v)
        q_BLHK = rope(q_BLHK, "batch length heads head_dim", self.theta, positions_BL)
        k_BLJK = rope(k_BLJK, "batch length kv_heads head_dim", self.theta, positions_BL)
        o_BLHK = attention(q_BLHK, k_BLJK, v_BLJK, segments=segments_BL)
        return einsum(
            "batch length heads head_dim, heads head_dim embed -> batch length embed", o_BLHK, self.out
        )


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, c: TransformerConfig):
        self.gate_up = param("embed gates mlp", (c.embed, 2, c.mlp), normal(c.embed**-0.5))
        self.down = param("mlp embed", (c.mlp, c.embed), normal((c.mlp * 2 * c.layers) ** -0.5))

    def __call__(self, x_BLD: Array) -> Array:
        both_BLGF = einsum(
            "batch length embed, embed gates mlp -> batch length gates mlp", x_BLD, self.gate_up
        )
        # Computed again for the backward pass: elementwise, from what is kept anyway.
        hidden_BLF = recomputed(lambda both: nn.silu(both[:, :, 0]) * both[:, :, 1])(both_BLGF)
        return einsum("batch length mlp, mlp embed -> batch length embed", hidden_BLF, self.down)


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, c: TransformerConfig):
        self.attention_norm = param("embed", (c.embed,), ones)
        self.attention = Attention(c)
        self.mlp_norm = param("embed", (c.embed,), ones)
        self.mlp = FeedForward(c)

    def __call__(self, x_BLD: Array, *apart: Array) -> Array:
        x_BLD = x_BLD + self.attention(rms_norm(x_BLD, self.attention_norm, "batch length embed"), *apart)
        return x_BLD + self.mlp(rms_norm(x_BLD, self.mlp_norm, "batch length embed"))


class Transformer(nnx.Module):
    """Decoder-only language model. Batch: tokens and labels (int32) and weights (float32), each `batch length`; of packed
    documents also segments and positions (int32), which methods take as `apart`: without them a row is one document.
    """

    def __init__(self, c: TransformerConfig):
        if c.heads % c.kv_heads or c.head_dim % 2:
            raise InputError(
                f"The transformer has heads={c.heads}, kv_heads={c.kv_heads} and head_dim={c.head_dim}: kv_heads must "
                f"divide heads, and head_dim must be even (rotary positions pair its halves). Change one of them."
            )
        self.config = c
        self.inputs = {
            "tokens": Entry("batch length", (c.length,), "int32", "vocab"),
            "labels": Entry("batch length", (c.length,), "int32", "vocab"),
            "weights": Entry("batch length", (c.length,), "float32"),
        }
        if c.documents == "packed":
            self.inputs |= {
                "segments": Entry("batch length", (c.length,), "int32", documents="number"),
                "positions": Entry("batch length", (c.length,), "int32", documents="place"),
            }
        self.table = param(
            "vocab embed", (c.vocab, c.embed), normal(c.embed**-0.5 if c.unembed == "tied" else 1.0)
        )
        self.layers = stack(Block(c), c.layers)
        self.norm = param("embed", (c.embed,), ones)
        if c.unembed == "untied":
            self.unembed = param("embed vocab", (c.embed, c.vocab), normal(c.embed**-0.5))

    def hidden(self, tokens: Array, *apart: Array) -> Array:
        """The residual stream `batch length embed` after the last norm, in the activations' dtype."""
        c = self.config
        x_BLD = layers(self.layers, self.entered(tokens), c.remat, c.loop, apart)
        return rms_norm(x_BLD, self.norm, "batch length embed")

    def entered(self, tokens: Array) -> Array:
        """The residual stream `batch length embed` before the first layer, in the activations' dtype."""
        c = self.config
        x_BLD = embed(self.table, tokens, "batch length", jnp.dtype(c.dtype))
        return x_BLD * jnp.asarray(c.embed**0.5, x_BLD.dtype) if c.unembed == "tied" else x_BLD

    def logits(self, tokens: Array, *apart: Array) -> Array:
        """Next-token scores `batch length vocab` in the activations' dtype for tokens `batch length`."""
        x_BLD = self.hidden(tokens, *apart)
        if self.config.unembed == "tied":
            return einsum("batch length embed, vocab embed -> batch length vocab", x_BLD, self.table)
        return einsum("batch length embed, embed vocab -> batch length vocab", x_BLD, self.unembed)

    def loss(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Global sums over tokens, see `scored`."""
        return self.scored(self.hidden(batch["tokens"], *self.apart(batch)), batch)

    def apart(self, batch: dict[str, Array]) -> tuple[Array, ...]:
        """What keeps the documents of a row apart: segments and positions; nothing where rows are running text."""
        return (batch["segments"], batch["positions"]) if self.config.documents == "packed" else ()

    def scored(self, x_BLD: Array, batch: dict[str, Array]) -> dict[str, Array]:
        """Global sums over tokens, given the residual stream after the last norm: `loss` in nats and `weight`; with z-loss
        also `z_loss`, and `objective`, its sum with `loss`, which is what is minimized.
        """
        c, names = self.config, "batch length embed"
        table = self.table if c.unembed == "tied" else self.unembed
        nats_BL, partition_BL = unembed(x_BLD, table, batch["labels"], names, c.loss_chunk)
        sums = {
            "loss": einsum("batch length ->", nats_BL * batch["weights"]),
            "weight": einsum("batch length ->", batch["weights"]),
        }
        if c.z_loss:
            far_BL = jnp.asarray(c.z_loss, partition_BL.dtype) * jnp.square(partition_BL)
            sums["z_loss"] = einsum("batch length ->", far_BL * batch["weights"])
            sums["objective"] = sums["loss"] + sums["z_loss"]
        return sums
