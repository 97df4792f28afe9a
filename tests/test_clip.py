"""Clipping by the global norm, which the step takes over all shards."""

from __future__ import annotations

import math

import jax
import numpy as np
import optax
import pytest

from models.mlp_config import MLPConfig
from sharding.axes import MeshShape
from sharding.layout import Layouts
from sharding.mesh import device_mesh
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.tensor import tensor
from sharding.step import Split, TrainStep

SMALL = MLPConfig(features=8, embed=8, mlp=16, layers=2, classes=5)


def updated(rules: Rules, shape: MeshShape, partitioner: Partitioner, clip: float) -> tuple[dict, float]:
    """Parameters after one plain gradient step at rate 1, and the norm that the step reports."""
    sizes = shape.resolve(8 if rules.chain else 1)
    mesh = device_mesh(shape, jax.devices()[: 8 if rules.chain else 1])
    step = TrainStep(
        SMALL.build(), optax.sgd(1.0), Split(Layouts(rules, sizes.sizes()), mesh, partitioner), clip
    )
    rng = np.random.default_rng(1)
    rows = {
        "features": rng.standard_normal((16, 8)).astype(np.float32),
        "labels": rng.integers(0, 5, 16).astype(np.int32),
        "weights": rng.random(16).astype(np.float32),
    }
    batch = {k: jax.device_put(v, step.batch_shardings()[k]) for k, v in rows.items()}
    state, metrics = step.step(step.init(0), batch)
    return jax.tree.map(np.asarray, state["params"]), float(metrics["grad_norm"])


@pytest.mark.parametrize("partitioner", [Manual(), Auto()], ids=["manual", "auto"])
def test_the_update_is_scaled_to_the_norm_over_all_shards(partitioner: Partitioner) -> None:
    split = (data() | fsdp() | tensor(), MeshShape(data=2, fsdp=2, tensor=2), partitioner)
    whole = (Rules(), MeshShape(), Manual())
    start = updated(*whole, clip=1e-30)[0]  # so small a step that nothing moves
    free, norm = updated(*whole, clip=math.inf)
    moved = math.sqrt(sum(float(np.sum((free[p] - start[p]) ** 2)) for p in free))
    assert moved == pytest.approx(norm, rel=1e-5)
    for clip in (norm / 3, norm * 3):
        clipped, reported = updated(*split, clip=clip)
        assert reported == pytest.approx(norm, rel=1e-5), "the norm before clipping is reported"
        scale = min(1.0, clip / norm)
        for p in free:
            np.testing.assert_allclose(clipped[p] - start[p], scale * (free[p] - start[p]), atol=1e-6)
