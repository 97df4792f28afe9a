"""The checker on collectives: every planted waste is found with its bytes, and the lower bound is what a device lacks."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from sharding.axes import MeshShape
from sharding.flow import Flow
from sharding.mesh import abstract_mesh
from sharding.rule import Rule, rule
from sharding.waste import lower_bound
from tests.checked import WIDE, found, line_of


@rule
def head_features(axis: str = "tensor") -> Rule:
    """Splits what rotary positions pair: every op brings it together again."""
    return Rule(compute={"head_dim": axis}, activation={"head_dim": axis})


def test_a_layout_that_two_ops_cannot_use_is_found_with_its_bytes() -> None:
    told = {f.path.rpartition("/")[2]: f for f in found(head_features(), WIDE, tensor=2)}
    at = {
        k: next(f for p, f in told.items() if p.endswith(k) and f.kind == "wasteful move")
        for k in ("rope", "attention")
    }
    query = (
        16 * 64 * 8 * 16 * 4 * 2
    )  # local bytes of q, two layers; gathering sends as many to the other device
    assert at["rope"].has == 3 * query, "a gather forward, an all-reduce (twice a reduce-scatter) backward"
    assert at["rope"].needs == query
    assert "gathers an array for one op alone and slices the result back over tensor = 2" in at["rope"].says
    assert (at["attention"].has, at["attention"].needs) == (query + query // 2, 0), (
        "q and k, which rope had whole"
    )
    assert "gathers an array again of which every device had just cut its part" in at["attention"].says
    assert head_features().chain[0].call in at["rope"].says
    assert at["rope"].sources == (line_of(head_features),)
    assert "leave that dim of the activation whole" in at["rope"].change


def flow(function: Any) -> Flow:
    """The flow of a function in a manual region over data = 2 x tensor = 4; it gets 4 of 16 rows of 8 float32, 128 B."""
    shape = MeshShape(data=2, tensor=4)
    spread = P(("data", "tensor"))
    mapped = jax.shard_map(
        function, mesh=abstract_mesh(shape, 8), in_specs=P("tensor"), out_specs=spread, check_vma=True
    )
    return Flow(jax.make_jaxpr(mapped)(jax.ShapeDtypeStruct((16, 8), jnp.float32)), shape.sizes())


def mine(x: jax.Array, axis: str, dim: int = 0) -> jax.Array:
    """This device's part of an array that all have."""
    size = x.shape[dim] // lax.axis_size(axis)
    cast = lax.pcast(x, axis, to="varying") if axis not in jax.typeof(x).manual_axis_type.varying else x
    return lax.dynamic_slice_in_dim(cast, lax.axis_index(axis) * size, size, dim)


def both(x: jax.Array) -> jax.Array:
    """Typed as varying over both axes."""
    missing = tuple(sorted({"data", "tensor"} - set(jax.typeof(x).manual_axis_type.varying)))
    return lax.pcast(x, missing, to="varying") if missing else x


gather = functools.partial(lax.all_gather, axis_name="tensor", axis=0, tiled=True)

MOVES: dict[str, tuple[Any, tuple[str, int, int] | None]] = {
    # half of all rows, of which an eighth of all is held already by the devices whose rows lie in their half
    "sliced": (lambda x: both(mine(gather(x), "data")), ("sliced", 3 * 128, 256 - 64)),
    "sliced elsewhere": (lambda x: both(mine(gather(x), "tensor", 1)), ("sliced", 3 * 128, 96)),
    "through": (lambda x: both(mine(jnp.flip(gather(x), 1) * 2.0, "tensor")), ("through", 3 * 128, 0)),
    "summed": (lambda x: both(mine(lax.psum(x, "tensor"), "tensor")), ("summed", 2 * 96, 96)),
    "again": (lambda x: both(gather(mine(lax.psum(x, "tensor"), "tensor"))), ("again", 3 * 32, 0)),
    "equal": (lambda x: both(gather(both(lax.psum(x, "tensor")))), ("equal", 3 * 128, 0)),
    "used": (lambda x: both(mine(gather(x), "data") + jnp.sum(gather(x))), None),
    "used in one": (lambda x: both((lambda g: mine(g, "data") + jnp.sum(g))(gather(x))), None),
    "other values": (lambda x: both(mine(jnp.cumsum(gather(x), 0), "tensor")), None),
}


@pytest.mark.parametrize("name", MOVES)
def test_each_kind_of_wasteful_move(name: str) -> None:
    from sharding.waste import _needed

    function, expected = MOVES[name]
    seen = flow(function)
    judged = [
        (*v, m.bytes) for m in seen.moves if (v := _needed(m, seen.sizes)) is not None and v[1] < m.bytes
    ]
    if name == "used":  # the first of two gathers is only sliced; their sum is not traced back
        judged = [j for j in judged if j[0] != "sliced"]
    if expected is None:
        assert judged == []
    else:
        kind, has, needs = expected
        assert (kind, needs, has) in judged


def test_a_loops_moves_count_each_time() -> None:
    def looped(x: jax.Array) -> jax.Array:
        return lax.scan(lambda c, _: (both(mine(gather(c), "tensor")), None), both(x), None, length=5)[0]

    (move,) = flow(looped).moves
    assert (move.times, move.bytes, move.used, [s[1] for s in move.slices]) == (
        5, 5 * 3 * 128, False, [frozenset({"tensor"})],
    )  # fmt: skip


AXES = {"data": 2, "fsdp": 3, "tensor": 2}


@given(st.permutations(list(AXES)), st.permutations(list(AXES)), st.data())
def test_the_lower_bound_counts_what_each_device_lacks(src: list[str], dst: list[str], draw: Any) -> None:
    shape = (24, 12)

    def layout(order: list[str]) -> tuple[tuple[str, ...], ...]:
        places = draw.draw(st.lists(st.integers(-1, 1), min_size=3, max_size=3))
        return tuple(tuple(a for a, p in zip(order, places, strict=True) if p == d) for d in range(2))

    def held(dims: tuple[tuple[str, ...], ...], at: dict[str, int]) -> set[tuple[int, int]]:
        ranges = []
        for n, axes in zip(shape, dims, strict=True):
            start, size = 0, n
            for a in axes:
                size //= AXES[a]
                start += at[a] * size
            ranges.append(range(start, start + size))
        return set(itertools.product(*ranges))

    have, want = layout(src), layout(dst)
    devices = [dict(zip(AXES, at, strict=True)) for at in itertools.product(*map(range, AXES.values()))]
    lacks = [len(held(want, at) - held(have, at)) for at in devices]
    assert lower_bound(len(held(have, devices[0])), have, want, AXES) == round(sum(lacks) / len(lacks))
