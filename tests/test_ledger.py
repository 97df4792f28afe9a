"""The ledger of a traced step against what the literature says each strategy sends, to the byte."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from configs import moe_quick
from experiments.config import Devices
from experiments.explanation import explain
from sharding.axes import MeshShape
from sharding.ledger import Collective, collectives, flops, per_axis
from sharding.mesh import device_mesh
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.relayout import vary
from sharding.rule import Rules
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.hsdp import hsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from sharding.rules.zero1 import zero1
from sharding.rules.zero2 import zero2
from sharding.step import TrainStep
from tests.support import ROWS, make_step, model_configs

SCAN = dataclasses.replace(model_configs()["transformer"], loop="scan", vocab=64, kv_heads=8)
KEEP = Manual(gathered="keep")


def traced(
    rules: Rules,
    mesh: MeshShape,
    partitioner: Partitioner = Manual(),  # noqa: B008 (a frozen value)
    accumulate: int = 1,
    config: Any = SCAN,
) -> tuple[TrainStep, list[Collective]]:
    step = make_step(config, rules, mesh, partitioner, accumulate)
    return step, collectives(
        jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(ROWS)), mesh.sizes()
    )


def sent(found: list[Collective], axis: str, numbers: bool = False) -> int:
    """Bytes over exactly this axis, by arrays or by single numbers (loss, weight, norm)."""
    return sum(c.bytes for c in found if c.axes == (axis,) and (c.shape == ()) == numbers)


def parameters(step: TrainStep, stacked: bool | None = None) -> int:
    """Bytes of all parameters, or of those in or out of the stack of layers."""
    tree = step.tree.values()
    return sum(4 * s.size for s in tree if stacked is None or ("layers" in s.names) == stacked)


def test_data_parallelism_sends_2p() -> None:
    step, found = traced(data(), MeshShape(data=8))
    assert sent(found, "data") == 2 * parameters(step) * 7 // 8
    assert sent(found, "data", numbers=True) == 2 * (2 * 4 * 7 // 8)  # loss and weight
    assert {c.kind for c in found} == {"all-reduce"}


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_reduces_once_a_step(accumulate: int) -> None:
    step, found = traced(data(), MeshShape(data=4), accumulate=accumulate)
    assert sent(found, "data") == 2 * parameters(step) * 3 // 4


def test_zero1_sends_3p_and_zero2_sends_2p() -> None:
    step, found = traced(zero1(), MeshShape(data=8))
    assert (
        sent(found, "data") == 3 * parameters(step) * 7 // 8
    )  # an all-reduce, and the gather of what was updated
    step, found = traced(zero2(), MeshShape(data=8))
    assert sent(found, "data") == 2 * parameters(step) * 7 // 8
    assert {k: n for k, (n, _) in per_axis(found)["data",].items()} == {
        "reduce-scatter": len(step.tree),
        "all-gather": len(step.tree),
        "all-reduce": 3,
    }


def test_fsdp_sends_3p_when_layers_gather_again_and_2p_when_they_keep() -> None:
    step, found = traced(fsdp(), MeshShape(fsdp=8))
    again = 3 * parameters(step, True) + 2 * parameters(step, False)
    assert sent(found, "fsdp") == again * 7 // 8
    for partitioner, loop in (
        (KEEP, "scan"),
        (Manual(), "unroll"),
    ):  # XLA:CPU would merge what unrolled layers repeat
        step, found = traced(
            fsdp(), MeshShape(fsdp=8), partitioner, config=dataclasses.replace(SCAN, loop=loop)
        )
        assert sent(found, "fsdp") == 2 * parameters(step) * 7 // 8, loop


def test_hsdp_sends_only_the_shard_over_the_outer_axis() -> None:
    step, found = traced(hsdp(), MeshShape(data=2, fsdp=4), KEEP)
    assert sent(found, "fsdp") == 2 * parameters(step) * 3 // 4
    assert sent(found, "data") == 2 * (parameters(step) // 4) // 2
    over_both = [c for c in found if len(c.axes) > 1]
    assert {c.shape for c in over_both} == {()}


BLD = ROWS * SCAN.length * SCAN.embed
ALL_REDUCE = 2 * 4 * BLD // 2
"""Bytes of an all-reduce of the residual stream over two devices."""


def residual(found: list[Collective], elements: int) -> dict[str, int]:
    """How many collectives of each kind move the residual stream, whose local size on one side is `elements`."""
    counts: dict[str, int] = {}
    for c in found:
        if (
            len(c.shape) == 3
            and c.dtype == "float32"
            and "tensor" in c.axes
            and math.prod(c.shape) == elements
        ):
            counts[c.kind] = counts.get(c.kind, 0) + c.times
    return counts


@pytest.mark.parametrize("loop", ["scan", "unroll"])
@pytest.mark.parametrize("kv_heads", [4, 8])
def test_megatron_all_reduces_twice_a_layer_forward_and_twice_backward(loop: str, kv_heads: int) -> None:
    config = dataclasses.replace(SCAN, loop=loop, kv_heads=kv_heads)
    _, found = traced(tensor(), MeshShape(tensor=2), config=config)
    assert residual(found, BLD) == {"all-reduce": 4 * SCAN.layers + 2}  # and the vocabulary's, in and out
    per_token = [c for c in found if c.shape == (ROWS, SCAN.length)]
    assert len(per_token) == 3  # maximum, sum of exponentials, the label's logit
    assert sum(c.bytes for c in found) == (4 * SCAN.layers + 2) * ALL_REDUCE + 3 * 4 * ROWS * SCAN.length + 4


def test_gathering_parameters_again_repeats_no_all_reduce() -> None:
    _, found = traced(fsdp() | tensor(), MeshShape(fsdp=2, tensor=2))
    assert residual(found, BLD // 2) == {"all-reduce": 4 * SCAN.layers + 2}


def test_sequence_parallelism_sends_the_same_bytes_as_gathers_and_scatters() -> None:
    _, found = traced(tensor() | sequence(), MeshShape(tensor=2))
    each = 4 * SCAN.layers + 2
    # half of each pair lies in the forward pass: a gather before the columns, a reduce-scatter after the rows
    assert residual(found, BLD // 2) == {"all-gather": each}
    assert residual(found, BLD) == {"reduce-scatter": each}
    assert sum(c.bytes for c in found if len(c.shape) == 3 and c.dtype == "float32") == each * ALL_REDUCE


def test_axes_of_one_device_cost_nothing() -> None:
    rules = data() | fsdp() | tensor() | sequence()
    assert traced(rules, MeshShape())[1] == []


def test_xlas_partitioner_leaves_no_collective_in_the_trace() -> None:
    assert traced(data() | fsdp() | tensor(), MeshShape(data=2, fsdp=2, tensor=2), Auto())[1] == []


def test_a_collective_names_the_line_of_the_model_that_asked_for_it() -> None:
    _, found = traced(tensor(), MeshShape(tensor=2))
    forward = [c for c in found if len(c.shape) == 3]
    assert any("models/transformer.py:" in c.source.replace("\\", "/") for c in forward), {
        c.source for c in found
    }


# the ledger's own arithmetic

MESH = MeshShape(data=2, fsdp=4)


def local(body: Callable[[Any], Any], out: PartitionSpec, times: int = 1) -> list[Collective]:
    """Collectives of a function of a local (4, 8) float32, split by fsdp in its first dim, in a loop of `times`."""
    inside = jax.shard_map(body, mesh=device_mesh(MESH), in_specs=PartitionSpec("fsdp"), out_specs=out)

    def whole(x):
        return lax.scan(lambda c, _: (c, inside(x)), jnp.zeros(()), None, length=times)[1]

    return collectives(jax.make_jaxpr(whole)(jax.ShapeDtypeStruct((16, 8), jnp.float32)), MESH.sizes())


SIZE = 4 * 4 * 8
ONE: dict[str, tuple[Callable[[Any], Any], PartitionSpec, str, int]] = {
    "all-reduce": (lambda x: lax.psum(x, "fsdp"), PartitionSpec(), "all-reduce", 2 * SIZE * 3 // 4),
    "maximum": (lambda x: lax.pmax(x, "fsdp"), PartitionSpec(), "all-reduce", 2 * SIZE * 3 // 4),
    "gather": (lambda x: lax.all_gather(x, "fsdp"), PartitionSpec("fsdp"), "all-gather", SIZE * 3),
    "scatter": (
        lambda x: lax.psum_scatter(x, "fsdp", tiled=True),
        PartitionSpec("fsdp"),
        "reduce-scatter",
        SIZE * 3 // 4,
    ),
    "exchange": (
        lambda x: lax.all_to_all(x, "fsdp", 1, 0, tiled=True),
        PartitionSpec(None, "fsdp"),
        "all-to-all",
        SIZE * 3 // 4,
    ),
    "permute": (
        lambda x: lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
        PartitionSpec("fsdp"),
        "permute",
        SIZE,
    ),
    "two axes": (
        lambda x: lax.psum(vary(x, frozenset({"data"})), ("data", "fsdp")),
        PartitionSpec(),
        "all-reduce",
        2 * SIZE * 7 // 8,
    ),
}


@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize("case", ONE)
def test_one_collective_is_counted_once_a_trip(case: str, times: int) -> None:
    body, out, kind, size = ONE[case]
    (found,) = local(body, out, times)
    assert (found.kind, found.dtype, found.shape) == (kind, "float32", (4, 8))
    assert (found.times, found.bytes) == (times, times * size)
    assert per_axis([found]) == {found.axes: {kind: (times, times * size)}}


def test_products_are_counted_with_their_loops_and_backward() -> None:
    x, w = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
    once = 2 * 4 * 8 * 8
    assert flops(jax.make_jaxpr(jnp.dot)(x, w)) == once

    def looped(x, w):
        return lax.scan(lambda x, _: (x @ w, None), x, None, length=3)[0]

    assert flops(jax.make_jaxpr(looped)(x, w)) == 3 * once
    both = jax.grad(lambda w, x: jnp.sum(looped(x, w)))
    # the first product's input needs no gradient
    assert flops(jax.make_jaxpr(both)(w, x)) in (8 * once, 9 * once)
    remat = jax.grad(lambda w, x: jnp.sum(jax.checkpoint(jnp.dot)(x, w) ** 2))
    assert flops(jax.make_jaxpr(remat)(w, x)) == 2 * once


def test_products_over_groups_are_counted_by_their_rows_forward_and_backward() -> None:
    x, w = jax.ShapeDtypeStruct((16, 4), jnp.float32), jax.ShapeDtypeStruct((3, 4, 5), jnp.float32)
    sizes, once = jax.ShapeDtypeStruct((3,), jnp.int32), 2 * 16 * 4 * 5
    assert flops(jax.make_jaxpr(lax.ragged_dot)(x, w, sizes)) == once
    loss = lambda x, w, sizes: jnp.sum(jnp.square(lax.ragged_dot(x, w, sizes)))
    assert flops(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, w, sizes)) == 3 * once


def test_experts_that_drop_nothing_count_the_work_of_the_choices() -> None:
    base = moe_quick.config()
    c: Any = base.model

    def forward(top: int) -> int:
        model = dataclasses.replace(c, capacity=math.inf, top=top, layers=1)
        present = dataclasses.replace(
            base, model=model, rules=data(), mesh=MeshShape(data=2), devices=Devices("present", 2)
        )
        return explain(present, 2).forward_flops

    assert forward(2) - forward(1) == base.batch * c.length * 2 * 3 * c.embed * c.mlp
