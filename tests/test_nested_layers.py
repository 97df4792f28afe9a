"""Layers within layers: a block that holds a stack of its own trains as on one device, and every op in it is heard."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax import Array

from models.mlp import MLP, Layer
from models.mlp_config import MLPConfig
from sharding.axes import MeshShape
from sharding.layers import Loop, layers
from sharding.ops import einsum, rms_norm
from sharding.params import stack
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.proof.witness import witness
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.tensor import tensor
from tests.support import assert_same, batches, make_step, shrunk, train

CONFIG = shrunk(MLPConfig())
RULES, MESH = data() | fsdp() | tensor(), MeshShape(data=2, fsdp=2, tensor=2)
LOOPS: tuple[Loop, ...] = ("scan", "unroll")


class Group(nnx.Module):
    """Two layers."""

    def __init__(self, c: MLPConfig, loop: Loop):
        self.loop: Loop = loop
        self.layers = stack(Layer(c), 2)

    def __call__(self, x_BD: Array) -> Array:
        return layers(self.layers, x_BD, loop=self.loop)


class Nested(MLP):
    """Three groups of two layers."""

    def __init__(self, c: MLPConfig, outer: Loop, inner: Loop):
        super().__init__(c)
        self.loop: Loop = outer
        self.layers = stack(Group(c, inner), 3)

    def logits(self, features: Array) -> Array:
        """Scores `batch classes`."""
        x_BD = einsum("batch features, features embed -> batch embed", features, self.enter)
        x_BD = rms_norm(layers(self.layers, x_BD, loop=self.loop), self.norm, "batch embed")
        return einsum("batch embed, embed classes -> batch classes", x_BD, self.leave)


def initial() -> dict[str, np.ndarray]:
    """Parameters of the model, whatever its loops."""
    return jax.device_get(make_step(CONFIG, model=Nested(CONFIG, "unroll", "unroll")).init(0)["params"])


@pytest.mark.parametrize("by", [Manual(), Auto()], ids=["manual", "auto"])
@pytest.mark.parametrize(("outer", "inner"), [("scan", "scan"), ("unroll", "scan")])
def test_layers_within_layers_train_as_on_one_device(outer: Loop, inner: Loop, by: Partitioner) -> None:
    rows = batches(CONFIG, 2)
    one = train(make_step(CONFIG, model=Nested(CONFIG, "unroll", "unroll")), initial(), rows)
    many = make_step(CONFIG, RULES, MESH, by, model=Nested(CONFIG, outer, inner))
    assert_same(train(many, initial(), rows), one, 1e-5)


def test_they_are_heard_alike_however_they_run() -> None:
    (batch,) = batches(CONFIG, 1)
    seen: dict[Any, Any] = {}
    for loops in itertools.product(LOOPS, LOOPS):
        step = make_step(CONFIG, RULES, MESH, model=Nested(CONFIG, *loops))
        seen[loops] = witness(step, initial(), batch)
    plain = seen["unroll", "unroll"]
    assert {s.tap.scope for s in plain} == {
        "",
        *(f"layer {i} layer {k}" for i, k in itertools.product(range(3), range(2))),
    }
    for loops, found in seen.items():
        assert [s.title for s in found] == [s.title for s in plain], loops
        for a, b in zip(found, plain, strict=True):
            np.testing.assert_allclose(a.value, b.value, rtol=1e-4, atol=1e-5)
            assert (a.gradient is None) == (b.gradient is None)
            if a.gradient is not None:
                np.testing.assert_allclose(a.gradient, b.gradient, rtol=1e-4, atol=1e-5)
