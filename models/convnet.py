"""A residual convolutional network that classifies images, in named ops."""

from __future__ import annotations

from flax import nnx
from jax import Array, nn

from models.classification import image_inputs, sums
from models.convnet_config import ConvNetConfig
from sharding.layers import layers
from sharding.ops import einsum, rms_norm
from sharding.params import normal, ones, param, stack
from sharding.spatial import convolution, pool

STREAM = "batch height width embed"


class Block(nnx.Module):
    """norm, convolution that widens, GELU, product that narrows, residual: the fused inverted bottleneck of EfficientNetV2
    (Tan and Le 2021, arXiv:2104.00298). Windows slide over the narrow stream, so that is what a halo holds.
    """

    def __init__(self, c: ConvNetConfig):
        k, seen = c.kernel, c.kernel**2 * c.embed
        self.norm = param("embed", (c.embed,), ones)
        self.up = param("kernel_height kernel_width embed mlp", (k, k, c.embed, c.mlp), normal(seen**-0.5))
        self.down = param("mlp embed", (c.mlp, c.embed), normal((c.mlp * c.layers * c.stages) ** -0.5))

    def __call__(self, x_BYXD: Array) -> Array:
        h_BYXF = convolution(
            "batch height width embed, kernel_height kernel_width embed mlp -> batch height width mlp",
            rms_norm(x_BYXD, self.norm, STREAM),
            self.up,
        )
        return x_BYXD + einsum(
            "batch height width mlp, mlp embed -> batch height width embed", nn.gelu(h_BYXF), self.down
        )


class ConvNet(nnx.Module):
    """Classifier. Batch: pixels (float32) `batch height width channels`, labels (int32) and weights (float32) `batch`."""

    def __init__(self, c: ConvNetConfig):
        self.inputs = image_inputs(c.height, c.width, c.channels)
        self.stages = c.stages
        k = c.kernel
        self.enter = param(
            "kernel_height kernel_width channels embed",
            (k, k, c.channels, c.embed),
            normal((k * k * c.channels) ** -0.5),
        )
        for stage in range(c.stages):
            setattr(self, f"blocks{stage}", stack(Block(c), c.layers))
        self.norm = param("embed", (c.embed,), ones)
        self.leave = param("embed classes", (c.embed, c.classes), normal(c.embed**-0.5))
        tile = 4 ** (c.stages - 1)
        self.positions = c.height * c.width // tile

    def logits(self, pixels: Array) -> Array:
        """Scores `batch classes` of images `batch height width channels`."""
        x_BYXD = convolution(
            "batch height width channels, kernel_height kernel_width channels embed -> batch height width embed",
            pixels,
            self.enter,
        )
        for stage in range(self.stages):
            if stage:
                x_BYXD = pool(x_BYXD, STREAM, {"height": 2, "width": 2})
            x_BYXD = layers(getattr(self, f"blocks{stage}"), x_BYXD)
        # Mean over positions and scores in one contraction: of split images only the scores are then reduced.
        total_BC = einsum(
            "batch height width embed, embed classes -> batch classes",
            rms_norm(x_BYXD, self.norm, STREAM),
            self.leave,
        )
        return total_BC / self.positions

    def loss(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Global sums over examples: `loss` in nats, `correct` (examples whose label scores highest), `weight`."""
        return sums(self.logits(batch["pixels"]), batch)
