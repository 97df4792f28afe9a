"""What verify makes bind although a short run on drawn rows would not: the clip, the ends of documents; and types that are
fixed, and what it says of an error: in which norm, and what it cannot be.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import Array, lax

import sharding.attention
import sharding.ring
import sharding.step
from configs import moe_quick
from experiments.config import Experiment
from experiments.data.stdlib import Stdlib
from experiments.data.text import Text
from experiments.optimizers import AdamW
from experiments.verified_oracle import clips_for
from experiments.verified_rows import batches, documents_of, indices_of
from experiments.verified_tables import print_verified
from models.mlp import MLP
from models.mlp_config import MLPConfig
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.foreign import Foreign
from sharding.layout import Layout
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.proof import double
from sharding.proof.alike import decay
from sharding.proof.diagnose import Error, diagnose
from sharding.region import current
from sharding.rules.context import context
from sharding.rules.data import data
from tests.support import shrunk
from tests.verified import Opened, judged, only, small

# The clip.


def unclipped(scale: Array, weight: Array, norm: Array, most: Any) -> Array:
    return 1 / weight


def at_twice(scale: Array, weight: Array, norm: Array, most: Any) -> Array:
    return jnp.minimum(1.0, most / (norm / 2)) / weight


def always(scale: Array, weight: Array, norm: Array, most: Any) -> Array:
    return most / norm / weight


def plant_clip(monkeypatch: pytest.MonkeyPatch, made: Callable[..., Array]) -> None:
    """Gradients of split steps are scaled by `made(scale, weight, norm, most)`; their norm is reported as it is."""
    real = sharding.step.TrainStep._finished

    def planted(self: Any, sums: Any, norm: Array) -> Any:
        scale, metrics = real(self, sums, norm)
        weight = jnp.maximum(sums["weight"], 1e-6)
        return (scale if self.split.mesh is None else made(scale, weight, norm / weight, self.clip)), metrics

    monkeypatch.setattr(sharding.step.TrainStep, "_finished", planted)


def short() -> Experiment:
    """A transformer of one layer."""
    e = small("transformer")
    model: Any = e.model
    return replace(e, model=replace(model, layers=1))


def mixtures() -> Experiment:
    """The small mixture of experts, smaller."""
    e = moe_quick.config()
    model: Any = shrunk(e.model, experts=4)
    return replace(e, model=replace(model, vocab=256), data=Stdlib(length=model.length), batch=8)


@pytest.mark.parametrize("clip", [1e3, 1e-4], ids=["never binds", "always binds"])
@pytest.mark.parametrize("fault", [unclipped, at_twice, always])
def test_a_split_that_clips_wrongly_departs(
    fault: Callable[..., Array], clip: float, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    plant_clip(monkeypatch, fault)
    made = judged(replace(small(), optimizer=AdamW(clip=clip)), opened)
    d = only(made).departure
    assert made.clipped == (1,)
    assert d is not None, made
    if fault is always:  # what was to be left alone
        assert d.phase == "update"
        assert "after update 2" in d.what, d
    else:
        factor = float(d.looks.partition(" ")[0])
        assert d.phase == "gradient"
        assert factor == 2 if fault is at_twice else factor == 2.5 or (clip < 1 and factor > 100)
        assert (
            " times the right values, as every gradient is, though their norm is reported right" in d.looks
        ), d
        assert "clipp" in d.looks


@pytest.mark.parametrize("kind", ["transformer", pytest.param("mixtures", marks=pytest.mark.slow)])
def test_models_of_tokens_that_do_not_clip_depart(
    kind: str, monkeypatch: pytest.MonkeyPatch, opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    e = mixtures() if kind == "mixtures" else short()
    made = judged(e, opened)
    assert not made.departed, only(made)
    (first, second) = made.clips
    assert second / first == pytest.approx(2.5**2, rel=0.5)
    print_verified(made, 1.0)
    said = capsys.readouterr().out
    assert "clips gradients at 1, " in said
    assert "binds in update 1." in said
    told = json.loads(json.dumps(made.to_json()))
    assert (told["clip"], told["clips"], told["clipped"]) == (1.0, [first, second], [1])
    plant_clip(monkeypatch, unclipped)
    assert only(judged(e, opened)).departs


def test_a_clip_that_binds_and_leaves_is_the_configs_own() -> None:
    assert clips_for(1.0, (3.0, 0.9)) == ()
    assert clips_for(1.0, (3.0, 2.5)) == (1.0, 2.5 * 2.5)
    assert clips_for(1.0, (0.7, 0.8, 0.6)) == (0.7 / 2.5, 0.8 * 2.5, 0.6 / 2.5)
    assert clips_for(1.0, (1.2, 0.9))  # takes too little off to show beside coarse rounding
    assert clips_for(float("inf"), (3.0, 0.9)) == ()
    assert clips_for(1.0, (0.0, 0.0)) == ()
    assert clips_for(1.0, (float("nan"), 1.0)) == ()


def test_a_training_that_lives_by_its_clip_keeps_it(
    monkeypatch: pytest.MonkeyPatch, opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    real = sharding.step.TrainStep.updated

    def brittle(self: Any, state: Any, batch: Any) -> Any:
        """What is not finite once the gradients that are used are larger than a thousandth."""
        new, metrics, grads = real(self, state, batch)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in grads.values()))
        broken = {p: jnp.where(norm > 1e-3, jnp.nan, w).astype(w.dtype) for p, w in new["params"].items()}
        return {**new, "params": broken}, metrics, grads

    monkeypatch.setattr(sharding.step.TrainStep, "updated", brittle)
    made = judged(replace(small(), optimizer=AdamW(clip=1e-4)), opened)
    assert not made.departed, only(made)
    assert (made.clips, made.clipped) == ((), (1, 2))
    print_verified(made, 1.0)
    said = capsys.readouterr().out
    assert "clip of 0.0001 binds in every update here" in said
    assert "leaves smaller gradients alone is not seen" in said


def test_a_config_that_does_not_clip_is_left_so(opened: Opened) -> None:
    made = judged(replace(small(), optimizer=AdamW(clip=float("inf"))), opened)
    assert not made.departed
    assert (made.clips, made.clipped, made.to_json()["clip"]) == ((), (), "Infinity")


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("by", [Manual(), Auto()], ids=["manual", "auto"])
def test_a_right_split_agrees_where_the_clip_is_set_anew(by: Partitioner, x64: bool, opened: Opened) -> None:
    made = judged(small(), opened, MeshShape(data=2, tensor=2), by, x64, steps=4)
    assert not made.departed, only(made)
    assert made.clipped == (1, 3)


# Documents.


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A transformer of packed documents, each longer than a row: every row of the data is one document."""
    folder = tmp_path_factory.mktemp("documents")
    draw = np.random.default_rng(0)
    for at in range(12):
        (folder / f"{at}.txt").write_bytes(bytes(draw.integers(97, 123, 2000).tolist()))
    e = small("transformer", data() | context())
    model: Any = e.model
    model = replace(model, length=32, layers=1, documents="packed")
    text = Text(path=f"{folder}/*.txt", length=32, documents="packed")
    return replace(e, model=model, data=text, batch=8)


