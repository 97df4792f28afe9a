"""Faults of the update: clipping, casts of the optimizer and of a written-out backward pass, late updates, their cost."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import sharding.step
from experiments.assemble import train_step
from experiments.optimizers import AdamW
from experiments.verified_rows import batches
from models.mlp import MLP
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.proof.trial import Going
from sharding.proof.witness import witness
from sharding.region import current
from tests.verified import BOTH, DATA, Opened, Own, judged, only, small


@jax.custom_vjp
def _coarse(x: Array) -> Array:
    return x


_coarse.defvjp(lambda x: (x, None), lambda _, out: (out.astype(jnp.bfloat16).astype(out.dtype),))


class CoarseBackward(MLP):
    """Exact going forward; its written-out backward pass casts to bfloat16."""

    def logits(self, features: Array) -> Array:
        return _coarse(super().logits(features))


@pytest.mark.parametrize("x64", [False, True])
def test_a_cast_of_the_backward_pass_alone_is_seen(x64: bool, opened: Opened) -> None:
    made = judged(replace(small(), model=Own(CoarseBackward)), opened, BOTH, x64=x64)
    assert set(made.within.values()) == {"bfloat16"}
    assert "gradient" in made.within
    assert not made.departed, only(made)
    assert only(made).worst["gradient"].allowed >= 16 * 2**-8


@pytest.mark.parametrize("x64", [False, True])
def test_a_cast_of_the_optimizer_gives_room_to_what_comes_after_it_alone(
    x64: bool, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    e = replace(small(), optimizer=AdamW(mean_dtype="bfloat16", warmup=1))
    made = judged(e, opened, BOTH, x64=x64, steps=3)
    assert made.within == dict.fromkeys(("loss", "parameter", "optimizer"), "bfloat16")
    assert not made.departed, only(made)
    assert only(made).worst["optimizer"].allowed >= 16 * 2**-8
    assert only(made).worst["gradient"].allowed < 1e-4

    real = sharding.step.TrainStep._reduce
    monkeypatch.setattr(sharding.step.TrainStep, "_reduce", lambda *given: real(*given) * 1.001)
    assert only(judged(e, opened, BOTH, x64=x64)).worst["gradient"].share > 1  # a hundredth of that room


# The gradient's norm is common to all leaves: told as such, and not as a factor of the first.


def test_a_scale_common_to_all_gradients_is_named(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    real = sharding.step.TrainStep._finished

    def planted(self: Any, sums: Any, norm: Array) -> Any:
        scale, metrics = real(self, sums, norm)
        return (scale if self.split.mesh is None else scale * 1.37), metrics

    monkeypatch.setattr(sharding.step.TrainStep, "_finished", planted)
    d = only(judged(small(), opened, BOTH)).departure
    assert d is not None
    assert d.phase == "gradient"
    assert d.looks.startswith("1.37 times the right values, as every gradient is"), d
    assert "the norm by which they are clipped" in d.looks


def test_one_gradient_off_by_a_factor_is_no_scale_common_to_all(
    monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    real = sharding.step.TrainStep._reduce

    def planted(self: Any, path: str, g: Array) -> Array:
        return real(self, path, g) * (1.37 if path == "leave" else 1.0)

    monkeypatch.setattr(sharding.step.TrainStep, "_reduce", planted)
    d = only(judged(small(), opened, BOTH)).departure
    assert d is not None
    assert d.what == "the gradient of leave"
    assert d.looks.startswith("1.37 times the right values, which is no product"), d


def test_a_wrong_norm_by_which_gradients_are_clipped_is_named(
    monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    real = sharding.step.TrainStep._finished

    def planted(self: Any, sums: Any, norm: Array) -> Any:
        return real(self, sums, norm if self.split.mesh is None else norm * 1.37)

    monkeypatch.setattr(sharding.step.TrainStep, "_finished", planted)
    d = only(judged(replace(small(), optimizer=AdamW(clip=0.1)), opened, BOTH)).departure
    assert d is not None
    assert (d.phase, d.what) == ("metric", "the metric grad_norm of the first update")
    assert d.looks.startswith("1.37 times the right values"), d
    assert "they are clipped by it" in d.looks


# What finding a late fault costs.


def test_a_late_fault_is_found_in_one_pass_and_nothing_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    traced: Counter[str] = Counter()
    updates: Counter[str] = Counter()
    real, going = sharding.step.TrainStep.updated, Going.update

    def planted(self: Any, state: Any, batch: Any) -> Any:
        side = "one device" if self.split.mesh is None else "split"
        traced[side] += 1
        new, metrics, grads = real(self, state, batch)
        if side == "split":
            late = {p: jnp.where(state["step"] >= 5, w * 1.01, w) for p, w in new["params"].items()}
            new = {**new, "params": late}
        return new, metrics, grads

    def counted(self: Going, batch: Any) -> None:
        updates["one device" if self.ready.step.split.mesh is None else "split"] += 1
        going(self, batch)

    monkeypatch.setattr(sharding.step.TrainStep, "updated", planted)
    monkeypatch.setattr(Going, "update", counted)
    d = only(judged(small(), opened, DATA, steps=6)).departure
    assert d is not None
    assert "after update 6" in d.what, d
    # the verification's 6 each, and 6 each again; one device's first 6 tell at which norm gradients are to be clipped
    assert updates == {"split": 12, "one device": 30}
    assert traced == {"split": 1, "one device": 2}  # float32 and double


# A fault of the scan over layers alone: nothing is wrong when the same layers are unrolled.


@pytest.mark.parametrize("by", [Manual(), Auto()], ids=["manual", "auto"])
@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_a_fault_of_the_scan_alone_is_found_in_its_layer(
    loop: str, by: Partitioner, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    real = jax.lax.scan

    def stale(body: Any, first: Any, given: Any = None, **more: Any) -> Any:
        """Layer 1 runs with the parameters of layer 0."""
        region = current()
        if region is not None and region.mesh is not None:
            given = jax.tree.map(lambda w: jnp.concatenate([w[:1], w[:1], w[2:]]), given)
        return real(body, first, given, **more)

    monkeypatch.setattr(jax.lax, "scan", stale)
    e = small("transformer")
    model: Any = e.model
    outcome = only(judged(replace(e, model=replace(model, layers=3, loop=loop)), opened, BOTH, by))
    if loop == "unroll":
        assert not outcome.departs, outcome
        return
    d = outcome.departure
    assert d is not None
    assert d.phase == "forward"
    assert re.match(r"layer 1, \w+ \(.*models/transformer.py:\d+\)", d.what), d


def test_a_scan_is_heard_as_its_unrolled_layers_are(opened: Opened) -> None:
    e = small("transformer")
    model: Any = e.model
    seen = {}
    for loop in ("scan", "unroll"):
        step = train_step(replace(e, mesh=BOTH, model=replace(model, layers=3, loop=loop)), jax.devices()[:4])
        (batch,) = batches(e, opened(e), 16, 1, {})
        params = jax.device_get(step.init(0)["params"])
        seen[loop] = witness(step, params, batch)
    assert [s.title for s in seen["scan"]] == [s.title for s in seen["unroll"]]
    assert {s.tap.scope for s in seen["scan"]} == {"", "layer 0", "layer 1", "layer 2"}
    for a, b in zip(seen["scan"], seen["unroll"], strict=True):
        np.testing.assert_allclose(a.value, b.value, rtol=1e-4, atol=1e-5)
        assert (a.gradient is None) == (b.gradient is None)
        if a.gradient is not None and b.gradient is not None:
            np.testing.assert_allclose(a.gradient, b.gradient, rtol=1e-4, atol=1e-5)
            assert a.gradient.any() or not b.gradient.any()
