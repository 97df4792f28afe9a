"""Every composition of two or three of six axes on 8 devices computes what one device does, gradients included.

The model is a mixture of experts that drops tokens, the batch has rows of unequal weights and some of none: where the splits
disagree about a sum, an order or a count, it shows here.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from sharding.axes import AXES, MeshShape
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.expert import expert
from sharding.rules.fsdp import fsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from sharding.rules.ulysses import ulysses
from tests.support import (
    Trained,
    assert_same,
    batches,
    in_double,
    initial_params,
    make_step,
    model_configs,
    train,
)

SPLIT = [a for a in AXES if a != "stage"]
MESHES = [
    *(dict.fromkeys(axes, 2) for axes in itertools.combinations(SPLIT, 3)),
    *({a: 2, b: 4} for a, b in itertools.permutations(SPLIT, 2)),
]
QUICK = (
    {"data": 2, "expert": 2, "context": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"tensor": 2, "expert": 4},
)
CONFIG = dataclasses.replace(
    model_configs()["moe"], length=16, kv_heads=8, heads=16, experts=8, top=2, capacity=1.0
)


def rules(mesh: dict[str, int]) -> Rules:
    """The chain of the rules of these axes; every other mesh takes the all-to-all for the ring."""
    ring = MESHES.index(mesh) % 2 == 1
    parts = {"replica": data("replica"), "data": data(), "fsdp": fsdp(), "expert": expert()}
    if ring:
        parts["context"] = context()
    parts["tensor"] = tensor() | sequence() if ring or "context" not in mesh else tensor()
    if not ring:
        parts["context"] = ulysses()
    made = Rules()
    for axis, part in parts.items():
        made = made | part if axis in mesh else made
    return made


def trained(mesh: dict[str, int] | None, by: Partitioner) -> Trained:
    """Two updates."""
    step = make_step(CONFIG) if mesh is None else make_step(CONFIG, rules(mesh), MeshShape(**mesh), by)
    return train(step, initial_params(CONFIG), batches(CONFIG, 2))


@pytest.fixture(scope="module")
def alone() -> Trained:
    """What one device computes."""
    return trained(None, Manual())


@pytest.mark.parametrize(
    "mesh",
    [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MESHES],
    ids=lambda m: " ".join(f"{a}{n}" for a, n in m.items()),
)
def test_a_composition_is_one_device(mesh: dict[str, int], alone: Trained) -> None:
    assert_same(trained(mesh, Manual()), alone, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: " ".join(f"{a}{n}" for a, n in m.items()))
def test_in_double_precision_only_rounding_is_left(mesh: dict[str, int]) -> None:
    assert_same(*in_double(CONFIG, rules(mesh), MeshShape(**mesh)), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[::5], ids=lambda m: " ".join(f"{a}{n}" for a, n in m.items()))
def test_and_under_xlas_partitioner(mesh: dict[str, int], alone: Trained) -> None:
    assert_same(trained(mesh, Auto()), alone, 1e-5)