def test_rows_are_cut_into_documents_anew(packed: Experiment, opened: Opened) -> None:
    model = packed.model.build()
    assert documents_of(model) == {"segments": "number", "positions": "place"}
    dataset = opened(packed)
    assert dataset.rows("train", 0, 0, 8, 0, 8)["segments"].max() == 1
    made = batches(packed, dataset, 8, 3, indices_of(model), documents_of(model))
    again = batches(packed, dataset, 8, 3, indices_of(model), documents_of(model))
    assert not np.array_equal(made[0]["segments"], made[1]["segments"])
    for batch, same in zip(made, again, strict=True):
        assert all(np.array_equal(batch[k], same[k]) for k in batch)
        segments, places = batch["segments"], batch["positions"]
        assert segments.dtype == places.dtype == np.int32
        assert {1, 2, 3} <= set(segments.max(axis=1).tolist())
        assert segments.max() > 3
        assert (segments == 0).any(axis=1).sum() == 2  # a quarter of the rows ends in padding
        assert ((batch["weights"] > 0) <= (segments > 0)).all()
        for row, at in zip(segments, places, strict=True):
            held = row[row > 0]
            assert (row[: held.size] == held).all()  # padding at the end alone
            assert set(np.diff(held).tolist()) <= {0, 1}
            assert held[0] == 1
            for number in range(1, held[-1] + 1):
                assert at[row == number].tolist() == list(range((row == number).sum()))
            assert not at[row == 0].any()
    assert ((made[0]["weights"] > 0) == (made[0]["segments"] > 0)).all()


