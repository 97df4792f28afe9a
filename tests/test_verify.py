"""`shardlab verify`: what is right passes, every planted fault is caught, found and named."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax
from jax.sharding import PartitionSpec as P

import sharding.attention
import sharding.relayout
import sharding.step
from experiments.verification import cases
from models.mlp import MLP
from models.mlp_config import MLPConfig
from sharding.axes import MeshShape
from sharding.foreign import Foreign
from sharding.ops import einsum, rms_norm
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.region import current
from sharding.rule import Rules
from sharding.rules.data import data
from sharding.rules.tensor import tensor
from sharding.rules.zero1 import zero1
from tests.faults import other_block, reduced_twice
from tests.support import custom
from tests.verified import BOTH, DATA, Opened, Own, judged, only, small

# What is right passes.


@pytest.mark.parametrize("by", [Manual(), Auto()], ids=["manual", "auto"])
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_a_right_split_agrees(kind: str, by: Partitioner, opened: Opened) -> None:
    outcome = only(judged(small(kind), opened, BOTH, by))
    assert not outcome.departs, outcome
    assert set(outcome.worst) == {"loss", "gradient", "parameter", "optimizer"}
    assert (
        0 < max(c.error for c in outcome.worst.values()) < 1e-5
    )  # two runs that were one would agree to the bit


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_in_double_the_budget_is_near_the_rounding_of_double(kind: str, opened: Opened) -> None:
    made = judged(small(kind), opened, BOTH, x64=True)
    assert not made.departed, only(made)
    assert made.precision == "float64"
    assert max(c.allowed for c in only(made).worst.values()) < 1e-11
    assert 0 < only(made).worst["gradient"].error < 1e-13


def test_bfloat16_has_the_budget_of_its_own_rounding(opened: Opened) -> None:
    e = small("transformer")
    model: Any = e.model
    made = judged(replace(e, model=replace(model, dtype="bfloat16")), opened, BOTH)
    assert not made.departed, only(made)
    assert only(made).worst["gradient"].allowed > 1e-3


def test_every_legal_mesh_is_found_and_the_others_say_why() -> None:
    e = small("transformer")
    found = {c.mesh.describe() for c in cases(e, 4)}
    assert found == {"data=4", "data=2 tensor=2", "tensor=4", "data=3", "tensor=3", "data=2", "tensor=2"}
    titles = [c.title for c in cases(replace(e, mesh=MeshShape(tensor=2)), 4)]
    assert titles[:2] == ["tensor=2, manual", "tensor=2, auto"]  # its own mesh first


# Planted faults: each is caught, and its kind and place are named.


class Dropped(MLP):
    """The last device along data loses its rows."""

    def logits(self, features: Array) -> Array:
        region = current()
        if region is not None and region.mesh is not None:
            features = jnp.where(lax.axis_index("data") == 1, jnp.zeros_like(features), features)
        return super().logits(features)


class MeanOfMeans(MLP):
    """Each device divides by its own weight, and the means are averaged."""

    def loss(self, batch: dict[str, Array]) -> dict[str, Array]:
        weights = batch["weights"]
        region = current()
        if region is not None and region.mesh is not None:
            here = jnp.sum(weights) * region.layouts.sizes["data"]
            weights = weights * (lax.psum(jnp.sum(weights), "data") / here)
        return {**super().loss({**batch, "weights": weights}), "weight": einsum("batch ->", batch["weights"])}


class Noisy(MLP):
    """Dropout whose mask is drawn for the rows that a device holds."""

    def logits(self, features: Array) -> Array:
        keep = jax.random.bits(jax.random.key(0), features.shape, jnp.uint32) < jnp.uint32(3 * 2**30)
        return super().logits(jnp.where(keep, features, jnp.zeros_like(features)))


class Summed(MLP):
    """A layer of its own after the last norm, in its own shard_map, whose sum runs over another axis than it should."""

    def logits(self, features: Array) -> Array:
        def product(x: Array, w: Array) -> Array:
            return x @ w

        region = current()
        if region is not None and region.mesh is not None:
            product = jax.shard_map(
                lambda x, w: lax.psum(x @ w, "data"),  # the embed that it sums lies over tensor
                mesh=region.mesh,
                in_specs=(P("data", "tensor"), P("tensor", None)),
                out_specs=P("data", None),
                check_vma=False,
            )
        h = einsum("batch features, features embed -> batch embed", features, self.enter)
        x = rms_norm(h, self.norm, "batch embed")
        return einsum("batch classes -> batch classes", product(x, self.leave.get_value()))


@dataclass(frozen=True)
class Hand:
    """Data parallelism by hand in a model of somebody else: each device's gradient, called the gradient of all."""

    def build(self) -> Foreign:
        """The model."""

        def nats(w: Array, x: Array, y: Array, weights: Array) -> Array:
            return -jnp.sum(jax.nn.log_softmax(x @ w) * jax.nn.one_hot(y, 10) * weights[:, None])

        def total(w: Array, x: Array, y: Array, weights: Array) -> Array:
            region = current()
            if region is None or region.mesh is None:
                return nats(w, x, y, weights)
            specs = (P(), P("data"), P("data"), P("data"))
            split = partial(jax.shard_map, mesh=region.mesh, in_specs=specs, out_specs=P(), check_vma=False)
            summed = split(lambda *given: lax.psum(nats(*given), "data"))
            gradient = split(jax.grad(nats))  # no psum
            own = jax.custom_vjp(lambda w: summed(w, x, y, weights))
            own.defvjp(
                lambda w: (summed(w, x, y, weights), w), lambda w, out: (out * gradient(w, x, y, weights),)
            )
            return own(w)

        return Foreign(
            init=lambda key: {"w": 0.1 * jax.random.normal(key, (64, 10))},
            loss=lambda tree, b: {
                "loss": total(tree["w"], b["features"], b["labels"], b["weights"]),
                "weight": jnp.sum(b["weights"]),
            },
            inputs=MLP(MLPConfig(features=64, classes=10)).inputs,
        )


