"""A locally connected network in named ops: every position has weights of its own (Dean et al. 2012, section 3)."""

from __future__ import annotations

from flax import nnx
from jax import Array, nn

from models.classification import image_inputs, sums
from models.local_config import LocalConfig
from sharding.layers import layers
from sharding.ops import einsum, rms_norm
from sharding.params import normal, ones, param, stack
from sharding.spatial import locally_connected

STREAM = "batch height width embed"


class Layer(nnx.Module):
    """norm, windows to hidden features, GELU, back to the stream, residual; nothing is shared between positions."""

    def __init__(self, c: LocalConfig):
        k, seen = c.kernel, c.kernel**2 * c.embed
        place = (c.height, c.width)
        self.norm = param("embed", (c.embed,), ones)
        self.up = param(
            "height width kernel_height kernel_width embed mlp",
            (*place, k, k, c.embed, c.mlp),
            normal(seen**-0.5),
        )
        self.down = param(
            "height width mlp embed", (*place, c.mlp, c.embed), normal((c.mlp * c.layers) ** -0.5)
        )

    def __call__(self, x_BYXD: Array) -> Array:
        h_BYXF = locally_connected(
            "batch height width embed, height width kernel_height kernel_width embed mlp -> batch height width mlp",
            rms_norm(x_BYXD, self.norm, STREAM),
            self.up,
        )
        return x_BYXD + einsum(
            "batch height width mlp, height width mlp embed -> batch height width embed",
            nn.gelu(h_BYXF),
            self.down,
        )


class Local(nnx.Module):
    """Classifier. Batch: pixels (float32) `batch height width channels`, labels (int32) and weights (float32) `batch`."""

    def __init__(self, c: LocalConfig):
        self.inputs = image_inputs(c.height, c.width, c.channels)
        place, k = (c.height, c.width), c.kernel
        self.enter = param(
            "height width kernel_height kernel_width channels embed",
            (*place, k, k, c.channels, c.embed),
            normal((k * k * c.channels) ** -0.5),
        )
        self.layers = stack(Layer(c), c.layers)
        self.norm = param("embed", (c.embed,), ones)
        self.leave = param(
            "height width embed classes",
            (*place, c.embed, c.classes),
            normal((c.height * c.width * c.embed) ** -0.5),
        )

    def logits(self, pixels: Array) -> Array:
        """Scores `batch classes` of images `batch height width channels`."""
        x_BYXD = locally_connected(
            "batch height width channels, height width kernel_height kernel_width channels embed -> "
            "batch height width embed",
            pixels,
            self.enter,
        )
        x_BYXD = rms_norm(layers(self.layers, x_BYXD), self.norm, STREAM)
        return einsum(
            "batch height width embed, height width embed classes -> batch classes", x_BYXD, self.leave
        )

    def loss(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Global sums over examples: `loss` in nats, `correct` (examples whose label scores highest), `weight`."""
        return sums(self.logits(batch["pixels"]), batch)
