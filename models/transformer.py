"""A decoder transformer (RMSNorm, RoPE, grouped-query attention, SwiGLU) in named ops."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array, checkpoint, nn

from models.transformer_config import TransformerConfig
from sharding.attention import attention, rope
from sharding.errors import InputError
from sharding.layers import layers
from sharding.ops import cross_entropy, einsum, embed, rms_norm
from sharding.params import Entry, normal, ones, param, stack
from sharding.project import project


class Attention(nnx.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, c: TransformerConfig):
        self.q = param("embed heads head_dim", (c.embed, c.heads, c.head_dim), normal(c.embed**-0.5))
        self.k = param("embed kv_heads head_dim", (c.embed, c.kv_heads, c.head_dim), normal(c.embed**-0.5))
        self.v = param("embed kv_heads head_dim", (c.embed, c.kv_heads, c.head_dim), normal(c.embed**-0.5))
        out = (c.heads * c.head_dim * 2 * c.layers) ** -0.5
        self.out = param("heads head_dim embed", (c.heads, c.head_dim, c.embed), normal(out))
        self.theta = c.theta

    def __call__(self, x_BLD: Array) -> Array:
        q_BLHK, k_BLJK, v_BLJK = project(x_BLD, "batch length embed", self.q, self.k, self.v)
        q_BLHK = rope(q_BLHK, "batch length heads head_dim", self.theta)
        k_BLJK = rope(k_BLJK, "batch length kv_heads head_dim", self.theta)
        o_BLHK = attention(q_BLHK, k_BLJK, v_BLJK)
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
        hidden_BLF = checkpoint(lambda both: nn.silu(both[:, :, 0]) * both[:, :, 1])(both_BLGF)
        return einsum("batch length mlp, mlp embed -> batch length embed", hidden_BLF, self.down)


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, c: TransformerConfig):
        self.attention_norm = param("embed", (c.embed,), ones)
        self.attention = Attention(c)
        self.mlp_norm = param("embed", (c.embed,), ones)
        self.mlp = FeedForward(c)

    def __call__(self, x_BLD: Array) -> Array:
        x_BLD = x_BLD + self.attention(rms_norm(x_BLD, self.attention_norm, "batch length embed"))
        return x_BLD + self.mlp(rms_norm(x_BLD, self.mlp_norm, "batch length embed"))


class Transformer(nnx.Module):
    """Decoder-only language model. Batch: tokens and labels (int32) and weights (float32), each `batch length`."""

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
        self.table = param(
            "vocab embed", (c.vocab, c.embed), normal(c.embed**-0.5 if c.unembed == "tied" else 1.0)
        )
        self.layers = stack(Block(c), c.layers)
        self.norm = param("embed", (c.embed,), ones)
        if c.unembed == "untied":
            self.unembed = param("embed vocab", (c.embed, c.vocab), normal(c.embed**-0.5))

    def logits(self, tokens: Array) -> Array:
        """Next-token scores `batch length vocab` in the activations' dtype for tokens `batch length`."""
        c = self.config
        x_BLD = embed(self.table, tokens, "batch length").astype(c.dtype)
        if c.unembed == "tied":
            x_BLD = x_BLD * jnp.asarray(c.embed**0.5, x_BLD.dtype)
        x_BLD = rms_norm(layers(self.layers, x_BLD, c.remat, c.loop), self.norm, "batch length embed")
        if c.unembed == "tied":
            return einsum("batch length embed, vocab embed -> batch length vocab", x_BLD, self.table)
        return einsum("batch length embed, embed vocab -> batch length vocab", x_BLD, self.unembed)

    def loss(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Global sums over tokens: `loss` in nats, `weight`."""
        nats_BL = cross_entropy(self.logits(batch["tokens"]), batch["labels"], "batch length vocab")
        return {
            "loss": einsum("batch length ->", nats_BL * batch["weights"]),
            "weight": einsum("batch length ->", batch["weights"]),
        }
