"""The tables of a grid say where everything lies: read token by token, each task finds what it needs, whatever the grid."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.pipeline.check import first_fault
from sharding.pipeline.grid import Grid, Place, looped, placed
from sharding.pipeline.tables import SLOTS, Tables, tables
from sharding.schedules.gpipe import GPipe
from sharding.schedules.interleaved import Interleaved
from sharding.schedules.one_f_one_b import OneFOneB
from sharding.schedules.zero_bubble import ZeroBubble

LATE: dict[str, tuple[str, ...]] = {"F": (), "B": ("F",), "W": ("F", "B")}


def drawn(seed: int, stages: int, chunks: int, microbatches: int, splits: bool, idle: float) -> Grid:
    """Any sound grid: in each tick a stage does, or leaves, a task that could be done."""
    draw, path = random.Random(seed), list(looped(stages, chunks))
    if draw.random() < 0.5:
        draw.shuffle(path)
    kinds = ("F", "B", "W") if splits else ("F", "B")
    done: dict[tuple[str, int, int], int] = {}
    last, tick = len(path) - 1, 0

    def ready(kind: str, m: int, p: int) -> bool:
        before = {"F": [("F", m, p - 1)], "B": [("F", m, p), ("B", m, p + 1)], "W": [("B", m, p)]}[kind]
        for need in before:
            if not 0 <= need[2] <= last:
                continue
            here = path[need[2]] == path[p]
            if need not in done or (done[need] == tick and not here):
                return False
        return (kind, m, p) not in done

    while len(done) < len(kinds) * microbatches * len(path):
        for kind in kinds:
            for stage in range(stages):
                open_ = [(m, p) for m in range(microbatches) for p in range(len(path))
                         if path[p].stage == stage and ready(kind, m, p)]  # fmt: skip
                if open_ and draw.random() > idle:
                    done[(kind, *draw.choice(open_))] = tick
        tick += 1
    return placed(done, tuple(path), microbatches)


def walked(table: Tables) -> int:
    """Do the ticks with tokens for arrays; how many tasks found what they need. Slots are those of the loops."""
    grid, rows = table.grid, table.rows
    state: dict[str, Any] = {n: [{} for _ in range(grid.stages)] for n in table.sizes}
    found, tick = 0, 0
    for block in table.blocks:
        assert block.first == tick
        for _ in range(block.repeats):
            for slots, ticks in block.runs:
                for _ in range(ticks):
                    found += _tick(table, grid, rows, state, frozenset(slots), tick)
                    tick += 1
    assert tick == grid.ticks
    return found


def _tick(table: Tables, grid: Grid, rows: Any, state: Any, slots: frozenset[str], tick: int) -> int:
    done, sent = 0, []
    at = lambda name, stage: int(rows[name][tick, stage]) if name in rows else 0
    for kind in (k for k in ("F", "B", "W") if k in slots):
        for stage in range(grid.stages):
            on, m = at(f"{kind}.on", stage), at(f"{kind}.microbatch", stage)
            part = grid.part[Place(stage, at(f"{kind}.chunk", stage))]
            first, end = part == 0, part == len(grid.path) - 1
            token = (m, part) if on else None
            if kind == "F":
                if on and not first:
                    assert state["inbox"][stage][at("inbox.read", stage)] == ("F", m, part - 1)
                if on and first:
                    assert "enter" in slots
                    assert at("enter.microbatch", stage) == m
                for name in ("residuals", "kept", "last"):
                    if name in table.sizes:
                        slot = at(f"{name}.write", stage)
                        assert 0 <= slot < table.sizes[name]
                        if on and (name != "last" or end):
                            state[name][stage][slot] = token
                        else:
                            state[name][stage][slot] = "rubbish"
                sent.append(("F", "inbox", stage, (kind, m, part) if on else "rubbish"))
            elif kind == "B":
                if on and end:
                    assert "loss" in slots
                    assert at("loss.microbatch", stage) == m
                    assert state["last"][stage][at("last.read", stage)] == token
                elif on:
                    assert state["outbox"][stage][at("outbox.read", stage)] == ("B", m, part + 1)
                if on and first:
                    assert "entered" in slots
                    assert at("entered.microbatch", stage) == m
                if on:
                    assert state["residuals"][stage][at("residuals.read", stage)] == token
                if grid.splits:
                    if on:
                        assert state["kept"][stage][at("kept.early", stage)] == token
                    state["cotangents"][stage][at("cotangents.write", stage)] = token if on else "rubbish"
                sent.append(("B", "outbox", stage, (kind, m, part) if on else "rubbish"))
            elif on:
                assert state["kept"][stage][at("kept.read", stage)] == token
                assert state["cotangents"][stage][at("cotangents.read", stage)] == token
            done += on
    for kind, box, stage, token in sent:
        for shift in table.shifts[kind]:
            to = (stage + shift) % grid.stages
            slot = at(f"{box}.arrives{shift}", to)
            if slot:
                state[box][to][slot - 1] = token
    return done


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 7),
    st.booleans(),
    st.sampled_from((0.0, 0.3, 0.7)),
)
def test_each_task_finds_what_it_needs_in_any_grid(
    seed: int, stages: int, chunks: int, microbatches: int, splits: bool, idle: float
) -> None:
    grid = drawn(seed, stages, chunks, microbatches, splits, idle)
    assert first_fault(grid) is None
    assert walked(tables(grid)) == (3 if splits else 2) * microbatches * len(grid.path)


@pytest.mark.parametrize("name", ["residuals.read", "inbox.read", "inbox.arrives1", "loss.microbatch"])
def test_a_wrong_entry_is_seen(name: str) -> None:
    table = tables(GPipe(4).grid(3))
    changed = {k: np.where(row > 0, row - 1, row + 1) if k == name else row for k, row in table.rows.items()}
    with pytest.raises((AssertionError, KeyError)):
        walked(Tables(table.grid, table.blocks, changed, table.sizes, table.shifts))


@pytest.mark.parametrize(
    ("schedule", "stages", "expected"),
    [
        (OneFOneB(16), 4, {"residuals": 7, "last": 1, "inbox": 1, "outbox": 1}),
        (OneFOneB(3), 4, {"residuals": 4, "last": 1, "inbox": 1, "outbox": 1}),
        (GPipe(8), 4, {"residuals": 9, "last": 8, "inbox": 1, "outbox": 1}),
        (ZeroBubble(16), 4, {"residuals": 7, "kept": 7, "cotangents": 4, "last": 1, "inbox": 1, "outbox": 1}),
    ],
)
def test_buffers_hold_what_the_grid_counts(schedule: Any, stages: int, expected: dict[str, int]) -> None:
    """1F1B min(2S - 1, M) and GPipe M, one more where a stage that idles has none free to write its rubbish to."""
    assert tables(schedule.grid(stages)).sizes == expected


@pytest.mark.parametrize("kind", [OneFOneB, GPipe, ZeroBubble, Interleaved])
def test_loops_do_not_grow_with_micro_batches(kind: Any) -> None:
    shape = lambda m: [[slots for slots, _ in b.runs] for b in tables(kind(m).grid(4)).blocks]
    assert shape(16) == shape(64)
    assert sum(len(b.runs) for b in tables(kind(64).grid(4)).blocks) <= 8
    assert all(
        slot in SLOTS for b in tables(kind(64).grid(4)).blocks for slots, _ in b.runs for slot in slots
    )
