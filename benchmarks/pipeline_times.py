"""A pipeline's steps and tasks, timed in turns, against what the lockstep clock says of the grid."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

from pipeline_setting import MODEL, SCHEDULES, STAGES, experiment, write

from experiments.records import Records
from sharding.pipeline.clocks import Costs, lockstep
from sharding.pipeline.grid import Schedule

TURNS = (2, 12)
"""Turns of a task's loop: the difference of the two calls is so many tasks, without what a call costs."""
LIMIT = 1.15
"""Of measured over predicted."""


def closed_bubble(name: str, chunks: int, microbatches: int, costs: Costs) -> float:
    """The closed form of docs/schedules.md for the lockstep clock."""
    idle = costs.forward + costs.inputs + (0.0 if name.startswith("zb-") else costs.weights)
    idle *= (STAGES - 1) / (1 if name.startswith("zb-") else chunks)
    return idle / (idle + microbatches * costs.total)


def kind_of(schedule: Schedule) -> tuple[bool, int]:
    """Schedules of one kind have the same tasks: whether the backward is in two, and chunks of a stage."""
    grid = schedule.grid(STAGES)
    return grid.splits, grid.chunks


def _batch(step: Any, rows: int) -> dict[str, Any]:
    import jax
    import numpy as np

    draw, lies = np.random.default_rng(0), step.batch_shardings()
    made = {}
    for key, x in step.abstract_batch(rows).items():
        whole = np.issubdtype(x.dtype, np.integer)
        values = draw.integers(0, MODEL.vocab, x.shape) if whole else np.ones(x.shape)
        made[key] = jax.device_put(values.astype(x.dtype), lies[key])
    return made


class Clocked:
    """Everything that is timed, compiled: steps, steps without ticks, and the loops of tasks."""

    def __init__(self, names: Sequence[str], microbatches: Sequence[int]):
        import jax
        import numpy as np
        import pipeline_tasks

        from experiments.assemble import train_step

        self.run: dict[tuple[Any, ...], Any] = {}
        """What -> a function that takes its turn."""
        devices = jax.devices()[:STAGES]
        steps = {
            (n, m): train_step(experiment(SCHEDULES[n](microbatches=m)), devices)
            for n in names
            for m in microbatches
        }
        kinds = {kind_of(SCHEDULES[n](microbatches=m)): (step, m) for (n, m), step in steps.items()}
        for kind, (step, m) in kinds.items():
            batch = _batch(step, m)
            self._step(("rest", *kind), pipeline_tasks.without_ticks(step), step, batch)
            params = step.init(0)["params"]
            for task in pipeline_tasks.BODIES:
                if task == "W" and not kind[0]:
                    continue
                made = pipeline_tasks.loop(step, task).lower(params, batch, np.int32(1)).compile()
                for turns in TURNS:
                    n = np.int32(turns)
                    self.run[(task, *kind, turns)] = lambda f=made, p=params, b=batch, n=n: float(f(p, b, n))
            print(f"compiled the tasks of {type(step.split.schedule).__name__}", flush=True)
        for (name, m), step in steps.items():
            self._step(("step", name, m), step.step, step, _batch(step, m))
        print(f"compiled {len(steps)} steps", flush=True)

    def _step(self, key: tuple[Any, ...], step: Any, whole: Any, batch: Any) -> None:
        import jax

        state = whole.init(0)
        held = [step.lower(state, batch).compile(), state]

        def run() -> None:
            held[1], _ = held[0](held[1], batch)
            jax.block_until_ready(held[1])

        self.run[key] = run

    def rounds(self, n: int) -> dict[tuple[Any, ...], list[float]]:
        """Seconds of each in n rounds after one to warm up; every other round goes backwards."""
        seconds: dict[tuple[Any, ...], list[float]] = {key: [] for key in self.run}
        for at in range(n + 1):
            for key in list(self.run) if at % 2 else list(self.run)[::-1]:
                begun = time.perf_counter()
                self.run[key]()
                if at:
                    seconds[key].append(time.perf_counter() - begun)
        return seconds


