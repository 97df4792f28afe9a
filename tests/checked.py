"""What tests of the checker share: a step on devices that are not there, and the findings of its split."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from models.transformer_config import TransformerConfig
from sharding.axes import MeshShape
from sharding.check import check
from sharding.finding import Finding, Limits
from sharding.layout import Layouts
from sharding.mesh import abstract_mesh
from sharding.partitioner import Manual
from sharding.rule import Rules
from sharding.step import Split, TrainStep

WIDE = TransformerConfig(vocab=256, layers=2, embed=512, heads=8, kv_heads=4, head_dim=32, mlp=768, length=64)
ALL = Limits(bytes=1, traffic=0.0, work=0.0)


def step_of(rules: Rules, model: Any, partitioner: Any = Manual(), **mesh: int) -> TrainStep:  # noqa: B008
    """A step on devices that are not there."""
    shape = MeshShape(**mesh)
    count = math.prod(shape.sizes().values())
    mesh_of: Any = abstract_mesh(shape, count)
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
