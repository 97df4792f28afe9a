"""What the reader of a split would never see: plain jax over split dims, optimizers of other shapes, rules gone wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import quickstart
from experiments.config import Devices, Experiment
from experiments.explanation import explain
from models.mlp_config import MLPConfig
from models.transformer_config import TransformerConfig
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.layout import Layouts
from sharding.mesh import device_mesh
from sharding.partitioner import Auto, Manual
from sharding.rule import Rule, Rules, Split, first_dim, rule
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.replicated import replicated
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from sharding.step import Split as StepSplit
from sharding.step import TrainStep
from tests.checked import PlainConfig

SMALL = TransformerConfig(vocab=32, layers=2, embed=16, heads=4, kv_heads=2, head_dim=4, mlp=32, length=16)


def experiment(rules: Rules, model: Any = SMALL, **mesh: int) -> Experiment:
    """The quickstart with a small model, these rules and this mesh."""
    shape = MeshShape(**mesh)
    count = shape.devices
    return replace(
        quickstart.config(), model=model, rules=rules, mesh=shape, batch=8, devices=Devices("pretend", count)
    )


HOW: dict[str, Any] = {
    "softmax": lambda h: jax.nn.softmax(h, axis=-1),
    "batch mean": lambda h: h - jnp.mean(h, axis=0, keepdims=True),
    "relu": jax.nn.relu,
}


@pytest.mark.parametrize(("how", "over"), [("softmax", "8 elements"), ("batch mean", "4 elements")])
def test_plain_jax_over_a_split_dim_is_refused(how: str, over: str) -> None:
    with pytest.raises(InputError, match=r"test_plain\.py:\d+: plain jax") as caught:
        explain(experiment(data() | tensor(), PlainConfig(HOW[how]), data=2, tensor=2), 4)
    assert over.split()[0] in str(caught.value)


def test_plain_jax_where_nothing_is_split_is_left_alone() -> None:
    explain(experiment(data() | tensor(), PlainConfig(HOW["relu"]), data=2, tensor=2), 4)
    explain(
        experiment(data(), PlainConfig(HOW["softmax"]), data=4), 4
    )  # the batch is split, the reduced dim is not
    explain(
        replace(
            experiment(data() | tensor(), PlainConfig(HOW["softmax"]), data=2, tensor=2), partitioner=Auto()
        ),
        4,
    )


@pytest.mark.parametrize("name", ["adafactor", "muon", "adamw", "sgd"])
def test_any_optax_transformation_makes_the_update_of_one_device(name: str) -> None:
    made: dict[str, Any] = {
        "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
        "muon": lambda: optax.contrib.muon(1e-2),
        "adamw": lambda: optax.adamw(1e-2),
        "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
    }
    config = MLPConfig(features=8, embed=8, mlp=16, layers=2, classes=4)
    rng = np.random.default_rng(0)
    rows = {
        "features": rng.standard_normal((8, 8)).astype(np.float32),
        "labels": rng.integers(0, 4, 8).astype(np.int32),
        "weights": np.ones(8, np.float32),
    }
    after = []
    for rules, shape in (
        (Rules(), MeshShape()),
        (data() | fsdp() | tensor(), MeshShape(data=2, fsdp=2, tensor=2)),
    ):
        count = 8 if rules.chain else 1
        layouts = Layouts(rules, shape.resolve(count).sizes())
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax's own habits
            split = StepSplit(layouts, device_mesh(shape, jax.devices()[:count]), Manual())
            step = TrainStep(config.build(), made[name](), split)
            state = step.init(0)
            for _ in range(2):
                state, _ = step.step(
                    state, {k: jax.device_put(v, step.batch_shardings()[k]) for k, v in rows.items()}
                )
        after.append(jax.tree.map(np.asarray, state["params"]))
    for path in after[0]:
        np.testing.assert_allclose(after[0][path], after[1][path], atol=2e-5, err_msg=path)


def test_rules_gone_wrong_are_told_in_one_paragraph() -> None:
    def made(**roles: Any) -> Rules:
        @rule
        def odd() -> Rule:
            return Rule(**roles)

        return odd()

    with pytest.raises(InputError, match="'error', 'also', 'decline' or 'also or decline'"):
        Split("data", "eror")
    with pytest.raises(InputError, match="'regather' or 'keep'"):
        Manual(gathered="kept")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="with also"):
        made(activation={"batch": ("data", "fsdp")})
    with pytest.raises(InputError, match=r"an axis a text"):
        tensor(axis=3)  # pyright: ignore[reportArgumentType]
    for rules, said in (
        (made(compute=lambda ask: None), "must return a mapping"),
        (made(activation=first_dim("data")), "laid out by their names"),
        (data() | fsdp() | tensor(axis="tensors"), "does not exist"),
        (data() | tensor() | replicated("mlp"), "declares that mlp stays whole"),
    ):
        with pytest.raises(InputError, match=said):
            explain(experiment(rules, data=2, tensor=2), 4)


def test_an_activation_that_does_not_divide_is_named() -> None:
    shape: dict[str, int] = {"data": 2, "tensor": 2}
    with pytest.raises(InputError, match=r"length = 15 .* into 2 parts"):
        explain(experiment(data() | tensor() | sequence(), replace(SMALL, length=15), **shape), 4)
