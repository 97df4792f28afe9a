"""The grid of a pipeline: which tasks each stage does in each tick. No jax here, so that configs and pictures need none.

Time goes in ticks. In a tick every stage does the tasks of its cell, at most one of each kind, in the order F, B, W.
A message takes until the next tick: what stage 0 computes in tick t, stage 1 has in tick t + 1; what a stage computes
itself it has at once.

A model's layers are cut into `len(path)` parts, which a micro-batch goes through in the order of `path`. Part p lies
on the stage `path[p].stage`, as that stage's chunk `path[p].chunk`. One part a stage is the ordinary pipeline;
several are virtual stages (Narayanan et al. 2021, arXiv:2104.04473, 2.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

from sharding.errors import InputError

Kind = Literal["F", "B", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "W")
"""F: forward. B: backward, of the inputs alone where the grid has W, else of inputs and weights. W: gradients of the
weights.
"""


@dataclass(frozen=True, order=True)
class Task:
    """One task: what is done, for which micro-batch, by which of the stage's chunks of layers."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


@dataclass(frozen=True, order=True)
class Place:
    """Where a part of the layers lies."""

    stage: int
    chunk: int = 0


Cell = tuple[Task, ...]

Work = tuple[Kind, int, int]
"""(kind, micro-batch, part): a task told by the part of the layers rather than by where that lies."""


@dataclass(frozen=True)
class Grid:
    """Cells by tick and stage, and the path of a micro-batch through the parts of the layers.

    `sharding.pipeline.check.require_sound` refuses, with InputError, a grid that cannot run.
    """

    cells: tuple[tuple[Cell, ...], ...]
    """[tick][stage]: the tasks of a stage in a tick."""
    path: tuple[Place, ...]
    """[part]: where each part of the layers lies, in the order in which a micro-batch goes through them."""
    microbatches: int

    @property
    def stages(self) -> int:
        """Stages, one for each device along the axis `stage`."""
        return 1 + max(place.stage for place in self.path)

    @property
    def chunks(self) -> int:
        """Parts of the layers that a stage has."""
        return 1 + max(place.chunk for place in self.path)

    @property
    def ticks(self) -> int:
        """Ticks in one step."""
        return len(self.cells)

    @cached_property
    def part(self) -> Mapping[Place, int]:
        """The part of the layers that lies at a place."""
        return {place: part for part, place in enumerate(self.path)}

    @cached_property
    def splits(self) -> bool:
        """Whether the backward pass is in two tasks: B of the inputs, W of the weights."""
        return any(task.kind == "W" for _, _, task in self.tasks())

    def tasks(self) -> Iterator[tuple[int, int, Task]]:
        """(tick, stage, task) in the order of ticks, stages and kinds."""
        for tick, row in enumerate(self.cells):
            for stage, cell in enumerate(row):
                for task in sorted(cell, key=lambda task: KINDS.index(task.kind)):
                    yield tick, stage, task

    @cached_property
    def slots(self) -> tuple[tuple[Kind, ...], ...]:
        """[tick]: the kinds that any stage does in it. In one SPMD program every stage does them all, masked."""
        return tuple(
            tuple(kind for kind in KINDS if any(task.kind == kind for cell in row for task in cell))
            for row in self.cells
        )

    def needs(self, work: Work) -> tuple[Work, ...]:
        """What has to be done before: by another stage in an earlier tick, by the same stage earlier in its order."""
        kind, m, part = work
        if kind == "F":
            return (("F", m, part - 1),) if part else ()
        if kind == "B":
            return (("F", m, part), ("B", m, part + 1)) if part + 1 < len(self.path) else (("F", m, part),)
        return (("B", m, part),)

    @cached_property
    def when(self) -> Mapping[Work, int]:
        """(kind, micro-batch, part) -> tick; of a task that stands twice the last."""
        return {
            (task.kind, task.microbatch, self.part[Place(stage, task.chunk)]): tick
            for tick, stage, task in self.tasks()
        }


@runtime_checkable
class Schedule(Protocol):
    """A pipeline schedule: a frozen dataclass, free of jax, that says who does what when."""

    @property
    def microbatches(self) -> int:  # a property, since a frozen dataclass's field cannot be set
        """Micro-batches that go through the pipeline in one step (times `accumulate`)."""
        ...

    def grid(self, stages: int) -> Grid:
        """The grid on so many stages. Raises InputError where the schedule has none for them."""
        ...


def positive(schedule: Any) -> None:
    """Refuse a schedule whose whole-numbered fields are not all 1 or more: InputError. For its `__post_init__`."""
    for field in fields(schedule):
        value = getattr(schedule, field.name)
        if field.type in ("int", int) and (type(value) is not int or value < 1):
            raise InputError(
                f"{type(schedule).__name__} has {field.name}={value!r}, but it takes a whole number of {field.name}, "
                f"1 or more. Change {field.name}."
            )


def looped(stages: int, chunks: int = 1) -> tuple[Place, ...]:
    """The path that goes through all stages, chunk after chunk: part p is chunk p // S of stage p % S."""
    if stages < 1:
        raise InputError(
            f"A pipeline of {stages} stages was asked for, but it has 1 or more. Change the stages."
        )
    return tuple(Place(part % stages, part // stages) for part in range(stages * chunks))


def placed(tasks: Mapping[tuple[str, int, int], int], path: tuple[Place, ...], microbatches: int) -> Grid:
    """The grid in which (kind, micro-batch, part) stands in the tick that `tasks` gives it.

    Raises InputError where one stage would do two tasks of one kind in a tick, or one before tick 0, or one of another kind.
    """
    stages = 1 + max(place.stage for place in path)
    rows: list[list[list[Task]]] = [
        [[] for _ in range(stages)] for _ in range(1 + max(tasks.values(), default=-1))
    ]
    for (kind, microbatch, part), tick in tasks.items():
        if kind not in KINDS:
            raise InputError(f"{kind!r} is no kind of task. The kinds are {', '.join(KINDS)}. Change it.")
        task = Task(kind, microbatch, path[part].chunk)
        if tick < 0:
            raise InputError(
                f"Stage {path[part].stage} is to do {task} in tick {tick}, but ticks are counted from 0. Move it to one."
            )
        cell = rows[tick][path[part].stage]
        if twice := next((other for other in cell if other.kind == kind), None):
            raise InputError(
                f"In tick {tick} stage {path[part].stage} is to do {twice} and {task}, but a stage does at most one task of "
                f"each kind in a tick. Move one of them to another tick."
            )
        cell.append(task)
    order = lambda cell: tuple(sorted(cell, key=lambda task: KINDS.index(task.kind)))
    return Grid(tuple(tuple(order(cell) for cell in row) for row in rows), path, microbatches)
