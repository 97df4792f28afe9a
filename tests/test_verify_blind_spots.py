"""What a verification could be blind to, planted; and what is right but unusual, which must pass."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

import sharding.ops
import sharding.step
from experiments.optimizers import AdamW
from experiments.verified_rows import batches, indices_of
from models.mlp import MLP
from models.mlp_config import MLPConfig
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.foreign import Foreign
from sharding.partitioner import Auto
from sharding.rules.data import data
from sharding.rules.tensor import tensor
from tests.verified import BOTH, DATA, Opened, Own, judged, only, small

TENSOR = MeshShape(tensor=2)


# Faults.


@pytest.mark.parametrize("lost", ["second shard", "last row of each shard"])
def test_rows_of_the_vocabulary_that_text_does_not_use_are_looked_up(
    lost: str, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    real = sharding.ops._own_rows

    def planted(ids: Array, axes: tuple[str, ...], rows: int) -> tuple[Array, Array]:
        local, here = real(ids, axes, rows)
        keeps = (jax.lax.axis_index(axes) == 0) if lost == "second shard" else (local < rows - 1)
        return local, here & keeps

    monkeypatch.setattr(sharding.ops, "_own_rows", planted)
    outcome = only(judged(small("transformer"), opened, TENSOR))
    assert outcome.departure is not None
    assert outcome.departure.what.startswith("embed"), outcome.departure


def test_indices_hit_the_first_and_the_last_of_every_part(opened: Opened) -> None:
    e = small("transformer")
    found = indices_of(e.model.build())
    assert found == {"tokens": 256, "labels": 256}
    (batch,) = batches(e, opened(e), 8, 1, found)
    edges = {at for part in range(8) for at in (32 * part, 32 * part + 31)}
    for name in found:
        assert edges <= set(batch[name][1:].ravel().tolist())
        assert (batch[name].min(), batch[name].max()) == (0, 255)


def test_every_row_counts_in_the_first_update_and_an_eighth_of_them_not_in_each_later_one(
    opened: Opened,
) -> None:
    e = small("transformer")
    counts = lambda rows: [b["weights"].any(axis=1).tolist() for b in batches(e, opened(e), rows, 4, {})]
    without = lambda at: [row != at for row in range(8)]
    assert counts(8) == [[True] * 8, without(0), without(1), without(2)]
    assert counts(2) == [[True, True], [False, True], [True, False], [False, True]]


def test_a_training_that_leaves_the_numbers_is_refused(opened: Opened) -> None:
    e = replace(small(), optimizer=AdamW(peak=1e30, warmup=0))
    with pytest.raises(InputError, match="not finite within 3 updates"):
        judged(e, opened, steps=3)


def test_a_budget_that_is_no_number_passes_nothing() -> None:
    from sharding.proof.budget import Compared

    assert Compared("parameter", "w", 1.0, float("nan"), 1.0).share == float("inf")


LATE = {
    "an update a hundredth too large from the third on": (
        lambda n, new, old: old + 1.01 * (new - old),
        "1.01 times",
    ),
    "an update that stops after the second": (lambda n, new, old: old, "."),
}


@pytest.mark.parametrize("fault", LATE)
def test_a_fault_of_later_updates_is_named_with_its_update(
    fault: str, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    change, looks = LATE[fault]
    real = sharding.step.TrainStep.updated

    def planted(self: Any, state: Any, batch: Any) -> Any:
        new, metrics, grads = real(self, state, batch)
        if self.split.mesh is not None:
            path = sorted(new["params"])[0]
            old, made = state["params"][path], new["params"][path]
            late = jnp.where(state["step"] >= 2, change(state["step"], made, old), made)
            new = {**new, "params": {**new["params"], path: late}}
        return new, metrics, grads

    monkeypatch.setattr(sharding.step.TrainStep, "updated", planted)
    outcome = only(judged(replace(small(), optimizer=AdamW(warmup=1)), opened, DATA, steps=4))
    d = outcome.departure
    assert d is not None, outcome
    assert d.phase == "update"
    assert "after update 3" in d.what, d
    assert re.search(looks, d.looks), d


def test_the_counter_of_updates_is_compared(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    real = sharding.step.TrainStep.updated

    def planted(self: Any, state: Any, batch: Any) -> Any:
        new, *rest = real(self, state, batch)
        stuck = new if self.split.mesh is None else {**new, "step": state["step"]}
        return stuck, *rest

    monkeypatch.setattr(sharding.step.TrainStep, "updated", planted)
    assert only(judged(small(), opened, DATA)).departs


# Right, though unusual.


@dataclass(frozen=True)
class Scalars:
    """Logistic regression with a bias and a temperature: parameters that are one number."""

    def build(self) -> Foreign:
        """The model."""

        def loss(tree: Any, b: Any) -> dict[str, Array]:
            margin = (b["features"] @ tree["w"] + tree["b"]) * jnp.exp(tree["t"])
            sign = jnp.where(b["labels"] >= 5, 1.0, -1.0)
            return {
                "loss": jnp.sum(jax.nn.softplus(-sign * margin) * b["weights"]),
                "weight": jnp.sum(b["weights"]),
            }

        def init(key: Array) -> Any:
            return {"w": 0.1 * jax.random.normal(key, (64,)), "b": jnp.zeros(()), "t": jnp.zeros((1,))}

        return Foreign(init=init, loss=loss, inputs=MLP(MLPConfig(features=64, classes=10)).inputs)


@pytest.mark.parametrize("seed", [11, 14, 16])
def test_parameters_that_are_one_number_have_room_for_their_rounding(seed: int, opened: Opened) -> None:
    e = replace(small(rules=data()), model=Scalars(), seed=seed, batch=8)
    made = judged(e, opened, MeshShape(data=8), Auto(), steps=5)
    assert not made.departed, only(made)


class Halved(MLP):
    """Casts to bfloat16 by itself, whatever its parameters are."""

    def logits(self, features: Array) -> Array:
        return super().logits(features).astype(jnp.bfloat16).astype(features.dtype)


def test_a_model_that_casts_by_itself_has_the_budget_of_what_it_casts_to(opened: Opened) -> None:
    e = replace(small(), model=Own(Halved))
    for x64 in (False, True):
        made = judged(e, opened, BOTH, x64=x64)
        assert made.within == dict.fromkeys(("loss", "gradient", "parameter", "optimizer"), "bfloat16")
        assert not made.departed, only(made)
        assert only(made).worst["gradient"].allowed >= 16 * 2**-8
    assert judged(small(), opened, BOTH).within == {}


def test_without_a_mesh_to_verify_it_says_so(opened: Opened) -> None:
    e = small(rules=data() | tensor())
    from experiments.verification import cases, verify

    with pytest.raises(InputError, match="no mesh to verify: on 1 device"):
        verify(e, opened(e), jax.devices()[:1], cases(e, 1), 2)
