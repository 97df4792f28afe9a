"""How much room a budget leaves: never enough for a zero, a factor of two or a parameter that is not updated; and what is
told where looking for a fault, or judging it, is not possible.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array, lax

import experiments.verification
import sharding.step
from experiments.optimizers import AdamW
from experiments.progress import Progress
from experiments.verified import Case, Outcome, Verified
from experiments.verified_tables import print_case, print_verified
from models.mlp import MLP
from sharding.errors import InputError
from sharding.finding import Limits
from sharding.layout import Layout
from sharding.ops import einsum, rms_norm
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.proof.budget import HALF, Budget, Compared
from sharding.proof.diagnose import Error, diagnose
from sharding.proof.trial import copies
from sharding.region import current
from tests.verified import BOTH, DATA, Opened, Own, judged, only, small

EITHER = pytest.mark.parametrize("by", [Manual(), Auto()], ids=["manual", "auto"])


# A gradient may be off by half at most.


def _compared(noise: float, times: float) -> Compared:
    """A gradient of which one device's rounding is `noise`, off by a factor."""
    exact = np.linspace(-1, 1, 64)
    single = exact + noise * np.cos(np.arange(64.0)) * (np.abs(exact) < 0.9)
    return Budget(256).compare("gradient", {"w": single * times}, {"w": single}, {"w": exact})[0]


@pytest.mark.parametrize("noise", [1e-7, 1e-2, 0.07, 0.12])
def test_zeros_and_a_factor_of_two_depart_however_coarse_the_rounding(noise: float) -> None:
    assert not _compared(noise, 1.0).departs
    for times in (0.0, 2.0, -1.0):
        wrong = _compared(noise, times)
        assert wrong.departs, wrong
        assert wrong.allowed <= HALF


def test_an_error_between_that_rounding_may_have_made_is_neither_right_nor_wrong() -> None:
    between = _compared(0.07, 1.6)
    assert between.coarse
    assert not between.departs
    assert between.share > 1
    fine = _compared(1e-3, 1.6)
    assert fine.departs
    assert not fine.coarse


def test_what_is_too_coarse_to_judge_is_told_and_is_not_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    coarse = Compared("gradient", "w", 0.6, HALF, 1.0, coarse=True)
    outcome = Outcome(Case(DATA, Manual()), {"gradient": coarse}, "", ())
    made = Verified((outcome,), 2, 8, 64, 3, "bfloat16", {})
    assert (outcome.verdict, made.departed, made.coarse) == ("too coarse", (), (outcome,))
    with Progress(1) as show:
        print_case(show, outcome, 1, 1)
    print_verified(made, 1.0)
    said = capsys.readouterr().out
    assert "too coarse to judge" in said
    assert "agree with one device" not in said
    assert made.to_json()["cases"][0]["verdict"] == "too coarse"
    wrong = replace(outcome, worst={**outcome.worst, "loss": Compared("loss", "loss", 1.0, 0.1, 1.0)})
    assert wrong.verdict == "departs"


def test_a_plain_factor_is_named_where_the_budget_is_wide() -> None:
    want = np.random.default_rng(0).normal(size=(8, 8))
    noisy = want * (2 + 0.005 * np.random.default_rng(1).normal(size=(8, 8)))
    for allowed in (1e-6, 0.13, 0.5):
        error = Error(noisy, want, Layout(("a", "b"), ((), ())), {"tensor": 2}, allowed)
        assert "times too large, the size of tensor" in diagnose(error), diagnose(error)


