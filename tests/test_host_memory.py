"""Optimizer state in the host's memory: where it lies, that nothing else changes, and backends that have no such memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs.quickstart import config as quickstart
from experiments import assemble
from experiments.checkpoints import CheckpointStore
from experiments.explanation import explain
from experiments.optimizers import AdamW
from sharding import marks
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.proof.double import doubled
from sharding.proof.trial import Ready
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.tensor import tensor
from sharding.rules.zero1 import zero1
from sharding.step import TrainStep
from tests import small
from tests.support import batches, initial_params, make_step, model_configs, place, start

CONFIG = model_configs()["transformer"]
SPLITS = {
    "fsdp tensor": (data() | fsdp() | tensor(), MeshShape(data=2, fsdp=2, tensor=2)),
    "zero1": (zero1(), MeshShape(data=8)),
}


def stepped(
    memory: Any, split: str, partitioner: Partitioner, accumulate: int = 2, double: bool = False
) -> TrainStep:
    """A step whose AdamW keeps its means in this memory; double: of a model that computes in double."""
    config = dataclasses.replace(CONFIG, dtype="float64") if double else CONFIG
    model = doubled(config.build()) if double else config.build()
    made = make_step(config, *SPLITS[split], partitioner, accumulate)
    return TrainStep(model, AdamW(memory=memory).build(10), dataclasses.replace(made.split, moments=memory))


def trained(step: TrainStep) -> tuple[Any, list[float]]:
    """The state after two updates, and the losses."""
    state, losses = start(step, initial_params(CONFIG)), []
    for batch in batches(CONFIG, 2):
        state, seen = step.step(state, place(step, batch))
        losses.append(float(seen["loss"]))
    return state, losses


def kinds(state: Any) -> set[str]:
    """The memories in which the optimizer's arrays lie."""
    return {x.sharding.memory_kind for x in jax.tree.leaves(state["optimizer"]) if x.ndim}


@pytest.mark.parametrize(
    "partitioner", [Manual(), pytest.param(Auto(), marks=pytest.mark.slow)], ids=["manual", "auto"]
)
@pytest.mark.parametrize("split", SPLITS)
def test_it_lies_there_and_the_numbers_are_the_same_to_the_bit(split: str, partitioner: Partitioner) -> None:
    (away, lost), (here, kept) = (trained(stepped(m, split, partitioner)) for m in ("host", "device"))
    assert (kinds(away), kinds(here)) == ({"pinned_host"}, {"device"})
    assert {x.sharding.memory_kind for x in away["params"].values()} == {"device"}
    assert lost == kept
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(away), jax.device_get(here))
    there = jax.tree.map(lambda x: x.sharding, away["optimizer"])
    specs = jax.tree.map(lambda x: x.sharding.spec, here["optimizer"])
    assert jax.tree.map(lambda s: s.spec, there) == specs


@pytest.mark.parametrize("double", [False, True])
def test_a_trial_of_verify_keeps_it_there(double: bool) -> None:
    """What `verify` runs, in double too, where state is cast before the first update."""
    ready = []
    for memory in ("host", "device"):
        with jax.enable_x64(double):
            step = stepped(memory, "fsdp tensor", Manual(), double=double)
        ready.append(Ready(step, 16, double))
    found, want = (made.run(0, batches(CONFIG, 2)) for made in ready)
    assert found.metrics == want.metrics
    jax.tree.map(np.testing.assert_array_equal, found.optimizer, want.optimizer)


def test_a_checkpoint_goes_from_one_memory_to_the_other(tmp_path: Path) -> None:
    saved, _ = trained(stepped("host", "fsdp tensor", Manual()))
    with CheckpointStore(tmp_path / "checkpoints", 2) as store:
        store.save(2, saved, {})
        store.wait()
        for memory, kind in (("host", "pinned_host"), ("device", "device")):
            restored, _ = store.restore(2, stepped(memory, "zero1", Manual()).abstract_state())
            assert kinds(restored) == {kind}
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(saved))


def test_explain_counts_its_bytes_as_the_hosts() -> None:
    base = quickstart()
    away, here = (
        explain(dataclasses.replace(base, optimizer=AdamW(memory=m)), 8) for m in ("host", "device")
    )
    assert away.bytes_per_device == {**here.bytes_per_device, "optimizer": 0}
    assert away.host_bytes_per_device == here.bytes_per_device["optimizer"] > 0
    assert here.host_bytes_per_device == 0
    assert {line.memory for line in away.of("optimizer")} == {"host"}
    assert {line.memory for line in away.of("parameter")} == {"device"}


def test_a_backend_without_such_memory_is_told_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(marks, "HOST", "elsewhere")
    config = dataclasses.replace(quickstart(), optimizer=AdamW(memory="host"))
    with pytest.raises(InputError, match="memory='host' needs the memory 'elsewhere', which cpu devices"):
        assemble.train_step(config, jax.devices())


def test_another_memory_is_refused() -> None:
    with pytest.raises(InputError, match=r"optimizer\.memory is 'disk', but it must be 'device' or 'host'"):
        AdamW(memory="disk")  # type: ignore[arg-type]


def test_the_command_trains_and_goes_on(
    home: Path, at_home: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with its state on the host has the losses of one without, also over a resumption."""
    runs = [
        small.shardlab("train", "small.py", "--steps", "6", "--runs", name, "--optimizer.memory", memory)
        for name, memory in (("away", "host"), ("near", "device"))
    ]
    assert runs == [0, 0]
    assert "of the host's memory" in capsys.readouterr().out
    away, near = (small.only(Path(name)) for name in ("away", "near"))
    assert small.losses(away) == small.losses(near)
    header = json.loads((away / "records.jsonl").read_text().splitlines()[0])
    assert header["details"]["bytes_per_device"]["optimizer"] == 0
