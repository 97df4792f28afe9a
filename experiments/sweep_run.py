"""Run a scaling sweep: all its points in one process, compiled first, then timed in alternation.

Every point is compiled before any is timed. Then come rounds: in each, every point has its turn of `warmup` untimed
and `steps` timed updates, so that whatever slows the machine for a while slows all points alike. Points with the same
global batch train on the same rows from the same parameters, so their losses must agree, and a round is recorded only
if they do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from experiments import assemble
from experiments.config import Experiment
from experiments.data.contract import Dataset
from experiments.records import Header, Records, installed_versions
from experiments.sweep import Point, Sweep, of
from experiments.sweep_agreement import Rounding, rounding
from sharding.errors import InputError

if TYPE_CHECKING:
    from experiments.events import Events
    from experiments.progress import Progress
    from experiments.stopping import StopRequest


class Disagreement(RuntimeError):
    """Two splits of one batch trained different numbers: at least one of them computes something else."""


@dataclass
class Side:
    """A point while it runs: its step, compiled; its state; losses of all updates and the medians of its rounds."""

    point: Point
    experiment: Experiment
    step: Any
    tokens: int
    """Tokens of one step, or examples, as `unit` says."""
    unit: Literal["tokens", "examples"]
    """What is counted: tokens of text, else examples."""
    lowered: Any
    rounding: Rounding
    """The coarsest on the way to its loss."""
    compiled: Any = None
    state: Any = None
    compile_seconds: float = 0.0
    """Seconds of building, tracing and compiling the step."""
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Seconds of a step, the median of each finished round."""
    busy: list[float] = field(default_factory=list)
    """CPU cores that the process kept busy during the timed steps of each finished round."""

    def agree(self, update: int) -> float:
        """Largest relative difference of its loss at an update, from 1, from another split's that rounding explains."""
        return self.rounding.explains(update, self.tokens)

    def rate(self) -> float:
        """Tokens, or examples, a second, the median over finished rounds."""
        return median(self.tokens / x for x in self.seconds)


@dataclass(frozen=True)
class Measured:
    """What a sweep leaves in memory: its sides, rounds that every point finished, why it stopped early ("": it did
    not), the largest relative difference between losses that should be equal.
    """

    sides: list[Side]
    rounds: int
    stopped: str
    difference: float


def prepare(sweep: Sweep, found: Sequence[Any]) -> tuple[list[Side], Dataset]:
    """Every point's step, traced and checked against devices, batch and data; nothing is compiled yet.

    Raises InputError, naming the point.
    """
    most = max(p.devices for p in sweep.points)
    if most > len(found):
        raise InputError(
            f"The sweep asks for {most} devices, but {len(found)} are present. Leave out the points with more, or set "
            f'the base\'s devices.kind to "pretend".'
        )
    dataset = sweep.base.data.open(assemble.CACHE / "data")
    return [_side(sweep, point, found[: point.devices], dataset) for point in sweep.points], dataset


def _side(sweep: Sweep, point: Point, found: Sequence[Any], dataset: Dataset) -> Side:
    import jax

    from experiments.evaluate import unit
    from experiments.explanation import counted

    began, experiment = time.perf_counter(), sweep.experiment(point)
    with of(point):
        step = assemble.train_step(experiment, found)
        assemble.check_data(experiment, dataset, step)
        shapes, shardings = step.abstract_batch(point.batch), step.batch_shardings()
        batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[k]) for k, x in shapes.items()}
        lowered = step.step.lower(step.abstract_state(), batch)
        step.split.layouts.check_used()
    return Side(
        point,
        experiment,
        step,
        counted(shapes),
        unit(dataset),
        lowered,
        rounding(step, batch, experiment.partitioner),
        compile_seconds=time.perf_counter() - began,
    )


def _compile(side: Side, initial: Any) -> None:
    """Compile a point's step and lay the initial state, arrays of the host, out as the point says."""
    import jax

    began = time.perf_counter()
    side.compiled = side.lowered.compile()
    side.compile_seconds += time.perf_counter() - began
    # Never an alias of the host's arrays: the step consumes (donates) its state, and other points start from the same.
    side.state = jax.device_put(initial, side.step.state_shardings(), may_alias=False)


def measure(
    sweep: Sweep,
    sides: list[Side],
    dataset: Dataset,
    records: Records,
    events: Events,
    show: Progress,
    stop: StopRequest,
) -> Measured:
    """Compile all sides, then time them round after round; a round is recorded once every side has had its turn.

    A stop that was asked for is served after the turn under way. Raises `Disagreement` when losses differ.
    """
    import jax

    rounds, difference, turns = 0, 0.0, 0
    # Made once, as initial parameters are the same on every mesh: making them for each would compile for seconds each.
    initial = jax.device_get(sides[0].step.init(sweep.base.seed))
    for side in sides:
        _compile(side, initial)
        events.write("compile", side.compile_seconds, point=str(side.point))
        show.line(f"compiled {side.point} in {side.compile_seconds:.1f} s", "dim")
        if stopped := stop.reached(0):
            return Measured(sides, 0, stopped, 0.0)
    for at in range(sweep.rounds):
        times = []
        for side in sides:
            times.append(_turn(side, dataset, sweep.warmup + sweep.steps)[sweep.warmup :])
            turns += 1
            show.reached(turns)
            if stopped := stop.reached(turns):
                return Measured(sides, rounds, stopped, difference)
        differences = disagreements(sides)
        difference, rounds = max(differences.values()), at + 1
        for side, turn in zip(sides, times, strict=True):
            wall, cpu = zip(*turn, strict=True)
            side.seconds.append(median(wall))
            side.busy.append(sum(cpu) / sum(wall))
            records.write("sweep", "measured", _values(side, wall, at, differences[side.point.batch]))
        timed = sum(wall for turn in times for wall, _ in turn)
        show.line(f"round {at + 1}/{sweep.rounds}: {timed:.1f} s in timed steps", "dim")
    return Measured(sides, rounds, "", difference)


