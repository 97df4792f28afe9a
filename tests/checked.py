"""What tests of the checker share: steps on devices that are not there, their findings, a model with plain jax in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx

from models.transformer_config import TransformerConfig
from sharding.axes import MeshShape
from sharding.check import check
from sharding.finding import Finding, Limits
from sharding.layout import Layouts
from sharding.mesh import abstract_mesh
from sharding.ops import cross_entropy, einsum
from sharding.params import Entry, normal, param
from sharding.partitioner import Manual
from sharding.rule import Rules
from sharding.step import Split, TrainStep

WIDE = TransformerConfig(vocab=256, layers=2, embed=512, heads=8, kv_heads=4, head_dim=32, mlp=768, length=64)
ALL = Limits(bytes=1, traffic=0.0, work=0.0)


class Plain(nnx.Module):
    """A model whose author changes its hidden features with plain jax: `change`, of shape [batch, mlp] to the same."""

    def __init__(self, change: Callable[[jax.Array], jax.Array]):
        self.change = change
        self.inputs = {
            "features": Entry("batch features", (8,), "float32"),
            "labels": Entry("batch", (), "int32"),
            "weights": Entry("batch", (), "float32"),
        }
        self.up = param("features mlp", (8, 16), normal(1.0))
        self.down = param("mlp classes", (16, 4), normal(1.0))

    def loss(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Global sums."""
        h = einsum("batch features, features mlp -> batch mlp", batch["features"], self.up)
        logits = einsum("batch mlp, mlp classes -> batch classes", self.change(h), self.down)
        nats = cross_entropy(logits, batch["labels"], "batch classes")
        return {"loss": einsum("batch ->", nats), "weight": einsum("batch ->", batch["weights"])}


@dataclass(frozen=True)
class PlainConfig:
    """Its config."""

    change: Callable[[jax.Array], jax.Array]

    def build(self) -> Plain:
        """The model."""
        return Plain(self.change)


def step_of(rules: Rules, model: Any, partitioner: Any = Manual(), **mesh: int) -> TrainStep:  # noqa: B008
    """A step on devices that are not there."""
    shape = MeshShape(**mesh)
    mesh_of: Any = abstract_mesh(shape, shape.devices)
    split = Split(Layouts(rules, shape.sizes()), mesh_of, partitioner, 1, "cpu")
    return TrainStep(model.build(), optax.adamw(1e-3), split, clip=1.0)


def inside(make: Any) -> Any:
    """What `make` returns, called where no operation runs."""
    made: list[Any] = []
    jax.eval_shape(lambda: made.append(make()))
    return made[0]


def found(rules: Rules, model: Any, limits: Limits = Limits(), **mesh: int) -> list[Finding]:  # noqa: B008
    """Findings of a split."""
    return list(inside(lambda: check(step_of(rules, model, **mesh), 16, limits)))


def line_of(function: Any) -> str:
    """file:line of a rule's factory."""
    code = function.__wrapped__.__code__
    return f"{code.co_filename}:{code.co_firstlineno}"
