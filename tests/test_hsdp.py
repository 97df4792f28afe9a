"""Hybrid sharding in the compiled module: gradients are scattered inside, and only shards cross the slow axis."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import pytest

from sharding.axes import AXES, MeshShape
from sharding.rules.hsdp import hsdp
from tests.support import ROWS, make_step, model_configs

MESH = MeshShape(data=2, fsdp=4)
INNER = {(0, 1, 2, 3), (4, 5, 6, 7)}
OUTER = {(0, 4), (1, 5), (2, 6), (3, 7)}
EVERY = {tuple(range(8))}
KINDS = "all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute"


@dataclass(frozen=True)
class Compiled:
    """One collective of a compiled module: what each device gets, and the groups of devices that take part."""

    kind: str
    elements: int
    groups: frozenset[tuple[int, ...]]


def groups(text: str) -> frozenset[tuple[int, ...]]:
    """The groups of devices in a `replica_groups=` of any of XLA's three notations."""
    if listed := re.match(r"\{((?:\{[\d,]+\},?)*)\}", text):
        found = re.findall(r"\{([\d,]+)\}", listed.group(1))
        return frozenset(tuple(map(int, one.split(","))) for one in found) or frozenset(EVERY)
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, sizes, order = (tuple(map(int, g.split(","))) if g else None for g in iota.groups())
        assert shape is not None
        assert sizes is not None
        grid = np.arange(math.prod(sizes)).reshape(sizes).transpose(order or range(len(sizes))).reshape(shape)
        return frozenset(tuple(map(int, row)) for row in grid)
    if mesh := re.match(r"mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = {a: int(n) for a, n in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
        over = re.findall(r"'(\w+)'", mesh.group(2))
        grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        last = [list(sizes).index(a) for a in over]
        grid = grid.transpose([*(i for i in range(len(sizes)) if i not in last), *last])
        return frozenset(tuple(map(int, row)) for row in grid.reshape(-1, math.prod(sizes[a] for a in over)))
    raise AssertionError(f"replica_groups in a notation that this test does not read: {text[:80]}")


def read(module: str) -> list[Compiled]:
    """Every collective of a compiled module's text."""
    found = []
    for line in module.splitlines():
        op = re.search(rf" = (.*?) ({KINDS})(?:-start)?\(", line)
        if op is None:
            continue
        shapes = re.findall(r"\b[a-z]+\d+\[([\d,]*)\]", op.group(1))
        elements = sum(math.prod(map(int, filter(None, s.split(",")))) for s in shapes)
        where = line.partition("replica_groups=")[2]
        found.append(Compiled(op.group(2), elements, groups(where)))
    return found


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    step = make_step(model_configs()["mlp"], hsdp(), MESH)
    return read(step.step.lower(step.abstract_state(), step.abstract_batch(ROWS)).compile().as_text() or "")


@pytest.fixture(scope="module")
def parameters() -> int:
    return sum(s.size for s in make_step(model_configs()["mlp"]).tree.values())


def elements(found: list[Compiled], kind: str, where: set[tuple[int, ...]]) -> list[int]:
    return [c.elements for c in found if c.kind == kind and c.groups == where]


def test_gradients_are_reduce_scattered_over_fsdp(compiled: list[Compiled], parameters: int) -> None:
    assert (
        sum(elements(compiled, "reduce-scatter", INNER)) == parameters // 4
    )  # what each device is left with


def test_only_the_shards_are_all_reduced_over_data(compiled: list[Compiled], parameters: int) -> None:
    assert sum(elements(compiled, "all-reduce", OUTER)) == parameters // 4


def test_parameters_are_gathered_over_fsdp(compiled: list[Compiled], parameters: int) -> None:
    # once each: XLA:CPU unrolls few layers and merges the second gather with the first
    assert sum(elements(compiled, "all-gather", INNER)) == parameters


def test_nothing_else_is_sent_but_four_numbers(compiled: list[Compiled]) -> None:
    rest = [
        c
        for c in compiled
        if (c.kind, c.groups) not in {("reduce-scatter", frozenset(INNER)), ("all-gather", frozenset(INNER))}
        and (c.kind, c.groups) != ("all-reduce", frozenset(OUTER))
    ]
    assert {c.kind for c in rest} == {"all-reduce"}
    assert sum(c.elements for c in rest) == 4, "loss, correct, weight and the gradient's norm"
    assert {c.groups for c in rest} == {frozenset(EVERY), frozenset(INNER)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1,2,3},{4,5,6,7}}, use", INNER),
        ("[2,4]<=[8], use", INNER),
        ("[4,2]<=[2,4]T(1,0), use", OUTER),
        ("[1,8]<=[8], dim", EVERY),
        ("{}, to_apply", EVERY),
        ("mesh['replica'=1,'data'=2,'fsdp'=4] {'fsdp'}, dimensions", INNER),
        ("mesh['replica'=1,'data'=2,'fsdp'=4] {'data'}, dimensions", OUTER),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}, dimensions", EVERY),
    ],
)
def test_every_notation_of_groups_is_read(text: str, expected: set[tuple[int, ...]]) -> None:
    assert groups(text) == expected


def test_the_groups_are_those_of_the_axes() -> None:
    made = make_step(model_configs()["mlp"], hsdp(), MESH).split.mesh
    assert made is not None
    ids = np.vectorize(lambda d: d.id)(made.devices)
    for axis, expected in (("data", OUTER), ("fsdp", INNER)):
        lines = np.moveaxis(ids, AXES.index(axis), -1).reshape(-1, ids.shape[AXES.index(axis)])
        assert {tuple(map(int, line)) for line in lines} == expected
