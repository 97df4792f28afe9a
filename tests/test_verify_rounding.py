"""Gradients that are nothing but rounding raise no alarm, and nothing else hides behind them, behind rows without weight or
behind a metric's cast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

import sharding.step
from experiments.config import Experiment
from experiments.verified_tables import print_verified
from models.mlp import MLP
from sharding.axes import MeshShape
from sharding.foreign import Foreign
from sharding.ops import einsum
from sharding.params import Entry
from sharding.partitioner import Auto, Manual
from sharding.proof.budget import Budget
from sharding.rules.data import data
from tests.verified import DATA, Opened, Own, judged, only, small

EIGHT = MeshShape(data=8)


@dataclass(frozen=True)
class Pooling:
    """Attention pooling in plain jax: no softmax sees the bias of its scores, which are taken in `scores`' type, if any."""

    scores: str = ""

    def build(self) -> Foreign:
        """The model."""

        def init(key: Array) -> dict[str, Any]:
            enter, score, out = (jax.random.normal(k, (16, 16)) * 0.25 for k in jax.random.split(key, 3))
            scored = {"kernel": score[:, :1], "bias": jnp.zeros(1)}
            return {"enter": enter[:8], "score": scored, "out": out[:, :10]}

        def loss(p: Any, batch: Any) -> dict[str, Array]:
            x = jnp.tanh(batch["features"].reshape(-1, 8, 8) @ p["enter"])
            z = (x @ p["score"]["kernel"] + p["score"]["bias"][None, None])[..., 0]
            s = jax.nn.softmax(z.astype(self.scores or z.dtype), -1).astype(z.dtype)
            z = jax.nn.log_softmax(jnp.einsum("bl,bld->bd", s, x) @ p["out"])
            nats = -jnp.take_along_axis(z, batch["labels"][:, None], 1)[:, 0]
            return {"loss": jnp.sum(nats * batch["weights"]), "weight": jnp.sum(batch["weights"])}

        inputs = {
            "features": Entry("batch features", (64,), "float32"),
            "labels": Entry("batch", (), "int32"),
            "weights": Entry("batch", (), "float32"),
        }
        return Foreign(init, loss, inputs)


@pytest.mark.parametrize(
    ("seed", "x64"),
    [(5, False), (4, True), *(pytest.param(s, False, marks=pytest.mark.slow) for s in range(5))],
)
def test_a_bias_that_no_softmax_sees_raises_no_alarm(seed: int, x64: bool, opened: Opened) -> None:
    e: Experiment = replace(small(rules=data()), model=Pooling(), seed=seed)
    made = judged(e, opened, EIGHT, Auto(), x64, steps=5)
    assert made.rounding == ("score.bias",)
    assert only(made).verdict == "agrees", only(made)


@pytest.mark.parametrize(("scores", "x64"), [("float32", True), ("float32", False), ("bfloat16", False)])
def test_nor_where_the_model_casts_by_itself(scores: str, x64: bool, opened: Opened) -> None:
    """To bfloat16 its rounding is no departure, and no agreement either."""
    e: Experiment = replace(small(rules=data()), model=Pooling(scores), seed=4)
    made = judged(e, opened, EIGHT, Auto(), x64, steps=3)
    assert made.within["gradient"] == scores
    assert only(made).verdict in ("agrees", "too coarse")[: 1 + (scores == "bfloat16")], only(made)


def rounded(size: float, much: int = 4096) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Budget]:
    """Gradients of one device and in double: a matrix's, and one that is rounding of some size."""
    matrix = np.linspace(-1, 1, 64)
    exact = {"w": matrix, "b": np.array([1e-17])}
    return {"w": matrix * (1 + 1e-7), "b": np.array([size])}, exact, Budget(much)


def test_such_a_gradient_may_be_as_large_as_a_sums_rounding_and_no_larger() -> None:
    single, exact, budget = rounded(2e-8)
    arbitrary = budget.arbitrary(single, exact)
    assert arbitrary == {"b"}
    for off, departs in ((-3e-8, False), (4e-7, False), (1e-4, True), (1.0, True)):
        found = {"w": single["w"], "b": single["b"] + off}
        by = {c.path: c for c in budget.compare("gradient", found, single, exact, arbitrary=arbitrary)}
        assert by["b"].departs == departs, by["b"]
        assert not by["w"].departs
    gone = {c.path: c for c in budget.compare("gradient", {**single, "w": exact["w"] * 0}, single, exact)}
    assert gone["w"].departs


