"""A residual multilayer perceptron that classifies feature vectors, in named ops."""

from __future__ import annotations

from flax import nnx
from jax import Array, nn

from models.classification import sums
from models.mlp_config import MLPConfig
from sharding.layers import layers
from sharding.ops import einsum, rms_norm
from sharding.params import Entry, normal, ones, param, stack


class Layer(nnx.Module):
    """norm, up, GELU, down, residual."""

    def __init__(self, c: MLPConfig):
        self.norm = param("embed", (c.embed,), ones)
        self.up = param("embed mlp", (c.embed, c.mlp), normal(c.embed**-0.5))
        self.down = param("mlp embed", (c.mlp, c.embed), normal((c.mlp * c.layers) ** -0.5))

    def __call__(self, x_BD: Array) -> Array:
        h_BF = einsum(
            "batch embed, embed mlp -> batch mlp", rms_norm(x_BD, self.norm, "batch embed"), self.up
        )
        return x_BD + einsum("batch mlp, mlp embed -> batch embed", nn.gelu(h_BF), self.down)


class MLP(nnx.Module):
    """Classifier. Batch: features (float32) `batch features`, labels (int32) and weights (float32) `batch`."""

    def __init__(self, c: MLPConfig):
        self.inputs = {
            "features": Entry("batch features", (c.features,), "float32"),
            "labels": Entry("batch", (), "int32"),
            "weights": Entry("batch", (), "float32"),
        }
        self.enter = param("features embed", (c.features, c.embed), normal(c.features**-0.5))
        self.layers = stack(Layer(c), c.layers)
        self.norm = param("embed", (c.embed,), ones)
        self.leave = param("embed classes", (c.embed, c.classes), normal(c.embed**-0.5))

    def logits(self, features: Array) -> Array:
        """Scores `batch classes` of feature vectors `batch features`."""
        x_BD = layers(
            self.layers, einsum("batch features, features embed -> batch embed", features, self.enter)
        )
        return einsum(
            "batch embed, embed classes -> batch classes",
            rms_norm(x_BD, self.norm, "batch embed"),
            self.leave,
        )

    def loss(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Global sums over examples: `loss` in nats, `correct` (examples whose label scores highest), `weight`."""
        return sums(self.logits(batch["features"]), batch)