def times(asked: argparse.Namespace, records: Records | None) -> list[str]:
    """Print and write the times; what is over its limit."""
    import pipeline_tasks

    clocked = Clocked(asked.schedules, asked.microbatches)
    seconds = clocked.rounds(asked.rounds)
    median = {key: statistics.median(x) for key, x in seconds.items()}
    tasks: dict[tuple[bool, int], dict[str, float]] = {}
    for task, *kind, _ in [k for k in median if k[0] in pipeline_tasks.BODIES and k[-1] == TURNS[1]]:
        few, many = ((task, *kind, n) for n in TURNS)
        each = (median[many] - median[few]) / (TURNS[1] - TURNS[0])
        tasks.setdefault((kind[0], kind[1]), {})[task] = each
        values = {"task": task, "splits": kind[0], "chunks": kind[1], "seconds": each, "turns": list(TURNS)}
        write(
            records,
            "pipeline_task",
            "measured",
            {**values, "few_seconds": seconds[few], "many_seconds": seconds[many]},
        )
    for kind, each in tasks.items():
        told = ", ".join(f"{task} {t * 1e3:.2f}" for task, t in each.items())
        print(
            f"backward in {1 + kind[0]}, {kind[1]} chunks a stage: {told} ms; no ticks {median['rest', *kind] * 1e3:.1f} ms"
        )
    print(f"load {os.getloadavg()[0]:.1f}\n{'schedule':14}{'M':>4}{'measured':>10}{'predicted':>10}{'ratio':>7}{'a tick':>8}"
          f"{'bubble: closed':>15}{'grid':>7}{'measured':>9}")  # fmt: skip
    over = []
    for name in asked.schedules:
        for m in asked.microbatches:
            over += _told(name, m, seconds["step", name, m], tasks, median, records)
    return over


def _told(
    name: str, m: int, rounds: list[float], tasks: Any, median: Any, records: Records | None
) -> list[str]:
    schedule = SCHEDULES[name](microbatches=m)
    grid, kind = schedule.grid(STAGES), kind_of(schedule)
    each, measured = tasks[kind], statistics.median(rounds)
    costs = Costs(*(each.get(t, 0.0) * grid.chunks for t in ("F", "B", "W")))
    clock, beside = lockstep(grid, costs), m * (each["loss"] + each["enter"])
    predicted = clock.makespan + beside + median["rest", *kind]
    bubbles = (
        closed_bubble(name, grid.chunks, m, costs),
        clock.bubble,
        1 - (clock.work + m * each["loss"]) / measured,
    )
    a_tick = (measured - predicted) / grid.ticks
    print(f"{name:14}{m:4}{measured * 1e3:8.1f}ms{predicted * 1e3:8.1f}ms{measured / predicted:7.3f}{a_tick * 1e3:6.2f}ms"
          f"{bubbles[0]:14.1%}{bubbles[1]:8.1%}{bubbles[2]:8.1%}", flush=True)  # fmt: skip
    where = {"schedule": name, "stages": STAGES, "microbatches": m}
    write(
        records,
        "pipeline_step",
        "measured",
        {**where, "step_seconds": rounds, "bubble": bubbles[2], "load": os.getloadavg()[0]},
    )
    modelled = {
        "closed_bubble": bubbles[0],
        "bubble": bubbles[1],
        "ticks": grid.ticks,
        "step_seconds": predicted,
    }
    parts = {
        "clock_seconds": clock.makespan,
        "loss_and_enter_seconds": beside,
        "no_ticks_seconds": median["rest", *kind],
    }
    write(records, "pipeline_clock", "modelled", where | modelled | parts)
    late = measured > LIMIT * predicted
    return [f"{name}, {m} micro-batches: {measured / predicted:.3f} x the prediction > {LIMIT}"] * late
