"""FLOPs and bytes per op: against sums written out by hand, with loop trips, local shapes and the stated fusion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from sharding.axes import MeshShape
from sharding.ledger import collectives, flops
from sharding.price.work import Work, work
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from tests.support import make_step, model_configs


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def of(function: Callable[..., Any], *args: Any) -> list[Work]:
    return work(jax.make_jaxpr(function)(*args))


def moved(found: list[Work]) -> Counter[str]:
    total: Counter[str] = Counter()
    for w in found:
        total[w.kind] += w.bytes * w.times
    return total


A = 16 * 32 * 4
"""Bytes of the arrays below."""


def test_a_product_reads_both_operands_and_writes_its_result() -> None:
    (only,) = of(lambda x, w: x @ w, f32(16, 32), f32(32, 8))
    assert (only.kind, only.dtype, only.times) == ("product", "float32", 1)
    assert only.flops == 2 * 16 * 32 * 8
    assert only.bytes == 4 * (16 * 32 + 32 * 8 + 16 * 8)


def test_a_transposed_operand_costs_nothing_more() -> None:
    (only,) = of(lambda x, w: x @ w.T.reshape(32, 8), f32(16, 32), f32(8, 32))
    assert only.bytes == 4 * (16 * 32 + 32 * 8 + 16 * 8)


def test_an_elementwise_run_reads_and_writes_once() -> None:
    (only,) = of(lambda x, y: jnp.tanh(x * y + 1.0) - x, f32(16, 32), f32(16, 32))
    assert only.kind == "elementwise"
    assert only.bytes == 3 * A


def test_what_leaves_a_run_is_written() -> None:
    (only,) = of(lambda x, y: (s := x + y, s * 2.0), f32(16, 32), f32(16, 32))
    assert only.bytes == 4 * A


def test_a_softmax_is_three_passes() -> None:
    """Its greatest, its sum, its quotient: each reads the array, and only the last writes one."""

    def softmax(x: Any) -> Any:
        e = jnp.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    row = 16 * 4
    assert moved(of(softmax, f32(16, 32)))["elementwise"] == pytest.approx(5 * A, abs=8 * row)


def test_a_late_op_takes_its_early_operands_into_its_run() -> None:
    """Adam's moment is decayed where the gradient is added to it, not before."""

    def update(moment: Any, x: Any, y: Any) -> Any:
        decayed = 0.9 * moment
        return decayed + 0.1 * (x.T @ y)

    found = of(update, f32(32, 32), f32(16, 32), f32(16, 32))
    assert moved(found)["elementwise"] == 3 * 32 * 32 * 4


def test_an_early_result_does_not_pass_by_a_product() -> None:
    found = of(lambda x, w: jnp.tanh(x) + jnp.tanh(x) @ w, f32(16, 32), f32(32, 32))
    first_read_and_written, then_two_read_one_written = 2 * A, 3 * A
    assert moved(found)["elementwise"] == first_read_and_written + then_two_read_one_written
    assert moved(found)["product"] == 2 * A + 32 * 32 * 4


def test_loops_multiply_and_bodies_have_their_own_shapes() -> None:
    def layers(x: Any, ws: Any) -> Any:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    found = of(layers, f32(16, 32), f32(5, 32, 32))
    assert {w.times for w in found} == {5}
    assert moved(found)["product"] == 5 * (2 * A + 32 * 32 * 4)
    assert moved(found)["elementwise"] == 5 * 2 * A


def test_shapes_are_local_in_the_manual_region() -> None:
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    region = jax.shard_map(
        lambda x, w: lax.psum(jnp.tanh(x @ w).sum(), "data"),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P(),
    )
    found = of(region, f32(16, 32), f32(32, 32))
    (product,) = [w for w in found if w.kind == "product"]
    assert product.flops == 2 * 4 * 32 * 32
    assert product.bytes == 4 * (4 * 32 + 32 * 32 + 4 * 32)
    (reduction,) = [w for w in found if w.kind == "collective"]
    assert reduction.bytes == 8


def test_a_gather_reads_only_the_rows_it_takes_and_a_scatter_changes_only_its_own() -> None:
    table, rows = f32(1000, 32), jax.ShapeDtypeStruct((16,), jnp.int32)
    taken = [w for w in of(lambda t, i: t.at[i].get(mode="clip"), table, rows) if w.kind == "gather"]
    assert sum(w.bytes for w in taken) == 2 * A + 16 * 4
    added = [w for w in of(lambda t, i, x: t.at[i].add(x), table, rows, f32(16, 32)) if w.kind == "gather"]
    assert sum(w.bytes for w in added) == 3 * A + 16 * 4


def test_a_part_is_read_as_a_part() -> None:
    (only,) = of(lambda x: x[:16] * 2.0, f32(64, 32))
    assert only.bytes == 2 * A


@pytest.mark.parametrize(("asked", "said"), [(None, ""), ("high", "high"), ("highest", "highest")])
def test_the_precision_that_a_product_asks_for_is_kept(asked: str | None, said: str) -> None:
    (only,) = of(lambda x, w: jnp.dot(x, w, precision=asked), f32(16, 32), f32(32, 8))
    assert only.precision == said


def test_a_convolution_is_one() -> None:
    (only,) = of(
        lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME"), f32(2, 3, 8, 8), f32(4, 3, 3, 3)
    )
    assert only.kind == "convolution"
    assert only.flops == 2 * (2 * 4 * 8 * 8) * 27
    assert only.bytes == 4 * (2 * 3 * 64 + 4 * 27 + 2 * 4 * 64)


@pytest.mark.parametrize("model", sorted(model_configs()))
def test_no_flop_and_no_collective_of_a_step_is_lost(model: str) -> None:
    """The same FLOPs and collectives as the ledger finds, and all of its passes, for every model."""
    mesh = MeshShape(data=2, fsdp=2)
    step = make_step(model_configs()[model], data() | fsdp(), mesh)
    jaxpr = jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(16))
    found = work(jaxpr)
    assert sum(w.flops * w.times for w in found) == flops(jaxpr) > 0
    assert sum(w.times for w in found if w.kind == "collective") >= sum(
        c.times for c in collectives(jaxpr, mesh.sizes())
    )
    assert {"forward", "backward", "update"} <= {w.scope.phase for w in found}
    assert all(w.bytes > 0 and w.times > 0 for w in found if w.kind != "collective")


def test_an_optimizers_update_is_divided_as_its_arrays_are() -> None:
    """Outside the manual region: Adam reads parameter, gradient and two moments and writes three of them, each a quarter."""
    mesh = MeshShape(fsdp=4)
    step = make_step(model_configs()["transformer"], data() | fsdp(), mesh, optimizer=optax.adam(1e-3))
    state = step.abstract_state()
    jaxpr = jax.make_jaxpr(step.update)(state, step.abstract_batch(16))
    parameters = sum(x.size * 4 for x in jax.tree.leaves(jax.eval_shape(lambda s: s["params"], state)))
    update = sum(
        w.bytes * w.times for w in work(jaxpr) if w.scope.phase == "update" and w.kind == "elementwise"
    )
    assert 7 * parameters / 4 <= update <= 11 * parameters / 4, "undivided it were four times as much"