def test_a_gradient_lost_in_bfloat16_departs(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    e = small("transformer")
    model: Any = e.model
    e = replace(e, model=replace(model, dtype="bfloat16", layers=1))
    real = sharding.step.TrainStep._reduce
    zero = lambda self, path, g: real(self, path, g) * (0 if path == "layers.attention.k" else 1)
    monkeypatch.setattr(sharding.step.TrainStep, "_reduce", zero)
    made = judged(e, opened, DATA)
    assert made.precision == "bfloat16"
    outcome = only(made)
    assert outcome.departure is not None
    assert outcome.departure.what == "the gradient of layers.attention.k"
    assert outcome.departure.looks == "all zeros"


# Room for an optimizer's casts.


@pytest.mark.parametrize("kind", ["optimizer casts", "model casts"])
def test_a_parameter_that_is_never_updated_departs_where_something_casts(
    kind: str, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    e = replace(small(), optimizer=AdamW(mean_dtype="bfloat16", peak=1e-4, warmup=20))
    if kind == "model casts":
        e = replace(small(), model=Own(_Halved), optimizer=AdamW(peak=1e-4, warmup=20))
    made = judged(e, opened, BOTH, steps=3)
    assert made.within["parameter"] == "bfloat16"
    assert not made.departed, only(made)
    real = sharding.step.TrainStep.updated

    def planted(self: Any, state: Any, batch: Any) -> Any:
        new, *rest = real(self, state, batch)
        if self.split.mesh is not None:
            path = sorted(new["params"])[0]
            new = {**new, "params": {**new["params"], path: state["params"][path]}}
        return new, *rest

    monkeypatch.setattr(sharding.step.TrainStep, "updated", planted)
    outcome = only(judged(e, opened, BOTH, steps=3))
    assert outcome.worst["parameter"].share > 1, outcome
    assert outcome.departure is not None
    assert outcome.departure.phase == "update"


def test_a_parameter_that_is_never_updated_departs_however_coarse_the_rounding() -> None:
    """The updates of AdamW in a narrow type: of a few entries in a hundred rounding alone makes the sign."""
    draw = np.random.default_rng(0)
    before, signs = draw.normal(size=4096), draw.choice([-1.0, 1.0], 4096)

    def updated(wrong: float) -> dict[str, np.ndarray]:
        return {"w": before + 1e-3 * np.where(draw.random(4096) < wrong, -signs, signs)}

    exact, single, split = updated(0.0), updated(0.03), updated(0.03)
    budget, moved = Budget(terms=64), {"w": 1e-3}
    (right,) = budget.compare("parameter", split, single, exact, moved)
    (never,) = budget.compare("parameter", {"w": before}, single, exact, moved)
    (other,) = budget.compare("parameter", {"w": before - 1e-3 * signs}, single, exact, moved)
    assert [right.departs, never.departs, other.departs] == [False, True, True]
    noise = updated(0.5)  # nothing but rounding: another sign in every other entry
    (arbitrary,) = budget.compare("parameter", updated(0.5), noise, exact, moved)
    assert not arbitrary.departs


def test_the_first_updates_metrics_have_no_room_for_what_the_optimizer_casts(
    monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    e = replace(small(), optimizer=AdamW(mean_dtype="bfloat16"))
    real = sharding.step.TrainStep._finished

    def planted(self: Any, sums: Any, norm: Array) -> Any:
        scale, metrics = real(self, sums, norm)
        if self.split.mesh is not None:
            metrics = {**metrics, "loss": metrics["loss"] * 1.01}  # a sixth of what bfloat16 would be given
        return scale, metrics

    monkeypatch.setattr(sharding.step.TrainStep, "_finished", planted)
    outcome = only(judged(e, opened, DATA))
    assert outcome.departure is not None, outcome
    assert outcome.departure.what == "the metric loss of the first update"


class _Halved(MLP):
    """Casts to bfloat16 by itself."""

    def logits(self, features: Array) -> Array:
        return super().logits(features).astype(jnp.bfloat16).astype(features.dtype)


# Named ops in a trace of the model's own are not heard, and those after it are.


class _Inner(MLP):
    """One product in the model's own checkpoint, one norm in its own scan, then a fault: some devices scale what they have."""

    def logits(self, features: Array) -> Array:
        x = jax.checkpoint(lambda x: einsum("batch features, features embed -> batch embed", x, self.enter))(
            features
        )
        norm = lambda x, _: (rms_norm(x, self.norm, "batch embed"), None)
        x = lax.scan(norm, x, None, length=2)[0]
        region = current()
        if region is not None and region.mesh is not None:
            x = x * 1.25
        return einsum("batch embed, embed classes -> batch classes", x, self.leave)


@EITHER
def test_a_named_op_in_a_models_own_checkpoint_and_scan_does_not_end_the_search(
    by: Partitioner, opened: Opened
) -> None:
    d = only(judged(replace(small(), model=Own(_Inner)), opened, DATA, by)).departure
    assert d is not None
    assert d.phase == "forward", d
    assert d.what.startswith("einsum"), d
    assert d.looks.startswith("1.25 times"), d


def test_layers_scanned_within_a_models_own_checkpoint_are_passed_over(opened: Opened) -> None:
    class Layered(MLP):
        def logits(self, features: Array) -> Array:
            made = jax.checkpoint(super().logits)(features)
            region = current()
            return made if region is None or region.mesh is None else made * 1.25

    d = only(judged(replace(small(), model=Own(Layered)), opened, DATA)).departure
    assert d is not None
    assert d.phase in ("forward", "backward"), d


def test_a_search_that_fails_still_gives_the_table(
    monkeypatch: pytest.MonkeyPatch, opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("no ear")

    monkeypatch.setattr(experiments.verification, "witness", fails)
    real = sharding.step.TrainStep._reduce
    monkeypatch.setattr(sharding.step.TrainStep, "_reduce", lambda *given: real(*given) * 2)
    made = judged(small(), opened, DATA)
    d = only(made).departure
    assert d is not None
    assert d.what == "could not be placed: ValueError: no ear"
    print_verified(made, 1.0)
    said = capsys.readouterr().out
    assert "1 of 1 depart from one device" in said
    assert "could not be placed: ValueError: no ear" in said
    told = made.to_json()["cases"][0]
    assert (told["verdict"], told["departure"]["phase"]) == ("departs", "unplaced")


# Random keys in an optimizer's state.


@dataclass(frozen=True)
class Keyed(AdamW):
    """AdamW that draws a sign for every update from a key of its own; `split_key` is the fault."""

    def build(self, steps: int, matrices: Any = None) -> optax.GradientTransformation:
        """AdamW's update, its sign drawn."""

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            key, draw = jax.random.split(state["key"])
            sign = 1 - 2 * (jax.random.bits(draw, (), jnp.uint32) >> 31).astype(jnp.int32)
            return jax.tree.map(lambda u: u * sign.astype(u.dtype), updates), {"key": key}

        drawn = optax.GradientTransformation(lambda params: {"key": jax.random.key(3)}, update)
        return optax.chain(super().build(steps, matrices), drawn)


@EITHER
def test_a_random_key_in_the_optimizers_state_is_compared(
    by: Partitioner, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    e = replace(small(), optimizer=Keyed(warmup=1))
    made = judged(e, opened, BOTH, by)
    assert not made.departed, only(made)
    real = sharding.step.TrainStep.updated

    def planted(self: Any, state: Any, batch: Any) -> Any:
        new, *rest = real(self, state, batch)
        if self.split.mesh is None:
            return new, *rest
        other = jax.tree.map(
            lambda x: jax.random.fold_in(x, 1) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
            new["optimizer"],
        )
        return {**new, "optimizer": other}, *rest

    monkeypatch.setattr(sharding.step.TrainStep, "updated", planted)
    outcome = only(judged(e, opened, BOTH, by))
    assert outcome.departs
    assert "key" in outcome.worst["optimizer"].path, outcome


def test_keys_that_differ_between_devices_are_seen() -> None:
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    own = jax.shard_map(
        lambda: jax.random.fold_in(jax.random.key(0), lax.axis_index("data")),
        mesh=mesh,
        in_specs=(),
        out_specs=jax.sharding.PartitionSpec(),
        check_vma=False,
    )
    told = copies(jax.jit(own)())
    assert told is not None
    assert told.axes == ("data",)
    assert told.values.shape == (2, 2)
    assert copies(jax.random.key(0)) is None


# Bad input.


@pytest.mark.parametrize("field", ["bytes", "traffic", "work"])
def test_a_limit_below_zero_is_refused(field: str) -> None:
    with pytest.raises(InputError, match=f"{field} is -1"):
        Limits(**{field: -1})
