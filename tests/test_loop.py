"""The loop alone, on steps that only say when they are read: what is waited for, when, and how time is told."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import loop, reporting
from experiments.config import MOST_STEPS, Checkpoints, Evaluate, Experiment, load
from experiments.data.contract import RowSpec
from experiments.events import Events, read_events
from experiments.optimizers import AdamW
from experiments.progress import Progress
from experiments.records import Header, Records, installed_versions, read
from experiments.reporting import Reporter, Work
from tests.small import ROOT

HEADER = Header(
    run="r",
    config_hash="c" * 64,
    seed=0,
    versions=installed_versions(),
    device={"platform": "cpu", "kind": "pretend cpu", "count": 1, "processes": 1},
    mesh={},
)


class Metric:
    """A device's number: reading it is noted with how many steps had been started by then."""

    def __init__(self, told: Told, step: int, seconds: float):
        self.told, self.step, self.ready = told, step, time.perf_counter() + seconds

    def block_until_ready(self) -> Metric:
        self.told.waited.append((self.step, self.told.started))
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.block_until_ready()
        self.told.read.append((self.step, self.told.started))
        return np.asarray(self.step, np.float32)


class Told:
    """A train step, a dataset and a store at once, that do nothing but keep an account."""

    heldout_rows = 1

    def __init__(self, seconds: float = 0.0, fails_at: int | None = None):
        self.inputs = {"labels": RowSpec((1,), "int32")}
        self.seconds, self.fails_at, self.started = seconds, fails_at, 0
        self.waited, self.read, self.saved = [], [], []
        self.queue = 0.0

    def batch_shardings(self) -> dict[str, Any]:
        return {"labels": jax.sharding.SingleDeviceSharding(jax.devices()[0])}

    def step(self, state: Any, batch: Any) -> tuple[Any, dict[str, Metric]]:
        self.started += 1
        self.queue = max(self.queue, time.perf_counter()) + self.seconds
        ready = self.queue - time.perf_counter()
        return {"params": None}, {k: Metric(self, self.started, ready) for k in ("loss", "grad_norm")}

    def rows(
        self, split: str, seed: int, step: int, batch: int, start: int, stop: int
    ) -> dict[str, np.ndarray]:
        if step == self.fails_at:
            raise OSError(f"the disk is gone at {step}")
        return {"labels": np.zeros((stop - start, 1), np.int32)}

    def has(self, step: int) -> bool:
        return step in self.saved

    def save(self, step: int, state: Any, meta: Any) -> float:
        self.saved.append(step)
        return 0.0

    def wait(self) -> None:
        pass


def drive(
    folder: Path, told: Told, monkeypatch: pytest.MonkeyPatch, aside: float = 0.0, **change: Any
) -> list[int]:
    """Run the loop on the quickstart with `change`; the steps after which it evaluated."""
    evaluated: list[int] = []

    def held_out(*_: object) -> dict[str, float]:
        evaluated.append(told.started)
        time.sleep(aside)
        return {"loss": 1.0, "tokens": 1.0}

    monkeypatch.setattr(loop, "held_out", held_out)
    e: Experiment = replace(load(ROOT / "configs" / "quickstart.py"), **change)
    with (
        Progress(e.steps) as show,
        Records(folder / "records.jsonl", HEADER) as records,
        Events(folder / "events.jsonl", HEADER) as events,
    ):
        schedule = e.optimizer.schedule(e.steps)
        work, device = Work(10, 1, None), jax.devices()[0]
        report = Reporter(e.steps, work, {}, records, events, show, schedule, e.log_every, device)
        report.start(0)
        given: Any = told
        outcome = loop.run(e, given, given, {"params": None}, 0, given, {}, report)
    assert outcome.step == e.steps
    assert outcome.stopped == ""
    return evaluated


