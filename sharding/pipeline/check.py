"""Whether a grid can run: the first cell that breaks a rule, and why. No jax.

Each task stands once, where its part of the layers lies, after what it needs: a message takes until the next tick,
and within a tick a stage does F, B, W in this order. Ticks are fixed, so what would be a deadlock elsewhere is here a
task before what it waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sharding.errors import InputError
from sharding.pipeline.clocks import held
from sharding.pipeline.grid import KINDS, Grid, Kind, Place, Task, Work


@dataclass(frozen=True)
class Fault:
    """What is wrong, and in which cell; None where it is no cell's but the whole grid's."""

    tick: int | None
    stage: int | None
    task: Task | None
    says: str
    """One sentence or two, with the cell, the reason and what to change."""


def first_fault(grid: Grid, stages: int | None = None, stash: int | None = None) -> Fault | None:
    """The first fault of a grid, in the order of ticks, stages and kinds; None where it is sound.

    `stages`: as many must the grid have. `stash`: at most so many activations of a (micro-batch, chunk) may a stage
    keep, see `sharding.pipeline.clocks.stash`. Cells that are wrong by themselves come first, then those before what
    they need, then tasks that stand nowhere.
    """
    if says := _kinds(grid):
        return _whole(says)
    checks = (_path(grid, stages), _cells(grid), _order(grid), _missing(grid), _bound(grid, stash))
    return next((found for check in checks for found in check), None)


def require_sound(grid: Grid, source: str, stages: int | None = None, stash: int | None = None) -> None:
    """InputError where the grid has a fault. `source`: whose grid it is, such as "OneFOneB(microbatches=8) on 4 stages"."""
    if found := first_fault(grid, stages, stash):
        raise InputError(f"The grid of {source} cannot run. {found.says}")


def _whole(says: str) -> Fault:
    return Fault(None, None, None, says)


def _kinds(grid: Grid) -> str:
    """What of the grid is not of its type, which a user's own may not be; "" where all is."""
    whole: Callable[..., bool] = lambda *numbers: all(type(n) is int for n in numbers)
    if not whole(grid.microbatches):
        return f"Its microbatches are {grid.microbatches!r}, but they are a whole number. Change them."
    for at, place in enumerate(grid.path):
        if not isinstance(place, Place) or not whole(place.stage, place.chunk):
            return f"Place {at} of its path is {place!r}, but it is a Place of two whole numbers. Change it."
    for tick, row in enumerate(grid.cells):
        for stage, cell in enumerate(row):
            if not isinstance(cell, tuple):
                return f"The cell of tick {tick} and stage {stage} is {cell!r}, but it is a tuple of Task. Change it."
            for task in cell:
                if isinstance(task, Task) and not whole(task.microbatch, task.chunk):
                    return f"In tick {tick} stage {stage} does {task!r}, whose numbers are to be whole. Change it."
    return ""


def _path(grid: Grid, stages: int | None) -> Iterator[Fault]:
    """The parts of the layers: each at a place of its own, as many on every stage."""
    path = grid.path
    if not path or min((p.stage for p in path), default=0) < 0 or min(p.chunk for p in path) < 0:
        yield _whole(
            f"Its path is {_places(path)}, but a path has a place for each part of the layers, with a stage and a chunk of "
            f"0 or more. Give each part such a place."
        )
        return
    if twice := next((place for i, place in enumerate(path) if place in path[:i]), None):
        yield _whole(
            f"Two parts of the layers, {path.index(twice)} and {path.index(twice, path.index(twice) + 1)}, lie both on "
            f"stage {twice.stage} as its chunk {twice.chunk}. Give each a place of its own."
        )
    whole = (Place(stage, chunk) for stage in range(grid.stages) for chunk in range(grid.chunks))
    if lacks := next((place for place in whole if place not in grid.part), None):
        yield _whole(
            f"Its path has {grid.stages} stages and {grid.chunks} chunks on one of them, but no part of the layers is stage "
            f"{lacks.stage}'s chunk {lacks.chunk}. Every stage has the same number of chunks: give it that part, or the "
            f"others fewer."
        )
    if stages is not None and grid.stages != stages:
        yield _whole(
            f"{stages} stages were asked for, but its path has {grid.stages}. Make a grid of {stages} stages."
        )
    if grid.microbatches < 1:
        yield _whole(f"It is of {grid.microbatches} micro-batches, but a step has 1 or more. Change them.")


