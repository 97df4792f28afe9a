"""A grid as tables of integers for one program: what each stage does in each tick, and in which slot of which buffer it lies.

Lockstep of uniform slots: in a tick every device runs every kind of task that any stage does in it, on what it has to do or,
masked, on whatever lies there. Ticks with the same slots, one after another, are one loop; so no branch differs between
devices, and the program grows neither with micro-batches nor with ticks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from sharding.pipeline.grid import KINDS, Grid, Kind, Place

Slot = Literal["enter", "F", "loss", "B", "W", "entered"]
SLOTS: tuple[Slot, ...] = ("enter", "F", "loss", "B", "W", "entered")
"""What stands in a tick, in this order. enter: what comes before the layers, for the stage that has the first part. loss:
what comes after them, forward and backward, when the stage with the last part begins its backward. entered: the backward of
enter."""


@dataclass(frozen=True)
class Block:
    """Ticks that are run as loops: `repeats` times each of `runs` in turn, (slots, ticks)."""

    repeats: int
    runs: tuple[tuple[tuple[Slot, ...], int], ...]
    first: int
    """The tick with which it begins."""

    @property
    def ticks(self) -> int:
        """Ticks of one repeat."""
        return sum(ticks for _, ticks in self.runs)


@dataclass(frozen=True)
class Tables:
    """What the executor reads. Arrays are int32 [tick, stage]; a slot of a buffer is a number from 0."""

    grid: Grid
    blocks: tuple[Block, ...]
    rows: Mapping[str, np.ndarray]
    sizes: Mapping[str, int]
    """Slots of each buffer on a device: residuals, kept (of both backward tasks), cotangents (from B to W), inbox, outbox
    (gradients), last (the last part's results until their loss)."""
    shifts: Mapping[str, tuple[int, ...]]
    """How many stages on a message goes: "F" activations, "B" gradients."""


def useful(grid: Grid) -> dict[str, float]:
    """slot -> part of the times that a device does it in a step that are not in vain."""
    ticks = Counter(slot for each in _signatures(grid) for slot in each)
    done = {s: grid.microbatches * (grid.chunks if s in KINDS else 1) for s in SLOTS}
    return {slot: n / ticks[slot] for slot, n in done.items() if slot in ticks}


def tables(grid: Grid) -> Tables:
    """The tables of a grid that is sound."""
    made = _Maker(grid)
    made.work()
    made.messages()
    return Tables(grid, _blocks(_signatures(grid)), made.rows, made.sizes, made.shifts)


class _Maker:
    def __init__(self, grid: Grid):
        self.grid, self.when = grid, grid.when
        self.rows: dict[str, np.ndarray] = {}
        self.sizes: dict[str, int] = {}
        self.shifts: dict[str, tuple[int, ...]] = {}
        self.parts, self.last = len(grid.path), len(grid.path) - 1

    def row(self, name: str) -> np.ndarray:
        """The table of this name."""
        return self.rows.setdefault(name, np.zeros((self.grid.ticks, self.grid.stages), np.int32))

    def work(self) -> None:
        """Who does what, and where what a task leaves for a later one lies."""
        for tick, stage, task in self.grid.tasks():
            kind = task.kind
            part = self.grid.part[Place(stage, task.chunk)]
            for column, value in (("on", 1), ("microbatch", task.microbatch), ("chunk", task.chunk),
                                  ("first", part == 0), ("last", part == self.last)):  # fmt: skip
                self.row(f"{kind}.{column}")[tick, stage] = value
        for kind in ("F", "B", "W"):
            for column in ("on", "microbatch", "chunk", "first", "last"):
                self.row(f"{kind}.{column}")
        for slot, kind, part in _of_all(self.grid):
            for m in range(self.grid.microbatches):
                self.row(f"{slot}.microbatch")[self.when[kind, m, part], :] = m
        every = [(m, p) for m in range(self.grid.microbatches) for p in range(self.parts)]
        self.buffer("residuals", "F", "B", every)
        if self.grid.splits:
            self.buffer("kept", "F", "W", every)
            self.buffer("cotangents", "B", "W", every)
        self.buffer("last", "F", "B", [(m, self.last) for m, p in every if p == self.last])

    def buffer(self, name: str, written: Kind, read: Kind, items: Iterable[tuple[int, int]]) -> None:
        """A slot for each (micro-batch, part) from the tick of one task to that of another, both included."""
        spans = {
            (m, p): (self.grid.path[p].stage, self.when[written, m, p], self.when[read, m, p] + 1)
            for m, p in items
        }
        slots, self.sizes[name] = self._allot(spans, name, written)
        for (m, p), slot in slots.items():
            stage, begin, end = spans[m, p]
            self.row(f"{name}.write")[begin, stage] = slot
            self.row(f"{name}.read")[end - 1, stage] = slot
            if name == "kept":
                self.row("kept.early")[self.when["B", m, p], stage] = slot

    def messages(self) -> None:
        """Which stage sends to which, and where an arrival waits for the task that reads it."""
        ways: tuple[tuple[Kind, int, str], ...] = (("F", 1, "inbox"), ("B", -1, "outbox"))
        for kind, step, name in ways:
            spans, by = {}, {}
            for m in range(self.grid.microbatches):
                for p in range(self.parts):
                    if not 0 <= p + step < self.parts:
                        continue
                    here, there = self.grid.path[p].stage, self.grid.path[p + step].stage
                    by[m, p + step] = (there - here) % self.grid.stages
                    # It lies there from the end of the tick that sends it to the slot of the tick that reads it.
                    spans[m, p + step] = (there, self.when[kind, m, p], self.when[kind, m, p + step])
            self.shifts[kind] = tuple(sorted(set(by.values())))
            slots, self.sizes[name] = self._allot(spans, name, "")
            for shift in self.shifts[kind]:
                self.row(f"{name}.arrives{shift}")
            for (m, p), slot in slots.items():
                stage, sent, read = spans[m, p]
                self.row(f"{name}.read")[read, stage] = slot
                self.row(f"{name}.arrives{by[m, p]}")[sent, stage] = slot + 1  # 0: nothing arrives
            self.row(f"{name}.read")

    def _allot(
        self, spans: Mapping[tuple[int, int], tuple[int, int, int]], name: str, kind: str
    ) -> tuple[dict[tuple[int, int], int], int]:
        """item -> slot, and how many slots there are: as many as lie there at once (an interval graph is coloured greedily).

        A device that has nothing to do in a slot writes too: where nothing lies then, or in a slot of its own.
        """
        free_at: dict[int, list[int]] = {stage: [] for stage in range(self.grid.stages)}
        slots: dict[tuple[int, int], int] = {}
        for item, (stage, begin, end) in sorted(spans.items(), key=lambda x: (x[1][1], x[1][2], x[0])):
            ends = free_at[stage]
            slot = next((i for i, until in enumerate(ends) if until <= begin), len(ends))
            ends[slot : slot + 1] = [end]
            slots[item] = slot
        size = max(1, *(len(ends) for ends in free_at.values()))
        if not kind:
            return slots, size
        table = self.row(f"{name}.write")
        self.row(f"{name}.read")
        held = np.zeros((self.grid.ticks, self.grid.stages, size), bool)
        for item, (stage, begin, end) in spans.items():
            held[begin:end, stage, slots[item]] = True
        written = {(stage, begin) for stage, begin, _ in spans.values()}
        spare = size
        for tick in range(self.grid.ticks):
            if not self.rows[f"{kind}.on"][tick].any():
                continue
            for stage in range(self.grid.stages):
                if (stage, tick) in written:
                    continue
                free = np.flatnonzero(~held[tick, stage])
                table[tick, stage] = free[0] if len(free) else spare
                size = size if len(free) else spare + 1
        return slots, size


def _of_all(grid: Grid) -> tuple[tuple[Slot, Kind, int], ...]:
    """Slots that belong to all stages: each stands with this kind of task for this part of the layers."""
    return ("enter", "F", 0), ("loss", "B", len(grid.path) - 1), ("entered", "B", 0)


def _signatures(grid: Grid) -> list[tuple[Slot, ...]]:
    """The slots of each tick: of the ways to lay those of all stages, that with the fewest loops, then with the fewest slots.

    Each loop compiles the layers once more, so these stand up to three times as often as they must for the sake of fewer.
    """
    tasks: list[frozenset[Slot]] = [
        frozenset(task.kind for cell in row for task in cell) for row in grid.cells
    ]
    exact = [set(each) for each in tasks]
    for slot, kind, part in _of_all(grid):
        for m in range(grid.microbatches):
            exact[grid.when[kind, m, part]].add(slot)
    free: dict[Slot, Kind] = {"enter": "F", "entered": "B"}
    core = [frozenset(each - free.keys()) for each in exact]
    by_group: list[set[Slot]] = [set(each) for each in exact]
    everywhere: list[set[Slot]] = [set(each) for each in exact]
    for ticks in _groups(core):
        every: set[Slot] = set().union(*(exact[t] for t in ticks))
        for t in ticks:
            by_group[t] |= every & free.keys()
    for slot, kind in free.items():
        for t, each in enumerate(tasks):
            if kind in each:
                everywhere[t].add(slot)
    most = 3 * grid.microbatches
    ways = [
        way
        for way in (by_group, everywhere)
        if all(sum(slot in each for each in way) <= most for slot in free)
    ]
    in_order: Callable[[set[Slot]], tuple[Slot, ...]] = lambda each: tuple(s for s in SLOTS if s in each)
    laid = [[in_order(each) for each in way] for way in (exact, *ways)]
    return min(laid, key=lambda way: (sum(len(b.runs) for b in _blocks(way)), sum(map(len, way))))


def _groups(core: Sequence[frozenset[Slot]]) -> list[list[int]]:
    """Ticks with the same slots, one after another."""
    return [[t for t, _ in group] for _, group in groupby(enumerate(core), key=lambda entry: entry[1])]


def _blocks(signatures: list[tuple[Slot, ...]]) -> tuple[Block, ...]:
    """Ticks as loops: runs of equal slots, and runs that repeat in turn as one loop over them."""
    runs: list[tuple[tuple[Slot, ...], int]] = []
    for each in signatures:
        runs[-1:] = [(each, runs[-1][1] + 1)] if runs and runs[-1][0] == each else [*runs[-1:], (each, 1)]
    blocks, at, tick = [], 0, 0
    while at < len(runs):
        width, repeats = max(
            ((w, _repeats(runs, at, w)) for w in range(1, (len(runs) - at) // 2 + 1)),
            key=lambda found: (found[0] * (found[1] - 1), -found[0]),
            default=(1, 1),
        )
        if repeats == 1:
            width = 1
        blocks.append(Block(repeats, tuple(runs[at : at + width]), tick))
        tick += repeats * blocks[-1].ticks
        at += width * repeats
    return tuple(blocks)


def _repeats(runs: list[tuple[tuple[Slot, ...], int]], at: int, width: int) -> int:
    """How often the `width` runs from `at` on stand there, one time after another."""
    n = 1
    while runs[at + n * width : at + (n + 1) * width] == runs[at : at + width]:
        n += 1
    return n
