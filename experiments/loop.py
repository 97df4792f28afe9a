"""The training loop. It fits one screen; what it calls has its own files.

Order matters in three places: metrics of a step are read `LATE` steps after it was started, so the host never waits for
a device that has nothing queued (before an evaluation or a save, which wait for the step anyway, at once); a checkpoint
is asked for before the next step donates the state; and the stop request is asked once a step on every process, so that
all leave at the same step.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.config import Experiment
from experiments.data.contract import Dataset
from experiments.data.prefetch import Prefetcher
from experiments.evaluate import held_out
from experiments.feed import global_batch
from experiments.reporting import Reporter
from experiments.stopping import StopRequest

if TYPE_CHECKING:
    import jax

    from experiments.checkpoints import CheckpointStore
    from sharding.step import TrainStep

LATE = 2
"""Steps that run ahead before the metrics of a step are read."""
AHEAD = 8
"""Steps that are queued at most: with hundreds of them waiting, XLA:CPU's collectives have stopped for ever."""


@dataclass
class Outcome:
    """How a run ended: the state, the updates made, and why it stopped early ("" when it did not)."""

    state: Any
    step: int
    stopped: str


def run(
    experiment: Experiment,
    step: TrainStep,
    dataset: Dataset,
    state: Any,
    start: int,
    store: CheckpointStore,
    meta: dict[str, Any],
    report: Reporter,
) -> Outcome:
    """Train from update `start` to `experiment.steps`; `state` is consumed (donated)."""
    import jax

    e, pending, queued, stopped, done = experiment, deque(), deque(), "", start
    single = jax.process_count() == 1
    shardings = step.batch_shardings()

    def make(at: int) -> dict[str, jax.Array]:
        return global_batch(dataset, "train", e.seed, at, e.batch, shardings)

    def due(every: int, at: int) -> bool:
        return at == e.steps or (every > 0 and at % every == 0)

    with Prefetcher(make, start, e.steps) as batches, StopRequest(agree_every=e.log_every) as stop:
        for at, batch in batches:
            state, metrics = step.step(state, batch)
            done = at + 1
            queued.append(metrics)
            if len(queued) > AHEAD:
                jax.block_until_ready(queued.popleft())
            if done == start + 1:
                report.first_step(metrics)
            if due(e.log_every, done):
                pending.append((done, metrics))
            stopped = stop.reached(done) or ""
            evaluates, saves = due(e.evaluate.every, done), bool(stopped) or due(e.checkpoints.every, done)
            if pending and (evaluates or saves or pending[0][0] + LATE <= done):
                ready = 1 if not (evaluates or saves) else len(pending)
                report.read([pending.popleft() for _ in range(ready)], batches.waited_s)
            if evaluates:
                with report.aside("evaluate", done, after=metrics):
                    means = held_out(step, state["params"], dataset, e.batch, e.evaluate.batches)
                report.evaluation(done, means)
            if saves and not store.has(done):
                with report.aside("save", done, after=metrics):
                    store.save(done, state, meta)
            if stopped:
                break
        began = time.perf_counter()
        store.wait()
        # A signal during the last evaluation or save: with several processes nobody else may know of it.
        stopped = stopped or (stop.requested or "" if single else "")
    report.events.write("save_wait", time.perf_counter() - began, step=done)
    return Outcome(state, done, stopped)