def _cells(grid: Grid) -> Iterator[Fault]:
    """Each cell by itself, and each task once."""
    seen: dict[tuple[int, Task], int] = {}
    for tick, row in enumerate(grid.cells):
        if len(row) != grid.stages:
            says = (
                f"Tick {tick} has {len(row)} cells, but the grid has {grid.stages} stages. Give it one cell a stage, "
                f"() where there is nothing to do."
            )
            yield Fault(tick, None, None, says)
            return
        for stage, cell in enumerate(row):
            kinds: dict[Kind, Task] = {}
            for task in cell:
                if says := _alone(grid, task, kinds, seen.get((stage, task))):
                    yield Fault(tick, stage, task, f"In tick {tick} stage {stage} does {says}")
                    return
                kinds[task.kind], seen[stage, task] = task, tick


def _alone(grid: Grid, task: Task, kinds: dict[Kind, Task], before: int | None) -> str:
    """What is wrong with a task in a cell that has these others already; `before`: the tick in which it has been done."""
    if not isinstance(task, Task):
        return f"{task!r}, but a cell is a tuple of Task. Change it."
    if says := _range(grid, task):
        return f"{task}, {says}"
    if other := kinds.get(task.kind):
        return (
            f"{other} and {task}, but a stage does at most one task of each kind in a tick. Move one of them to another "
            f"tick."
        )
    if before is not None:
        return f"{task}, which it has done in tick {before}. Each task stands once: leave one of them out."
    return ""


def _range(grid: Grid, task: Task) -> str:
    """What is wrong with a task wherever it stands."""
    if task.kind not in KINDS:
        return f"but {task.kind!r} is no kind of task. The kinds are {', '.join(KINDS)}."
    if not 0 <= task.microbatch < grid.microbatches:
        return f"but its micro-batches are 0 to {grid.microbatches - 1}. Leave it out, or give the grid more micro-batches."
    if not 0 <= task.chunk < grid.chunks:
        return f"but the chunks of a stage are 0 to {grid.chunks - 1}. Leave it out, or give the path that chunk."
    return ""


def _order(grid: Grid) -> Iterator[Fault]:
    """What each task needs is done before; within a tick by the same stage, earlier in the order F, B, W."""
    for tick, stage, task in grid.tasks():
        work = (task.kind, task.microbatch, grid.part[Place(stage, task.chunk)])
        for needed in grid.needs(work):
            there = grid.path[needed[2]].stage
            there_tick = grid.when.get(needed)
            near = there == stage and KINDS.index(needed[0]) < KINDS.index(task.kind)
            if there_tick is not None and (there_tick < tick or (near and there_tick == tick)):
                continue
            yield Fault(
                tick, stage, task, _early(tick, stage, task, _task(grid, needed), there, there_tick, near)
            )


def _early(
    tick: int, stage: int, task: Task, needed: Task, there: int, there_tick: int | None, near: bool
) -> str:
    """A task before what it waits for: both cells, and what to change."""
    whose = f"{needed} of stage {there}" if there != stage else f"its own {needed}"
    waits = f"In tick {tick} stage {stage} does {task}, which waits for {whose}"
    if there_tick is None:
        return (
            f"{waits}, but that stands in no tick. Put it into {'this tick or ' if near else ''}one before."
        )
    why = (
        f"that stands in tick {there_tick} of stage {there}, which comes later: {task} would wait for ever"
        if there_tick > tick
        else f"that stands in the same tick of stage {there}, and a message takes until the next"
    )
    return (
        f"{waits}, but {why}. Move {task} to tick {there_tick + (not near)} or later, or {whose} before it."
    )


def _missing(grid: Grid) -> Iterator[Fault]:
    """Tasks that stand nowhere: F and B of everything, W of everything or of nothing."""
    for m in range(grid.microbatches):
        for part, place in enumerate(grid.path):
            for kind in KINDS if grid.splits else KINDS[:2]:
                if (kind, m, part) in grid.when:
                    continue
                task = _task(grid, (kind, m, part))
                rest = "; it has W of others, and has them of all or of none" if kind == "W" else ""
                says = f"{task} of stage {place.stage} stands in no tick{rest}. Put it into one."
                yield Fault(None, place.stage, task, says)


def _bound(grid: Grid, stash: int | None) -> Iterator[Fault]:
    """The first cell after whose F a stage keeps more than it may."""
    for tick, row in enumerate(held(grid) if stash is not None else ()):
        for stage, kept in enumerate(row):
            if stash is not None and kept > stash:
                task = next((task for task in grid.cells[tick][stage] if task.kind == "F"), None)
                says = (
                    f"In tick {tick} stage {stage} keeps the activations of {kept} micro-batches' chunks, more than the "
                    f"{stash} that it may. Move {task or 'an F'} to a later tick, or what uses kept ones to an earlier one."
                )
                yield Fault(tick, stage, task, says)


def _task(grid: Grid, work: Work) -> Task:
    return Task(work[0], work[1], grid.path[work[2]].chunk)


def _places(path: tuple[Place, ...]) -> str:
    return ", ".join(f"stage {p.stage} chunk {p.chunk}" for p in path[:8]) + (
        ", ..." if len(path) > 8 else ""
    )