def test_a_gradient_that_is_not_reduced_is_seen_by_what_each_device_holds(opened: Opened) -> None:
    outcome = only(judged(replace(small(rules=data()), model=Hand()), opened, DATA, Auto()))
    assert outcome.departs
    assert outcome.uneven
    assert outcome.departure is not None
    assert outcome.departure.what == "the gradient of w"
    assert "a missing reduction over data: each device holds its own part" in outcome.departure.looks


def _same_heads(q: Array, kv: Array, axes: tuple[str, ...]) -> Array:
    group = q.shape[2] * lax.axis_size(axes) // kv.shape[2]
    return jnp.take(kv, jnp.arange(q.shape[2], dtype=jnp.int32) // group, axis=2)


@dataclass(frozen=True)
class Fault:
    """How a fault is planted and what verify must say of it."""

    phase: str
    what: str
    looks: str
    model: type[MLP] | None = None
    patch: tuple[Any, str, Any] | None = None
    kind: str = "mlp"
    rules: Rules = data() | tensor()
    mesh: MeshShape = DATA
    by: Partitioner = Manual()


HEADS = custom(compute={"heads": "tensor"}, activation={"heads": "tensor"}) | data()
FAULTS = {
    "gradients reduced twice": Fault(
        "gradient",
        "the gradient of ",
        "2 times too large, the size of data: reduced once too often",
        patch=(sharding.step.TrainStep, "_reduce", reduced_twice),
    ),
    "blocks of the gradient exchanged": Fault(
        "gradient",
        "the gradient of ",
        "a permutation along .* in |a permutation along",
        patch=(sharding.relayout, "_slice", other_block),
        rules=zero1(),
    ),
    "a mis-sliced head": Fault(
        "forward",
        r"layer 0, attention \(.*transformer.py",
        r"wrong only in heads 4 to 7 of 8; these are shards \[1\] of the 2 over tensor",
        patch=(sharding.attention, "_heads_of", _same_heads),
        kind="transformer",
        rules=HEADS,
        mesh=MeshShape(tensor=2),
    ),
    "a dropped block of rows": Fault(
        "forward",
        r"einsum \(.*mlp.py",
        r"a dropped block: batch \d+ to 15 of 16 holds zeros; these are shards \[1\]",
        model=Dropped,
    ),
    "a mean over shards of unequal weight": Fault(
        "forward",
        "einsum",
        "off by a factor of its own .*: a mean over shards that do not weigh the same",
        model=MeanOfMeans,
    ),
    "a mask drawn by each device": Fault(
        "forward", r"einsum \(.*mlp.py", "structure|wrong only in batch", model=Noisy
    ),
    "a sum over another axis": Fault(
        "forward",
        r"einsum \(.*test_verify.py",
        "devices along tensor hold different values|reduction over another axis",
        model=Summed,
        mesh=BOTH,
        by=Auto(),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_found_and_named(
    name: str, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    fault = FAULTS[name]
    e = small(fault.kind, fault.rules)
    e = e if fault.model is None else replace(e, model=Own(fault.model))
    if fault.patch:
        monkeypatch.setattr(*fault.patch)
    outcome = only(judged(e, opened, fault.mesh, fault.by))
    assert outcome.departs
    assert outcome.departure is not None, outcome
    d = outcome.departure
    print(d)
    assert d.phase == fault.phase
    assert re.search(fault.what, d.what), d.what
    assert re.search(fault.looks, d.looks), d.looks