def test_rates_are_those_of_the_schedule_however_long_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 2**31 - 2 steps computes the blocks that it asks for, not an array of 8 GiB at its start."""
    schedule = AdamW(peak=1e-2, warmup=30).schedule(200)
    monkeypatch.setattr(reporting, "BLOCK", 16)
    short = reporting.Rates(schedule, 200, 1)
    for step in (0, 1, 15, 16, 17, 40, 100, 101, 199, 3):
        assert short.of(step) == pytest.approx(float(schedule(step)), rel=1e-6)
    long = reporting.Rates(lambda step: step, MOST_STEPS, 1)
    for step in (0, 15, 16, 10**9, MOST_STEPS - 1):
        assert long.of(step) == step


@pytest.mark.parametrize("every", [1, 3, 16, 40, 999])
def test_a_rate_is_computed_before_it_is_asked_for(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would wait for the steps in between, also where these are more than a block."""
    computed: list[int] = []

    def schedule(step: Any) -> Any:
        jax.debug.callback(lambda s: computed.append(int(s)), step)
        return step

    monkeypatch.setattr(reporting, "BLOCK", 16)
    steps = 200
    rates = reporting.Rates(schedule, steps, every)
    start = 21  # a resumed run asks for the rate of its first step before it begins
    assert rates.of(start) == start
    for step in [s for s in range(start + 1, steps) if (s + 1) % every == 0 or s + 1 == steps]:
        jax.effects_barrier()
        assert step in computed
        assert rates.of(step) == step
    assert len(computed) == len(set(computed)), "no block is computed twice"


END = {"evaluate": Evaluate(every=0, batches=1), "checkpoints": Checkpoints(every=0, keep=1)}


def test_nothing_is_read_but_metrics_of_logged_steps_some_steps_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = Told()
    drive(tmp_path, told, monkeypatch, steps=23, log_every=5, **END)
    read_at = dict(told.read)
    assert read_at == {5: 7, 10: 12, 15: 17, 20: 22, 23: 23}
    # the first step is waited for, because it compiles; the last, because evaluation and checkpoint need it; any other long
    # after it was queued
    soon = {step for step, started in told.waited if started < step + loop.AHEAD}
    assert soon == {1, 5, 10, 15, 20, 23}
    assert {started - step for step, started in told.waited if step not in soon} == {loop.AHEAD}


@pytest.mark.parametrize(
    ("steps", "log_every", "logged"),
    [(1, 10, [1]), (5, 2, [2, 4, 5]), (4, 4, [4]), (3, 1, [1, 2, 3])],
)
def test_the_last_step_is_always_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, log_every: int, logged: list[int]
):
    drive(tmp_path, Told(), monkeypatch, steps=steps, log_every=log_every, **END)
    assert [r.step for r in read(tmp_path / "records.jsonl") if r.kind == "step"] == logged


def test_evaluations_and_checkpoints_come_at_their_steps_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = Told()
    change = {"evaluate": Evaluate(every=4, batches=1), "checkpoints": Checkpoints(every=3, keep=1)}
    assert drive(tmp_path, told, monkeypatch, steps=10, log_every=5, **change) == [4, 8, 10]
    assert told.saved == [3, 6, 9, 10]
    told = Told()
    assert drive(tmp_path / "end", told, monkeypatch, steps=10, log_every=5, **END) == [10]
    assert told.saved == [10]


def test_step_time_is_the_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps take 50 ms on a device that runs behind; evaluations of 0.2 s must neither add to it nor take from it."""
    told = Told(seconds=0.05)
    change = {"evaluate": Evaluate(every=3, batches=1), "checkpoints": Checkpoints(every=0, keep=1)}
    drive(tmp_path, told, monkeypatch, aside=0.2, steps=16, log_every=4, **change)
    records = [r.values for r in read(tmp_path / "records.jsonl") if r.kind == "step"]
    seconds = [r["step_seconds"] for r in records]
    assert len(seconds) == 4
    assert all(0.045 < s < 0.09 for s in seconds), seconds
    assert records[-1]["tokens_per_second"] == pytest.approx(10 / seconds[-1])
    spent = [e.seconds for e in read_events(tmp_path / "events.jsonl") if e.name == "evaluate"]
    assert all(s is not None and 0.2 <= s < 0.25 for s in spent), "a step's time counted as the evaluation's"


def test_the_first_step_has_no_step_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    drive(tmp_path, Told(seconds=0.01), monkeypatch, steps=3, log_every=1, **END)
    records = {r.step: r.values for r in read(tmp_path / "records.jsonl") if r.kind == "step"}
    assert records[1]["step_seconds"] is None
    assert records[2]["step_seconds"] > 0
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/3"))
    assert "/step" not in first
    assert "eta" not in first


def test_an_error_of_the_data_surfaces_and_the_thread_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = Told(fails_at=3)
    with pytest.raises(OSError, match="gone at 3"):
        drive(tmp_path, told, monkeypatch, steps=9, log_every=3, **END)
    assert told.started == 3, "the steps before it were made"
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
    with Records(tmp_path / "records.jsonl", HEADER) as again:
        assert again.torn == ""


def test_the_thread_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drive(tmp_path, Told(), monkeypatch, steps=4, log_every=3, **END)
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