def _turn(side: Side, dataset: Dataset, updates: int) -> list[tuple[float, float]]:
    """(seconds, CPU seconds of all threads) of each of so many updates, from the call until the new state is there.

    Batches are made before the clock starts.
    """
    import jax

    from experiments.feed import global_batch

    shardings, e, done = side.step.batch_shardings(), side.experiment, len(side.losses)
    seconds = []
    for at in range(done, done + updates):
        batch = jax.block_until_ready(global_batch(dataset, "train", e.seed, at, e.batch, shardings))
        began, cpu = time.perf_counter(), time.process_time()
        side.state, metrics = jax.block_until_ready(side.compiled(side.state, batch))
        seconds.append((time.perf_counter() - began, time.process_time() - cpu))
        side.losses.append(float(metrics["loss"]))
    return seconds


def disagreements(sides: Sequence[Side]) -> dict[int, float]:
    """Largest relative difference of losses at any update, for each global batch, over the sides that have that batch.

    Raises `Disagreement`, naming sides, update and losses, where it is more than their rounding explains (`Side.agree`) or
    a loss is not finite.
    """
    found: dict[int, float] = {}
    for batch in dict.fromkeys(s.point.batch for s in sides):
        alike = [s for s in sides if s.point.batch == batch]
        found[batch] = 0.0
        for update, losses in enumerate(zip(*(s.losses for s in alike), strict=True), 1):
            low, high = min(losses), max(losses)
            apart = (high - low) / abs(low) if low else high - low
            most, by = alike[0].agree(update), alike[0].rounding
            if not apart <= most:  # written so that a loss that is not a number departs too
                told = ", ".join(f"{x:.7g} ({s.point})" for s, x in zip(alike, losses, strict=True))
                raise Disagreement(
                    f"The losses of update {update} on the same {batch} rows differ by {apart:.1e} of their size, and "
                    f"rounding of {by.dtype}, {by.where}, explains {most:.0e}: {told}. One of these splits computes "
                    f"something else, so its speed means nothing; the round is not recorded."
                )
            found[batch] = max(found[batch], apart)
    return found


def _values(side: Side, seconds: Sequence[float], at: int, difference: float) -> dict[str, Any]:
    """One point in one round, as `docs/records.md` describes a record of kind "sweep", and what else is known of it."""
    point = side.point
    return {
        "mode": point.mode,
        "split": point.split,
        "devices": point.devices,
        "global_batch": point.batch,
        "tokens_per_step": side.tokens,
        "unit": side.unit,
        "step_seconds": [median(seconds)],
        "cores": cores(),
        "round": at + 1,
        "steps_timed": len(seconds),
        "step_seconds_range": [min(seconds), max(seconds)],
        "cores_busy": side.busy[-1],
        "compile_seconds": side.compile_seconds,
        "rules": repr(point.rules),
        "mesh": {a: n for a, n in side.step.split.layouts.sizes.items() if n > 1},
        "loss": side.losses[-1],
        "loss_difference": difference,
    }


def cores() -> int:
    """CPU cores that this process may use: what all pretend devices share."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def header(sweep: Sweep, run: str, digest: str, found: Sequence[Any], sides: list[Side], data: Any) -> Header:
    """What is constant for a sweep; the mesh is left empty, as it spans several."""
    pretend = sweep.base.devices.kind == "pretend"
    kind = f"pretend {found[0].platform}" if pretend else found[0].device_kind
    return Header(
        run=run,
        config_hash=digest,
        seed=sweep.base.seed,
        versions=installed_versions(),
        device={"platform": found[0].platform, "kind": kind, "count": len(found), "processes": 1},
        mesh={},
        details={
            "name": sweep.name,
            "partitioner": repr(sweep.base.partitioner),
            "parameters": sum(s.size for s in sides[0].step.tree.values()),
            "warmup": sweep.warmup,
            "data": dict(data.facts),
        },
    )


def rows(measured: Measured, shared_cores: bool) -> Iterator[dict[str, Any]]:
    """Each point over its finished rounds: medians, range, and efficiency, which is measured over ideal throughput.

    1 is the throughput of the mode's point on one device, else of the split's own fewest devices. Ideal is the same
    throughput where devices share cores, and throughput in proportion to the devices where each brings its own.
    """
    sides = [s for s in measured.sides if s.seconds]
    for side in sides:
        point = side.point
        own = [s for s in sides if s.point.mode == point.mode and s.point.split == point.split]
        one = [s for s in sides if s.point.mode == point.mode and s.point.devices == 1]
        base = min(own, key=lambda s: s.point.devices)
        base = one[0] if base.point.devices > 1 and one else base
        ideal = base.rate() * (1 if shared_cores else point.devices / base.point.devices)
        yield {
            "mode": point.mode,
            "split": point.split,
            "devices": point.devices,
            "global_batch": point.batch,
            "step_seconds": median(side.seconds),
            "step_seconds_range": [min(side.seconds), max(side.seconds)],
            "tokens_per_second": side.rate(),
            "unit": side.unit,
            "efficiency": side.rate() / ideal,
            "cores_busy": median(side.busy),
            "compile_seconds": side.compile_seconds,
        }