def test_rows_of_running_text_are_not_cut(opened: Opened) -> None:
    assert documents_of(small("transformer").model.build()) == documents_of(small().model.build()) == {}


@pytest.mark.parametrize("context_devices", [2, 4])
def test_packed_documents_agree(context_devices: int, packed: Experiment, opened: Opened) -> None:
    made = judged(packed, opened, MeshShape(data=2, context=context_devices))
    assert not made.departed, only(made)


def test_a_ring_that_forgets_the_documents_of_what_arrives_departs(
    packed: Experiment, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    real = sharding.ring._Work.bias

    def planted(self: Any, step: Any, arrived: Any) -> Any:
        return real(self, step, arrived if isinstance(step, int) and step == 0 else None)

    monkeypatch.setattr(sharding.ring._Work, "bias", planted)
    d = only(judged(packed, opened, MeshShape(context=2))).departure
    assert d is not None
    assert d.phase == "forward"
    assert "attention" in d.what, d


def test_an_attention_that_does_not_keep_documents_apart_departs(
    packed: Experiment, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    real = sharding.attention._attend

    def planted(q: Any, k: Any, v: Any, sight: Any, segments: Any) -> Array:
        region = current()
        split = region is not None and region.mesh is not None
        return real(q, k, v, sight, None if split else segments)

    monkeypatch.setattr(sharding.attention, "_attend", planted)
    assert only(judged(packed, opened)).departs


# Types that are fixed.


def recurrent(p: Any, x: Array) -> Array:
    """A recurrence whose state begins as float32, whatever comes in."""

    def body(state: Array, row: Array) -> tuple[Array, Array]:
        state = jnp.tanh(row @ p["in"] + state @ p["on"])
        return state, state

    rows = jnp.moveaxis(x.reshape(-1, 4, 16), 1, 0)
    last, _ = lax.scan(body, jnp.zeros((x.shape[0], 8), jnp.float32), rows)
    return last @ p["out"]


class Cell(nn.Module):
    """A recurrent layer of Linen, whose state begins in the type of its parameters' declaration."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        states: Any = nn.RNN(nn.OptimizedLSTMCell(8))(x.reshape(x.shape[0], 4, 16))
        return nn.Dense(10)(states[:, -1])


@dataclass(frozen=True)
class Recurrent:
    """A foreign recurrent model on the digits."""

    kind: str

    def build(self) -> Foreign:
        """The model."""
        cell = Cell()

        def init(key: Array) -> Any:
            if self.kind == "linen":
                return cell.init(key, jnp.zeros((2, 64), jnp.float32))["params"]
            a, b, c = jax.random.split(key, 3)
            drawn = jax.random.normal
            return {
                "in": drawn(a, (16, 8)) / 4,
                "on": drawn(b, (8, 8)) / 3,
                "out": drawn(c, (8, 10)) / 3,
            }

        def loss(p: Any, b: Any) -> dict[str, Array]:
            x = b["features"]
            made: Any = cell.apply({"params": p}, x) if self.kind == "linen" else recurrent(p, x)
            scores = jax.nn.log_softmax(made)
            nats = -jnp.take_along_axis(scores, b["labels"][:, None], 1)[:, 0]
            return {"loss": jnp.sum(nats * b["weights"]), "weight": jnp.sum(b["weights"])}

        return Foreign(init=init, loss=loss, inputs=MLP(MLPConfig(features=64, classes=10)).inputs)


def foreign(kind: str) -> Experiment:
    return replace(small(rules=data()), model=Recurrent(kind), batch=8, optimizer=AdamW(warmup=1))


@pytest.mark.parametrize("kind", ["linen", "scan"])
def test_a_model_whose_types_are_fixed_is_verified_at_these(
    kind: str, monkeypatch: pytest.MonkeyPatch, opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    e = foreign(kind)
    made = judged(e, opened, by=Auto(), steps=3)
    assert not made.departed, only(made)
    errors = {k: (c.error, c.allowed) for k, c in only(made).worst.items()}
    assert all(0 < allowed < 1e-4 for _, allowed in errors.values()), errors
    said = made.types_fixed
    assert said.startswith("The model cannot compute in double, since a type is fixed in it (")
    assert f"{Path(__file__).name}:" in said
    print_verified(made, 1.0)
    assert said in capsys.readouterr().out
    assert made.to_json()["types_fixed"] == said

    real = sharding.step.TrainStep._finished
    planted = lambda self, sums, norm: real(
        self, sums, norm if self.split.mesh is None else norm * (1 + 1e-3)
    )
    monkeypatch.setattr(sharding.step.TrainStep, "_finished", planted)
    assert only(judged(e, opened, by=Auto(), steps=3)).departs


def test_what_follows_its_inputs_types_computes_in_double_itself(opened: Opened) -> None:
    assert judged(small(), opened).types_fixed == ""


def test_in_double_a_model_whose_types_are_fixed_is_refused(opened: Opened) -> None:
    with pytest.raises(InputError, match=r"cannot compute in double.*with --x64 every case has to"):
        judged(foreign("scan"), opened, by=Auto(), x64=True)


def test_a_program_that_cannot_be_widened_is_refused(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    def refuse(*_: Any) -> Any:
        raise TypeError("no rule\nfor it")

    monkeypatch.setattr(double, "_made", refuse)
    with pytest.raises(InputError, match=r"cannot be widened either \(.*no rule for it\)"):
        judged(foreign("scan"), opened, by=Auto())


# What is said of an error.


def test_a_missing_weight_decay_is_named(
    monkeypatch: pytest.MonkeyPatch, opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    e = replace(small(), optimizer=AdamW(peak=1e-3, warmup=2, weight_decay=0.1))
    real = sharding.step.TrainStep.updated

    def planted(self: Any, state: Any, batch: Any) -> Any:
        new, *rest = real(self, state, batch)
        if self.split.mesh is not None:
            back = {p: w + 5e-5 * state["params"][p] for p, w in new["params"].items() if w.ndim > 1}
            new = {**new, "params": {**new["params"], **back}}
        return new, *rest

    monkeypatch.setattr(sharding.step.TrainStep, "updated", planted)
    made = judged(e, opened)
    d = only(made).departure
    assert d is not None
    assert d.phase == "update"
    assert d.looks.startswith(
        "the update is off by +5.0e-05 times the parameter itself: a weight decay that is missing"
    )
    assert d.norm == "root mean square"
    print_verified(made, 1.0)
    assert "of its root mean square, where rounding may make" in capsys.readouterr().out


def test_decay_is_told_from_other_errors_of_an_update() -> None:
    draw = np.random.default_rng(0)
    held, update = draw.normal(size=(2, 8, 8))
    flat = Layout(("a", "b"), ((), ()))
    off = lambda found: decay(Error(found, update, flat, {}, 1e-6), held)
    assert "a weight decay that is missing" in off(update + 1e-3 * held)
    assert "a weight decay too much" in off(update - 1e-3 * held)
    assert off(1.01 * update) == off(update + 1e-3 * draw.normal(size=(8, 8))) == ""
    assert decay(Error(update + 1, update, flat, {}, 1e-6), np.zeros((8, 8))) == ""


def test_the_error_of_a_gradient_is_of_its_largest_entry(
    monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    real = sharding.step.TrainStep._reduce
    planted = lambda self, path, g: real(self, path, g) * (1.37 if path == "leave" else 1.0)
    monkeypatch.setattr(sharding.step.TrainStep, "_reduce", planted)
    d = only(judged(small(), opened)).departure
    assert d is not None
    assert (d.phase, d.norm) == ("gradient", "largest entry")


@pytest.mark.parametrize(
    ("off", "types", "said"),
    [
        (1e-3, ("float32", "float64"), "more than the rounding of float32, the coarsest type of this run"),
        (1e-3, ("float32", "bfloat16"), "the size of bfloat16's rounding"),
        (1e-6, ("float32", "bfloat16"), "the size of float32's rounding"),
        (1e-13, ("float64",), "the size of float64's rounding"),
    ],
)
def test_no_type_is_named_that_the_run_does_not_compute_in(
    off: float, types: tuple[str, ...], said: str
) -> None:
    draw = np.random.default_rng(0)
    want, noise = draw.normal(size=(2, 16, 16))
    looks = diagnose(Error(want + off * noise, want, Layout(("a", "b"), ((), ())), {}, 1e-15, types=types))
    assert looks.startswith("no structure")
    assert looks.endswith(said), looks
