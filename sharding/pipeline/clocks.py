"""How long a grid takes by two clocks, what it keeps and what it sends, from the table alone. No jax.

Lockstep: one SPMD program, in which every stage spends the time of every kind of task that any stage does in a tick.
Independent: a program for each stage, which does its tasks in the grid's order, each as soon as what it waits for is there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sharding.errors import InputError
from sharding.pipeline.grid import Grid, Kind, Place, Task, Work


@dataclass(frozen=True)
class Costs:
    """What the tasks of one stage's layers take for one micro-batch, in any unit of time; a chunk takes 1/chunks of it."""

    forward: float = 1.0
    """F."""
    inputs: float = 1.0
    """B, gradients of the inputs."""
    weights: float = 1.0
    """W, gradients of the weights; where a grid has no W, its B makes both and takes both times."""

    def __post_init__(self) -> None:
        for name in ("forward", "inputs", "weights"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(
                    f"The cost {name} is {value}, but a task takes a time of 0 or more. Change the costs."
                )
        if not self.total:
            raise InputError(
                "The costs are 0, 0 and 0, but some task takes time. Give one that is more than 0."
            )

    @property
    def total(self) -> float:
        """All tasks of one micro-batch on one stage."""
        return self.forward + self.inputs + self.weights

    def of(self, kind: Kind, grid: Grid) -> float:
        """A task of this kind in the grid."""
        backward = self.inputs if grid.splits else self.inputs + self.weights
        return {"F": self.forward, "B": backward, "W": self.weights}[kind] / grid.chunks


@dataclass(frozen=True)
class Span:
    """One task with its time."""

    stage: int
    task: Task
    start: float
    end: float


@dataclass(frozen=True)
class Clock:
    """A grid in time."""

    spans: tuple[Span, ...]
    """Every task, by tick and stage."""
    makespan: float
    """From the start of the step to its last task's end."""
    work: float
    """What each stage is to do: all its tasks, one after the other."""

    @property
    def bubble(self) -> float:
        """Part of the step in which a stage does nothing of use: (makespan - work) / makespan, as GPipe counts it."""
        return max(0.0, 1.0 - self.work / self.makespan)  # a sum's rounding is no gain


def lockstep(grid: Grid, costs: Costs) -> Clock:
    """Each tick lasts the sum of the kinds that any stage does in it, in the order F, B, W."""
    starts: list[dict[Kind, float]] = []
    now = 0.0
    for kinds in grid.slots:
        starts.append({})
        for kind in kinds:
            starts[-1][kind] = now
            now += costs.of(kind, grid)
    spans = tuple(
        Span(stage, task, starts[tick][task.kind], starts[tick][task.kind] + costs.of(task.kind, grid))
        for tick, stage, task in grid.tasks()
    )
    return Clock(spans, now, grid.microbatches * costs.total)


def independent(grid: Grid, costs: Costs, message: float = 0.0) -> Clock:
    """Each stage does its tasks in the grid's order, as soon as it is free and what they need is there.

    `message`: time from the end of a task to where another stage can use what it made; sending costs the sender nothing.
    Raises InputError where a task stands before what it needs (`sharding.pipeline.check` says which).
    """
    if not 0 <= message < float("inf"):
        raise InputError(
            f"A message is to take {message}, but it takes a time of 0 or more. Change the message."
        )
    free, done, spans = [0.0] * grid.stages, dict[Work, float](), list[Span]()
    for _, stage, task in grid.tasks():
        work = (task.kind, task.microbatch, grid.part[Place(stage, task.chunk)])
        start = free[stage]
        for needed in grid.needs(work):
            if needed not in done:
                raise InputError(
                    f"{task} of stage {stage} stands in the grid before what it needs, {needed[0]}{needed[1]} of part "
                    f"{needed[2]}, so no clock can time it. Ask sharding.pipeline.check what to move."
                )
            away = grid.path[needed[2]].stage != stage
            start = max(start, done[needed] + (message if away else 0.0))
        free[stage] = done[work] = start + costs.of(task.kind, grid)
        spans.append(Span(stage, task, start, done[work]))
    return Clock(tuple(spans), max(free), grid.microbatches * costs.total)


def held(grid: Grid) -> tuple[tuple[int, ...], ...]:
    """[tick][stage]: activations of a (micro-batch, chunk) that are kept, from the tick of F to that of the last use.

    The last use is W where the grid has it, else B; both ticks count. One is 1/chunks of a stage's activations.
    """
    last: Kind = "W" if grid.splits else "B"
    changes = [[0] * grid.stages for _ in range(grid.ticks + 1)]
    for tick, stage, task in grid.tasks():
        if task.kind == "F":
            changes[tick][stage] += 1
        if task.kind == last:
            changes[tick + 1][stage] -= 1
    rows, now = [], [0] * grid.stages
    for change in changes[:-1]:
        now = [kept + more for kept, more in zip(now, change, strict=True)]
        rows.append(tuple(now))
    return tuple(rows)


def stash(grid: Grid) -> tuple[int, ...]:
    """[stage]: the most activations of a (micro-batch, chunk) that a stage keeps in any tick, see `held`."""
    return tuple(max(row[stage] for row in held(grid)) for stage in range(grid.stages))


@dataclass(frozen=True)
class Messages:
    """Activations and gradients of one micro-batch that one stage sends to another, in one step, over all stages."""

    forward: int
    backward: int


def messages(grid: Grid) -> Messages:
    """Counted from the tasks: those whose predecessor along the path lies on another stage."""
    sent: Counter[Kind] = Counter()
    for _, stage, task in grid.tasks():
        part = grid.part[Place(stage, task.chunk)]
        for kind, _, needed in grid.needs((task.kind, task.microbatch, part)):
            sent[kind] += grid.path[needed].stage != stage
    return Messages(sent["F"], sent["B"])
