"""A vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929) in named ops: patches as tokens, full attention.

The patches are a convolution whose windows tile the image, so that rows of patches lie where the image's rows lay.
"""

from __future__ import annotations

from flax import nnx
from jax import Array

from models.classification import image_inputs, sums
from models.transformer import FeedForward
from models.vit_config import ViTConfig
from sharding.attention import attention
from sharding.layers import layers
from sharding.merge import add, merge
from sharding.ops import einsum, rms_norm
from sharding.params import normal, ones, param, stack
from sharding.project import project
from sharding.spatial import convolution

STREAM = "batch length embed"


class Attention(nnx.Module):
    """Grouped-query self-attention in which every patch sees every other; positions are in the stream already."""

    def __init__(self, c: ViTConfig):
        self.q = param("embed heads head_dim", (c.embed, c.heads, c.head_dim), normal(c.embed**-0.5))
        self.k = param("embed kv_heads head_dim", (c.embed, c.kv_heads, c.head_dim), normal(c.embed**-0.5))
        self.v = param("embed kv_heads head_dim", (c.embed, c.kv_heads, c.head_dim), normal(c.embed**-0.5))
        out = (c.heads * c.head_dim * 2 * c.layers) ** -0.5
        self.out = param("heads head_dim embed", (c.heads, c.head_dim, c.embed), normal(out))

    def __call__(self, x_BLD: Array) -> Array:
        q_BLHK, k_BLJK, v_BLJK = project(x_BLD, STREAM, self.q, self.k, self.v)
        o_BLHK = attention(q_BLHK, k_BLJK, v_BLJK, mask="full")
        return einsum(
            "batch length heads head_dim, heads head_dim embed -> batch length embed", o_BLHK, self.out
        )


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, c: ViTConfig):
        self.attention_norm = param("embed", (c.embed,), ones)
        self.attention = Attention(c)
        self.mlp_norm = param("embed", (c.embed,), ones)
        self.mlp = FeedForward(c)  # type: ignore[arg-type]  # reads embed, mlp and layers, which are called alike here

    def __call__(self, x_BLD: Array) -> Array:
        x_BLD = x_BLD + self.attention(rms_norm(x_BLD, self.attention_norm, STREAM))
        return x_BLD + self.mlp(rms_norm(x_BLD, self.mlp_norm, STREAM))


class ViT(nnx.Module):
    """Classifier. Batch: pixels (float32) `batch height width channels`, labels (int32) and weights (float32) `batch`."""

    def __init__(self, c: ViTConfig):
        self.config = c
        self.inputs = image_inputs(c.height, c.width, c.channels)
        self.length = (c.height // c.patch) * (c.width // c.patch)
        """Patches of an image."""
        seen = c.patch**2 * c.channels
        self.enter = param(
            "kernel_height kernel_width channels embed",
            (c.patch, c.patch, c.channels, c.embed),
            normal(seen**-0.5),
        )
        self.places = param("length embed", (self.length, c.embed), normal(0.02))
        self.layers = stack(Block(c), c.layers)
        self.norm = param("embed", (c.embed,), ones)
        self.leave = param("embed classes", (c.embed, c.classes), normal(c.embed**-0.5))

    def logits(self, pixels: Array) -> Array:
        """Scores `batch classes` of images `batch height width channels`."""
        patches_BYXD = convolution(
            "batch height width channels, kernel_height kernel_width channels embed -> batch height width embed",
            pixels,
            self.enter,
            stride=self.config.patch,
            padding="valid",
        )
        x_BLD = add(
            merge(patches_BYXD, "batch height width embed -> batch length embed"), STREAM, self.places
        )
        x_BLD = rms_norm(layers(self.layers, x_BLD, self.config.remat), self.norm, STREAM)
        # Mean over patches and scores in one contraction: of a split image only the scores are then reduced.
        total_BC = einsum("batch length embed, embed classes -> batch classes", x_BLD, self.leave)
        return total_BC / self.length

    def loss(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Global sums over examples: `loss` in nats, `correct` (examples whose label scores highest), `weight`."""
        return sums(self.logits(batch["pixels"]), batch)