def test_a_gradient_that_is_zero_is_none_of_them() -> None:
    """Behind a matrix of zeros nothing comes in the first update, and later updates are judged as any."""
    single, exact, budget = rounded(0.0)
    assert not budget.arbitrary(single, {**exact, "b": np.zeros(1)})


def test_its_parameter_may_move_as_far_as_others_do_and_no_farther() -> None:
    before = np.zeros(1)
    exact = {"w": np.full(64, 1.005), "b": before + 1e-12}
    single = {"w": exact["w"] + 1e-8, "b": before + 5e-3}
    moved = {"w": 5e-3, "b": 1e-12}
    for at, departs in ((-5e-3, False), (1.0, True)):
        found = {"w": single["w"], "b": before + at}
        made = Budget(4096).compare("parameter", found, single, exact, moved, arbitrary={"b"})
        assert [c.departs for c in made if c.path == "b"] == [departs], made


@pytest.mark.parametrize("shard", [0, 3])
def test_no_device_is_without_weight_in_the_gradients_that_are_compared(
    shard: int, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    """What one device of eight adds to every gradient is lost, and each holds one row."""
    real = sharding.step.TrainStep._reduce

    def lost(self: Any, path: str, g: Array) -> Array:
        return real(self, path, jnp.where(lax.axis_index("data") == shard, jnp.zeros((), g.dtype), g))

    e = small(rules=data())
    assert only(judged(e, opened, EIGHT)).verdict == "agrees"
    monkeypatch.setattr(sharding.step.TrainStep, "_reduce", lost)
    outcome = only(judged(e, opened, EIGHT))
    assert outcome.verdict == "departs"
    assert outcome.departure is not None
    assert outcome.departure.phase == "gradient"


class _Watched(MLP):
    """A metric is computed in bfloat16, and nothing else."""

    def loss(self, batch: dict[str, Array]) -> dict[str, Array]:
        narrow = lambda x: x.astype(jnp.bfloat16)
        seen = einsum("batch features, batch ->", narrow(batch["features"]), narrow(batch["weights"]))
        return {**super().loss(batch), "seen": lax.stop_gradient(seen.astype(batch["weights"].dtype))}


def test_a_metrics_cast_gives_room_to_metrics_alone(
    monkeypatch: pytest.MonkeyPatch, opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    e = replace(small(rules=data()), model=Own(_Watched))
    made = judged(e, opened, DATA)
    assert made.within == {"loss": "bfloat16"}
    print_verified(made, 1.0)
    assert "A metric computes in bfloat16 by itself" in capsys.readouterr().out
    assert only(made).verdict == "agrees"
    real = sharding.step.TrainStep.updated

    def planted(self: Any, state: Any, batch: Any) -> Any:
        new, *rest = real(self, state, batch)
        if self.split.mesh is not None:
            grown = jax.tree.map(
                lambda x: x * 1.01 if jnp.issubdtype(x.dtype, jnp.floating) else x, new["optimizer"]
            )
            new = {**new, "optimizer": grown}
        return new, *rest

    monkeypatch.setattr(sharding.step.TrainStep, "updated", planted)
    outcome = only(judged(e, opened, DATA, Manual()))
    assert outcome.verdict == "departs"
    assert outcome.departure is not None
    assert "after the first update" in outcome.departure.what


def test_a_model_need_not_read_all_that_its_dataset_has(opened: Opened) -> None:
    whole = Pooling().build()

    def loss(p: Any, batch: Any) -> Any:
        return whole._loss(p, {**batch, "weights": jnp.ones(batch["labels"].shape, batch["features"].dtype)})

    @dataclass(frozen=True)
    class Part:
        def build(self) -> Foreign:
            return Foreign(whole._init, loss, {k: x for k, x in whole.inputs.items() if k != "weights"})

    e = replace(small(rules=data()), model=Part())
    assert only(judged(e, opened, DATA, Auto())).verdict == "agrees"
