"""Pipeline schedules: each grid is sound and costs, keeps and sends what its paper says; a broken one is told by its cell.

`Machine` states the rules anew, by carrying out a grid with tokens in place of arrays: the checker is held against it.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.schedules.named import class_of, find, known, parse_schedule
from sharding.errors import InputError
from sharding.pipeline.check import first_fault, require_sound
from sharding.pipeline.clocks import (
    Clock,
    Costs,
    Messages,
    Span,
    held,
    independent,
    lockstep,
    messages,
    stash,
)
from sharding.pipeline.grid import Grid, Kind, Place, Schedule, Task, Work, looped, placed
from sharding.schedules.gpipe import GPipe
from sharding.schedules.interleaved import Interleaved
from sharding.schedules.one_f_one_b import OneFOneB
from sharding.schedules.zbv import ZBV
from sharding.schedules.zero_bubble import ZeroBubble
from tests.support import ROOT

FILES = sorted(p for p in (ROOT / "sharding/schedules").glob("*.py") if p.stem != "__init__")
SOURCE = re.compile(r"arXiv:\d{4}\.\d{5}")
KINDS: tuple[Kind, ...] = ("F", "B", "W")
ONES = Costs(1.0, 1.0, 1.0)


def made(path: Path, stages: int, microbatches: int, chunks: int) -> Schedule:
    """The schedule of a file with these numbers, as far as it has them; micro-batches as many as it takes or more."""
    kind = find(path.stem)
    own = {f.name for f in fields(kind)}  # pyright: ignore[reportArgumentType]
    given = {"microbatches": microbatches} | ({"chunks": chunks} if "chunks" in own else {})
    schedule = kind(**given)
    try:
        schedule.grid(stages)
    except InputError:
        schedule = kind(**given | {"microbatches": -(-microbatches // stages) * stages})
    return schedule


# What every file promises.


def test_every_file_holds_one_schedule_with_its_source_and_a_name_of_its_own() -> None:
    assert len(FILES) >= 6
    assert len(known()) == len(FILES)
    for path in FILES:
        kind = find(path.stem)
        assert SOURCE.search(path.read_text(encoding="utf-8")), path
        assert isinstance(kind(), Schedule)
        assert hash(kind()) == hash(kind())
        assert find(kind.__name__) is kind


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@given(stages=st.integers(1, 7), microbatches=st.integers(1, 12), chunks=st.integers(1, 4))
@settings(max_examples=40)
def test_every_file_gives_sound_grids_that_no_clock_finds_too_short(
    path: Path, stages: int, microbatches: int, chunks: int
) -> None:
    schedule = made(path, stages, microbatches, chunks)
    grid = schedule.grid(stages)
    assert grid.stages == stages
    assert grid.microbatches == schedule.microbatches
    require_sound(grid, path.stem, stages)
    assert Machine(grid).wrong() is None
    both = lockstep(grid, ONES), independent(grid, ONES)
    assert both[1].makespan <= both[0].makespan + 1e-9
    for clock in both:
        check_clock(grid, clock, ONES)
        assert -1e-9 <= clock.bubble < 1


def check_clock(grid: Grid, clock: Clock, costs: Costs, message: float = 0.0) -> None:
    """No stage does two things at once, nothing begins before what it needs has come, every task takes its time."""
    ends: dict[Work, Span] = {
        (s.task.kind, s.task.microbatch, grid.part[Place(s.stage, s.task.chunk)]): s for s in clock.spans
    }
    assert len(ends) == len(clock.spans) == sum(1 for _ in grid.tasks())
    for stage in range(grid.stages):
        mine = sorted((s.start, s.end) for s in clock.spans if s.stage == stage)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in itertools.pairwise(mine))
        assert sum(end - start for start, end in mine) == pytest.approx(grid.microbatches * costs.total)
    for work, span in ends.items():
        for needed in grid.needs(work):
            delay = message if ends[needed].stage != span.stage else 0.0
            assert ends[needed].end + delay <= span.start + 1e-9


# What the papers say.


@dataclass(frozen=True)
class Closed:
    """Closed forms of S stages, M micro-batches, v chunks: idle time by both clocks, stash of stage s (None: there is none for
    these numbers), messages of a micro-batch one way.
    """

    lockstep: Callable[[int, int, Costs], float]
    independent: Callable[[int, int, Costs], float]
    stash: Callable[[int, int, int, int], int | None]
    hops: Callable[[int, int], int]


both = lambda c: c.forward + c.inputs + c.weights
late = lambda c: c.forward + c.inputs
loop = lambda S, v: v * S - 1 if S > 1 else 0
CLOSED = {
    # Huang et al. 2019, 2.3.
    "gpipe": Closed(lambda S, v, c: (S - 1) * both(c), lambda S, v, c: (S - 1) * both(c), lambda S, M, v, s: M, loop),
    # Narayanan et al. 2021 (PipeDream-Flush), with as many again on their way as lockstep has in flight.
    "one_f_one_b": Closed(
        lambda S, v, c: (S - 1) * both(c), lambda S, v, c: (S - 1) * both(c),
        lambda S, M, v, s: min(2 * (S - s) - 1, M), loop,
    ),
    # Narayanan et al. 2021, 2.2; the stash is Megatron-LM's warm-up, 2(S - s - 1) + (v - 1)S, and one.
    "interleaved": Closed(
        lambda S, v, c: (S - 1) * both(c) / v, lambda S, v, c: (S - 1) * both(c) / v,
        lambda S, M, v, s: min(2 * (S - s - 1) + (v - 1) * S + 1, M * v), loop,
    ),
    # Lamy-Poirier 2022, for M >= S.
    "breadth_first": Closed(
        lambda S, v, c: (S - 1) * both(c) / v, lambda S, v, c: (S - 1) * both(c) / v, lambda S, M, v, s: M * v, loop
    ),
    # Qi et al. 2023: (p - 1)(F + B - W) where the stages are independent.
    "zero_bubble": Closed(
        lambda S, v, c: (S - 1) * late(c), lambda S, v, c: (S - 1) * (late(c) - c.weights),
        lambda S, M, v, s: min(2 * S - 1 - s, M), loop,
    ),
    # The placement of Qi et al. 2024 in uniform slots; two of every 2S hops stay on a stage.
    "zbv": Closed(
        lambda S, v, c: (S - 1) * late(c), lambda S, v, c: (S - 1) * (late(c) - c.weights) / 2,
        lambda S, M, v, s: 3 * S - 1 if M >= 2 * S else min(2 * M, 2 * S) if M <= S else None, lambda S, v: 2 * S - 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("stem", CLOSED)
@given(
    stages=st.integers(1, 6),
    more=st.integers(0, 10),
    chunks=st.integers(1, 4),
    costs=st.tuples(*[st.integers(1, 8)] * 3),
)
@settings(max_examples=60)
def test_bubble_stash_and_messages_are_the_papers(
    stem: str, stages: int, more: int, chunks: int, costs: tuple[int, int, int]
) -> None:
    schedule = made(ROOT / f"sharding/schedules/{stem}.py", stages, stages + more, chunks)
    grid, S, M, closed = schedule.grid(stages), stages, schedule.microbatches, CLOSED[stem]
    v, priced = grid.chunks, Costs(*map(float, costs))
    work = M * priced.total
    assert lockstep(grid, priced).makespan == pytest.approx(work + closed.lockstep(S, v, priced))
    assert lockstep(grid, priced).bubble == pytest.approx(1 - work / (work + closed.lockstep(S, v, priced)))
    one = independent(grid, ONES)
    assert one.makespan == pytest.approx(3 * M + closed.independent(S, v, ONES))
    if not grid.splits:  # for any costs: lockstep loses nothing
        assert independent(grid, priced).makespan == pytest.approx(lockstep(grid, priced).makespan)
    assert all(kept == (closed.stash(S, M, v, s) or kept) for s, kept in enumerate(stash(grid)))
    assert messages(grid) == Messages(M * closed.hops(S, v), M * closed.hops(S, v))


def test_each_file_of_the_house_has_closed_forms() -> None:
    assert set(CLOSED) == {path.stem for path in FILES}


@given(stages=st.integers(1, 8), microbatches=st.integers(1, 20), costs=st.tuples(*[st.integers(1, 9)] * 3))
def test_1f1b_in_lockstep_costs_what_independent_stages_do(
    stages: int, microbatches: int, costs: tuple[int, int, int]
) -> None:
    grid, priced = OneFOneB(microbatches).grid(stages), Costs(*map(float, costs))
    expected = (microbatches + stages - 1) * sum(costs)
    assert lockstep(grid, priced).makespan == expected == independent(grid, priced).makespan
    assert lockstep(grid, priced).bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
    assert max(stash(grid)) == min(2 * stages - 1, microbatches)


def test_zb_h1_keeps_at_most_what_1f1b_does_and_its_bubble_is_a_third() -> None:
    for stages in (2, 4, 8):
        for F, B, W in (
            (3.0, 2.0, 1.0),
            (4.0, 4.0, 2.0),
            (1.0, 1.0, 1.0),
            (5.0, 1.0, 0.0),
        ):  # W <= B <= F, as in the paper
            priced = Costs(F, B, W)
            idle = independent(ZeroBubble(16).grid(stages), priced).makespan - 16 * priced.total
            assert idle == pytest.approx((stages - 1) * (F + B - W))
        late, plain = ZeroBubble(32).grid(stages), OneFOneB(32).grid(stages)
        assert max(stash(late)) == max(stash(plain))
        idle = [independent(g, ONES).makespan - 96 for g in (late, plain)]
        assert idle[0] * 3 == idle[1]


def test_a_message_delays_independent_stages_alone() -> None:
    grid = OneFOneB(8).grid(4)
    slow = independent(grid, ONES, message=0.5)
    check_clock(grid, slow, ONES, message=0.5)
    # S - 1 messages there and S - 1 back stand in the way of the first micro-batch; the others hide behind work or not.
    assert slow.makespan >= independent(grid, ONES).makespan + 2 * 3 * 0.5
    assert independent(GPipe(1).grid(4), ONES, message=0.5).makespan == 12 + 6 * 0.5


def test_costs_without_w_are_the_same_work() -> None:
    priced = Costs(1.0, 1.25, 0.75)
    for grid in (OneFOneB(4).grid(2), ZeroBubble(4).grid(2), ZBV(4).grid(2)):
        assert lockstep(grid, priced).work == 12.0
        assert sum(s.end - s.start for s in lockstep(grid, priced).spans) == pytest.approx(24.0)


@pytest.mark.parametrize("costs", [(-1, 1, 1), (1, float("nan"), 1), (1, 1, float("inf")), (0, 0, 0)])
def test_costs_that_are_none_are_refused(costs: tuple[float, float, float]) -> None:
    with pytest.raises(InputError, match="cost"):
        Costs(*costs)
    with pytest.raises(InputError, match="message"):
        independent(OneFOneB(2).grid(2), ONES, message=-1.0)


def test_what_is_held_is_counted_by_hand() -> None:
    assert held(OneFOneB(3).grid(2)) == ((1, 0), (2, 1), (3, 1), (2, 1), (1, 0))
    assert held(GPipe(2).grid(1)) == ((1,), (2,), (2,), (1,))
    assert held(ZeroBubble(2).grid(2)) == ((1, 0), (2, 1), (2, 2), (1, 1))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_numbers_that_do_not_fit_are_refused(path: Path) -> None:
    kind = find(path.stem)
    for field in fields(kind):  # pyright: ignore[reportArgumentType]
        for value in (0, -1, 2.0, True, None):
            with pytest.raises(InputError, match=rf"{kind.__name__} has {field.name}=.*1 or more"):
                kind(**{field.name: value})
    for stages in (0, -2):
        with pytest.raises(InputError, match="stages"):
            kind().grid(stages)


def test_interleaved_needs_a_multiple_of_the_stages() -> None:
    with pytest.raises(InputError, match=r"6 micro-batches are no multiple of 4 stages\. Take 8"):
        Interleaved(6).grid(4)


# The checker against a machine.


class Machine:
    """Carries a grid out with tokens: a task takes what it needs from its stage and leaves what it makes where that is used.

    What a stage makes for itself is there at once, what it sends in the next tick.
    """

    def __init__(self, grid: Grid):
        self.grid, self.has = grid, [set() for _ in range(grid.stages)]
        for m in range(grid.microbatches):
            self.has[grid.path[0].stage].add(("activation", m, 0))

    def wrong(self) -> tuple[int, int, str] | str | None:
        """None where the grid is right, (tick, stage, task) where a task cannot be done, or what is wrong with the whole."""
        grid, done = self.grid, set[tuple[str, int, int]]()
        for tick, row in enumerate(grid.cells):
            if len(row) != grid.stages:
                return f"width of {tick}"
            sent: list[tuple[int, tuple[str, int, int]]] = []
            for stage, cell in enumerate(row):
                if len({task.kind for task in cell}) < len(cell):
                    return f"two of a kind in {tick}"
                for task in [t for kind in KINDS for t in cell if t.kind == kind]:
                    parts = [p for p, place in enumerate(grid.path) if place == Place(stage, task.chunk)]
                    if len(parts) != 1 or not 0 <= task.microbatch < grid.microbatches:
                        return f"no such task in {tick}"
                    if (task.kind, task.microbatch, parts[0]) in done:
                        return f"twice in {tick}"
                    if not self._does(task.kind, task.microbatch, parts[0], stage, sent):
                        return tick, stage, str(task)
                    done.add((task.kind, task.microbatch, parts[0]))
            for stage, token in sent:
                self.has[stage].add(token)
        kinds = {kind for kind, _, _ in done} | {"F", "B"}
        every = {(k, m, p) for k in kinds for m in range(grid.microbatches) for p in range(len(grid.path))}
        return None if done == every else "missing"

    def _does(self, kind: str, m: int, p: int, stage: int, sent: list) -> bool:
        """One task; False where something that it takes is not there."""
        last = len(self.grid.path) - 1
        takes, makes = {
            "F": ([("activation", m, p)], [("kept", m, p), ("activation", m, p + 1) if p < last else ("gradient", m, p)]),
            "B": ([("kept", m, p), ("gradient", m, p)], [("for W", m, p), ("gradient", m, p - 1)]),
            "W": ([("for W", m, p)], []),
        }[kind]  # fmt: skip
        if not self.has[stage].issuperset(takes):
            return False
        for token in makes:
            there = self.grid.path[max(token[2], 0)].stage
            if token[0] in ("kept", "for W") or there == stage:
                self.has[stage].add(token)
            else:
                sent.append((there, token))
        return True


Mutation = Callable[[list[list[list[Task]]], random.Random], None]
"""Changes cells[tick][stage] in place."""


def _pick(cells: list[list[list[Task]]], rng: random.Random) -> tuple[list[Task], Task]:
    cell = rng.choice([cell for row in cells for cell in row if cell])
    return cell, rng.choice(cell)


def move(cells: list[list[list[Task]]], rng: random.Random) -> None:
    """A task to another tick of its stage, most often a near one."""
    at = rng.choice([(t, s) for t, row in enumerate(cells) for s, cell in enumerate(row) if cell])
    task = rng.choice(cells[at[0]][at[1]])
    cells[at[0]][at[1]].remove(task)
    near = [t for t in range(at[0] - 2, at[0] + 3) if 0 <= t < len(cells)]
    cells[rng.choice(near if rng.random() < 0.7 else range(len(cells)))][at[1]].append(task)


def drop(cells: list[list[list[Task]]], rng: random.Random) -> None:
    """A task."""
    cell, task = _pick(cells, rng)
    cell.remove(task)


def double(cells: list[list[list[Task]]], rng: random.Random) -> None:
    """A task, once more somewhere."""
    _, task = _pick(cells, rng)
    rng.choice(rng.choice(cells)).append(task)


def swap(cells: list[list[list[Task]]], rng: random.Random) -> None:
    """Two tasks, anywhere."""
    (one, a), (other, b) = _pick(cells, rng), _pick(cells, rng)
    one[one.index(a)], other[other.index(b)] = b, a


def _other(task: Task, rng: random.Random) -> Task:
    """A task near this one, perhaps none that there is."""
    near: list[dict[str, Any]] = [{"microbatch": task.microbatch + d} for d in (-1, 1)]
    near += [{"chunk": task.chunk + d} for d in (-1, 1)]
    return replace(task, **rng.choice([*near, {"kind": rng.choice(KINDS)}]))


def alter(cells: list[list[list[Task]]], rng: random.Random) -> None:
    """A task into another one."""
    cell, task = _pick(cells, rng)
    cell[cell.index(task)] = _other(task, rng)


def add(cells: list[list[list[Task]]], rng: random.Random) -> None:
    """Another task, to a cell of its stage."""
    stage, task = rng.choice([(s, task) for row in cells for s, cell in enumerate(row) for task in cell])
    rng.choice([row for row in cells if len(row) > stage])[stage].append(_other(task, rng))


def widen(cells: list[list[list[Task]]], rng: random.Random) -> None:
    """A tick of one cell more."""
    rng.choice(cells).append([])


def pause(cells: list[list[list[Task]]], rng: random.Random) -> None:
    """An empty tick: all that comes after is later, which breaks nothing."""
    cells.insert(rng.randrange(len(cells) + 1), [[] for _ in cells[0]])


def shuffle(cells: list[list[list[Task]]], rng: random.Random) -> None:
    """The order within a cell, which says nothing."""
    rng.shuffle(_pick(cells, rng)[0])


def unsplit(cells: list[list[list[Task]]], rng: random.Random) -> None:
    """All W but some, or all."""
    keeps = rng.random() < 0.5
    for row in cells:
        for cell in row:
            cell[:] = [task for task in cell if task.kind != "W" or (keeps and rng.random() < 0.9)]


MUTATIONS: tuple[Mutation, ...] = (
    move,
    move,
    drop,
    double,
    swap,
    alter,
    add,
    add,
    widen,
    pause,
    shuffle,
    unsplit,
)


def mutant(grid: Grid, mutations: list[Mutation], rng: random.Random) -> Grid:
    cells = [[list(cell) for cell in row] for row in grid.cells]
    for mutation in mutations:
        if any(cell for row in cells for cell in row):
            mutation(cells, rng)
    return replace(grid, cells=tuple(tuple(tuple(cell) for cell in row) for row in cells))


@given(
    path=st.sampled_from(FILES),
    stages=st.integers(1, 4),
    microbatches=st.integers(1, 5),
    mutations=st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=1500)
def test_the_checker_refuses_what_the_machine_cannot_carry_out_and_nothing_else(
    path: Path, stages: int, microbatches: int, mutations: list[Mutation], seed: int
) -> None:
    sound = made(path, stages, microbatches, 2).grid(stages)
    grid = mutant(sound, mutations, random.Random(seed))
    wrong, fault = Machine(grid).wrong(), first_fault(grid)
    assert (fault is None) == (wrong is None), (wrong, fault)
    if isinstance(wrong, tuple) and fault is not None and "waits for" in fault.says:
        assert (fault.tick, fault.stage, str(fault.task)) == wrong
    if fault is None:
        assert independent(grid, ONES).makespan <= lockstep(grid, ONES).makespan + 1e-9


def test_every_move_of_a_task_is_judged_as_the_machine_does() -> None:
    sound = ZeroBubble(3).grid(3)
    counted = {True: 0, False: 0}
    for tick, stage, task in sound.tasks():
        for to in range(sound.ticks + 1):
            cells = [[list(cell) for cell in row] for row in (*sound.cells, ((),) * 3)]
            cells[tick][stage].remove(task)
            cells[to][stage].append(task)
            grid = replace(sound, cells=tuple(tuple(map(tuple, row)) for row in cells))
            right = Machine(grid).wrong() is None
            assert (first_fault(grid) is None) == right, (task, stage, tick, to)
            counted[right] += 1
    assert min(counted.values()) >= 40, counted


# What it says.

F0, B0, W0 = Task("F", 0), Task("B", 0), Task("W", 0)
TWO = looped(2)
GOOD = ((((F0,), ()), ((), (F0, B0)), ((B0,), ())), TWO, 1)
SAYS = {
    "early": ((((F0,), (F0,)), ((), (B0,)), ((B0,), ())), TWO, 1,
              "In tick 0 stage 1 does F0, which waits for F0 of stage 0, but that stands in the same tick of stage 0, and a "
              "message takes until the next. Move F0 to tick 1 or later"),
    "deadlock": ((((), (F0,)), ((F0,), (B0,)), ((B0,), ())), TWO, 1,
                 "waits for F0 of stage 0, but that stands in tick 1 of stage 0, which comes later: F0 would wait for ever. "
                 "Move F0 to tick 2 or later"),
    "gradient": ((((F0,), ()), ((B0,), (F0,)), ((), (B0,))), TWO, 1,
                 "In tick 1 stage 0 does B0, which waits for B0 of stage 1, but that stands in tick 2"),
    "own": ((((F0,), (B0,)), ((), (F0,)), ((B0,), ())), TWO, 1, "In tick 0 stage 1 does B0, which waits for its own F0"),
    "weights": ((((F0,), ()), ((), (F0, B0, W0)), ((W0,), ()), ((B0,), ())), TWO, 1,
                "In tick 2 stage 0 does W0, which waits for its own B0, but that stands in tick 3"),
    "nowhere": ((((), ()), ((), (F0, B0)), ((), ())), TWO, 1, "waits for F0 of stage 0, but that stands in no tick"),
    "missing": ((((F0,), ()), ((), (F0, B0))), TWO, 1, "B0 of stage 0 stands in no tick"),
    "some W": ((((F0,), ()), ((), (F0, B0, W0)), ((B0,), ())), TWO, 1, "W0 of stage 0 stands in no tick; it has W of others"),
    "twice": ((((F0,), ()), ((F0,), (F0, B0)), ((B0,), ())), TWO, 1, "stage 0 does F0, which it has done in tick 0"),
    "two Fs": ((((F0, Task("F", 1)), ()), ((), (F0, B0)), ((B0,), ())), TWO, 2, "does F0 and F1, but a stage does at most one"),
    "micro-batch": ((((F0, Task("B", 1)), ()), ((), (F0, B0)), ((B0,), ())), TWO, 1, "B1, but its micro-batches are 0 to 0"),
    "below": ((((F0,), ()), ((Task("F", -1),), (F0, B0)), ((B0,), ())), TWO, 1, "F-1, but its micro-batches are 0 to 0"),
    "chunk": ((((Task("F", 0, 1),), ()), ((), (F0, B0))), TWO, 1, "does F0.1, but the chunks of a stage are 0 to 0"),
    "kind": ((((Task("X", 0),), ()),), TWO, 1, "'X' is no kind of task"),  # pyright: ignore[reportArgumentType]
    "no task": (((("F0",), ()),), TWO, 1, "does 'F0', but a cell is a tuple of Task"),
    "width": ((((F0,), (), ()), ((), (F0, B0))), TWO, 1, "Tick 0 has 3 cells, but the grid has 2 stages"),
    "no path": ((), (), 1, "Its path is"),
    "negative": ((), (Place(0), Place(-1)), 1, "stage and a chunk of 0 or more"),
    "one place": ((), (Place(0), Place(1), Place(0)), 1, "Two parts of the layers, 0 and 2, lie both on stage 0"),
    "hole": ((), (Place(0), Place(1), Place(1, 1)), 1, "no part of the layers is stage 0's chunk 1"),
    "none": ((), TWO, 0, "It is of 0 micro-batches"),
}  # fmt: skip


@pytest.mark.parametrize("what", SAYS)
def test_a_planted_fault_is_told_with_its_cell(what: str) -> None:
    cells, path, microbatches, words = SAYS[what]
    with pytest.raises(InputError) as error:
        require_sound(Grid(cells, path, microbatches), "mine on 2 stages")  # pyright: ignore[reportArgumentType]
    assert str(error.value).startswith("The grid of mine on 2 stages cannot run. ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_right_is_let_be() -> None:
    require_sound(Grid(*GOOD), "good")
    with pytest.raises(InputError, match="3 stages were asked for, but its path has 2"):
        require_sound(Grid(*GOOD), "good", stages=3)


def test_a_bound_on_the_stash_is_told_by_the_first_cell_above_it() -> None:
    grid = OneFOneB(8).grid(4)
    require_sound(grid, "1f1b", stash=7)
    fault = first_fault(grid, stash=6)
    assert fault is not None
    assert (fault.tick, fault.stage, str(fault.task)) == (6, 0, "F6")
    assert "keeps the activations of 7 micro-batches' chunks, more than the 6" in fault.says


def test_a_clock_refuses_what_stands_before_what_it_needs() -> None:
    cells, path, microbatches, _ = SAYS["deadlock"]
    with pytest.raises(
        InputError, match="F0 of stage 1 stands in the grid before what it needs, F0 of part 0"
    ):
        independent(Grid(cells, path, microbatches), ONES)  # pyright: ignore[reportArgumentType]


def test_placed_refuses_two_of_a_kind_and_a_time_before_the_first() -> None:
    with pytest.raises(InputError, match="In tick 0 stage 0 is to do F0 and F1"):
        placed({("F", 0, 0): 0, ("F", 1, 0): 0}, looped(1), 2)
    with pytest.raises(InputError, match="'f' is no kind of task"):
        placed({("f", 0, 0): 0}, looped(1), 1)
    with pytest.raises(InputError, match="F0 in tick -1, but ticks are counted from 0"):
        placed({("F", 0, 0): -1, ("B", 0, 0): 1}, looped(1), 1)


def test_a_file_with_no_schedule_or_two_is_refused() -> None:
    module = __import__("sharding.schedules.gpipe", fromlist=["gpipe"])
    assert class_of(module, Path("gpipe.py")) is GPipe
    with pytest.raises(InputError, match=r"grid.py is no frozen dataclass"):
        class_of(__import__("sharding.pipeline.grid", fromlist=["grid"]), Path("grid.py"))


def test_expressions_are_parsed_alone() -> None:
    assert parse_schedule("") is None is parse_schedule("none")
    for text in ("OneFOneB(microbatches=16)", "1f1b(16)", "one_f_one_b( microbatches = 16, )"):
        assert parse_schedule(text) == OneFOneB(16)
