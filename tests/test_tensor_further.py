"""Tensor parallelism beyond one axis of heads and features: fewer key heads than devices, rows and columns at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax

import sharding.attention
import sharding.overlap
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.ledger import collectives, flops, per_axis
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.hsdp import hsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from sharding.rules.tensor2d import tensor2d
from sharding.step import TrainStep
from tests.support import (
    assert_same,
    batches,
    in_double,
    initial_params,
    make_step,
    model_configs,
    oracle,
    train,
)

BOUND = 1e-5
"""float32, as in test_parity."""
EXACT = 1e-12
PARTITIONERS = [Manual(), Auto()]
FEW = dataclasses.replace(model_configs()["transformer"], heads=8, kv_heads=2)
"""Two key heads: fewer than the four or eight devices of the axes below."""
MODEL = model_configs()["transformer"]


def parity(config: Any, rules: Rules, mesh: MeshShape, partitioner: Partitioner, steps: int = 2) -> None:
    """Loss, gradients and updates are those of one device."""
    step = make_step(config, rules, mesh, partitioner)
    found = train(step, initial_params(config), batches(config, steps))
    assert_same(found, oracle(config, steps), BOUND)


# key heads whole

WHOLE = tensor(kv_heads="whole")
KV_CASES: dict[str, tuple[Rules, MeshShape]] = {
    "tensor": (WHOLE, MeshShape(tensor=8)),
    "data tensor": (data() | WHOLE, MeshShape(data=2, tensor=4)),
    "fsdp tensor sequence": (fsdp() | WHOLE | sequence(), MeshShape(fsdp=2, tensor=4)),
    "hsdp tensor": (hsdp() | tensor("context", kv_heads="whole"), MeshShape(data=2, fsdp=2, context=2)),
}


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize("case", KV_CASES)
def test_key_heads_may_be_whole(case: str, partitioner: Partitioner) -> None:
    parity(FEW, *KV_CASES[case], partitioner)


def test_whole_key_heads_in_double() -> None:
    assert_same(*in_double(FEW, data() | WHOLE | sequence(), MeshShape(data=2, tensor=4)), EXACT)


def test_whole_key_heads_lie_whole_and_query_heads_do_not() -> None:
    step = make_step(FEW, data() | WHOLE, MeshShape(data=2, tensor=4))
    assert step.layouts["layers.attention.k"].compute.text() == "layers embed kv_heads head_dim"
    assert step.layouts["layers.attention.q"].compute.text() == "layers embed heads/tensor head_dim"
    key = step.split.layouts.activation(("batch", "length", "kv_heads", "head_dim"))
    assert key.text() == "batch/data length kv_heads head_dim"


@pytest.mark.parametrize("devices", [4, 8])
def test_key_heads_that_do_not_divide_name_the_choice(devices: int) -> None:
    said = (
        rf"splits kv_heads = 2 into {devices} parts .* Set mesh axis tensor to 2 or make kv_heads a multiple of {devices}, "
        r"or give tensor kv_heads='whole'\."
    )
    with pytest.raises(InputError, match=said):
        make_step(FEW, tensor(), MeshShape(tensor=devices))
    with pytest.raises(InputError, match=r"make mlp a multiple of 3\.$"):  # no other name does
        make_step(dataclasses.replace(FEW, heads=6, kv_heads=3), tensor(), MeshShape(tensor=3))


def _heads_of_the_first_device(q: Array, kv: Array, axes: tuple[str, ...]) -> Array:
    group = q.shape[2] * lax.axis_size(axes) // kv.shape[2]
    return jnp.take(kv, jnp.arange(q.shape[2], dtype=jnp.int32) // group, axis=2)


def test_the_key_heads_of_another_device_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding.attention, "_heads_of", _heads_of_the_first_device)
    with pytest.raises(AssertionError, match=r"departs|loss|grad_norm"):
        parity(FEW, *KV_CASES["data tensor"], Manual())


# rows and columns

CASES: dict[str, tuple[Rules, MeshShape]] = {
    "alone": (tensor2d(), MeshShape(fsdp=2, tensor=4)),
    "more rows": (tensor2d(), MeshShape(fsdp=4, tensor=2)),
    "data": (data() | tensor2d(), MeshShape(data=2, fsdp=2, tensor=2)),
    "data sequence": (data() | tensor2d() | sequence(), MeshShape(data=2, fsdp=2, tensor=2)),
    "fsdp on another axis": (
        fsdp("data") | tensor2d("context", "tensor"),
        MeshShape(data=2, context=2, tensor=2),
    ),
    "hsdp": (hsdp("replica") | tensor2d("context", "tensor"), MeshShape(fsdp=2, context=2, tensor=2)),
    "tensor inside": (tensor2d("context", "expert") | data(), MeshShape(data=2, expert=2, context=2)),
    "fewer key heads": (data() | tensor2d(kv_heads="whole"), MeshShape(fsdp=2, tensor=4)),
}


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_rows_and_columns_compute_the_numbers_of_one_device(case: str, partitioner: Partitioner) -> None:
    parity(FEW if case == "fewer key heads" else MODEL, *CASES[case], partitioner)


@pytest.mark.parametrize("case", ["alone", "data sequence"])
def test_rows_and_columns_in_double(case: str) -> None:
    assert_same(*in_double(MODEL, *CASES[case]), EXACT)


def test_matrices_are_split_both_ways_in_use() -> None:
    step = make_step(MODEL, tensor2d(), MeshShape(fsdp=2, tensor=4))
    in_use = {path: x.compute.text() for path, x in step.layouts.items()}
    assert in_use["layers.mlp.down"] == "layers mlp/tensor embed/fsdp"
    assert in_use["layers.attention.q"] == "layers embed/fsdp heads/tensor head_dim"
    assert in_use["unembed"] == "embed/fsdp vocab/tensor"
    stream = step.split.layouts.activation(("batch", "length", "embed"))
    assert stream.text() == "batch/fsdp length embed"


# What moves: weights or activations, by the rules alone.

R, C = 2, 4
"""Devices along rows and columns."""
MESH = MeshShape(fsdp=R, tensor=C)
ROWS = 16


def sent(rules: Rules, axis: str, config: Any = MODEL) -> int:
    """Bytes that a device sends over an axis in one step for one more layer."""
    one, two = (
        sum(n for _, n in per_axis(collectives(_traced(rules, c), MESH.sizes()))[(axis,)].values())
        for c in (
            dataclasses.replace(config, layers=1, loop="unroll"),
            dataclasses.replace(config, layers=2, loop="unroll"),
        )
    )
    return two - one


def _traced(rules: Rules, config: Any) -> Any:
    step: TrainStep = make_step(config, rules, MESH)
    return jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(ROWS))


def widths(c: Any) -> tuple[int, int]:
    """(what the layer's first products make of a token and its second ones read, parameters of its matrices)."""
    features = 2 * (c.heads + c.kv_heads) * c.head_dim + 3 * c.mlp
    return features, features * c.embed


@pytest.mark.parametrize("length", [4, 8, 32])
def test_activations_move_with_the_tokens_and_weights_do_not(length: int) -> None:
    config = dataclasses.replace(MODEL, length=length)
    tokens, (features, params), wide, float32 = ROWS * length, widths(config), config.embed, 4
    norms = (
        2 * wide
    )  # the scales of two norms: their gradients are summed, or they are gathered and scattered
    forward = tokens * (4 * wide // R + features // C) * (R - 1) // R
    assert sent(tensor2d(), "fsdp", config) == float32 * (2 * forward + 2 * norms * (R - 1) // R)
    assert sent(fsdp() | tensor(), "fsdp", config) == float32 * 2 * (params // C + norms) * (R - 1) // R
    columns = (
        float32 * 4 * 2 * (tokens // R * wide) * (C - 1) // C
    )  # four all-reduces of a device's residual stream
    assert sent(tensor2d(), "tensor", config) == sent(fsdp() | tensor(), "tensor", config) == columns


def test_moving_activations_wins_where_tokens_are_fewer_than_about_embed() -> None:
    config = dataclasses.replace(MODEL, embed=128, heads=8, head_dim=16, mlp=352)
    features, _ = widths(config)
    even = config.embed / (
        1 + 4 * config.embed * C / (R * features)
    )  # tokens of a step at which both move as much
    assert 4 * ROWS < even < 8 * ROWS
    short, long = (dataclasses.replace(config, length=n) for n in (4, 8))
    assert sent(tensor2d(), "fsdp", short) < sent(fsdp() | tensor(), "fsdp", short)
    assert sent(tensor2d(), "fsdp", long) > sent(fsdp() | tensor(), "fsdp", long)


def test_no_device_repeats_anothers_work() -> None:
    both = [flops(_traced(rules, MODEL)) for rules in (tensor2d(), fsdp() | tensor())]
    assert both[0] == both[1]


def test_memory_of_parameters_is_that_of_weights_gathered_and_in_use_less() -> None:
    gathered, still = (make_step(MODEL, rules, MESH) for rules in (fsdp() | tensor(), tensor2d()))
    path = "layers.mlp.gate_up"
    assert (
        gathered.layouts[path].param.dims
        == still.layouts[path].param.dims
        == ((), ("fsdp",), (), ("tensor",))
    )
    assert gathered.layouts[path].compute.dims == ((), (), (), ("tensor",))
    assert still.layouts[path].compute.dims == still.layouts[path].param.dims


# Collective matmul: the gather before a product and the reduce-scatter after one as rings of partial products.

RING = Manual(overlap="ring")
RINGS: dict[str, tuple[Rules, MeshShape]] = {
    "tensor sequence": (tensor() | sequence(), MeshShape(tensor=4)),
    "data fsdp tensor sequence": (data() | fsdp() | tensor() | sequence(), MeshShape(data=2, fsdp=2, tensor=2)),
    "context tensor sequence": (context() | tensor() | sequence(), MeshShape(context=2, tensor=2)),
    "rows and columns": (data() | tensor2d() | sequence(), MeshShape(data=2, fsdp=2, tensor=2)),
    "whole key heads": (tensor(kv_heads="whole") | sequence(), MeshShape(tensor=8)),
}  # fmt: skip


@pytest.mark.parametrize("case", RINGS)
def test_rings_of_products_compute_the_numbers_of_one_device(case: str) -> None:
    parity(FEW if case == "whole key heads" else MODEL, *RINGS[case], RING)


@pytest.mark.parametrize("case", ["data fsdp tensor sequence"])
def test_rings_in_double(case: str) -> None:
    assert_same(*in_double(MODEL, *RINGS[case], RING), EXACT)


@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_rings_send_the_bytes_of_the_collectives_that_they_replace(loop: Any) -> None:
    mesh, config = MeshShape(data=2, tensor=4), dataclasses.replace(MODEL, loop=loop)
    made = {}
    for by in (Manual(), RING):
        step = make_step(config, data() | tensor() | sequence(), mesh, by)
        traced = jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(ROWS))
        made[by] = per_axis(collectives(traced, mesh.sizes()))[("tensor",)], flops(traced)
    (plain, work), (ring, same_work) = made[Manual()], made[RING]
    assert "permute" not in plain
    assert sum(n for _, n in plain.values()) == sum(n for _, n in ring.values())
    assert work == same_work
    # A layer gathers twice and scatters twice, and so does its transpose: n - 1 permutes each.
    layers = config.layers * 8 * 3
    assert ring["permute"][0] >= layers
    for kind in ("all-gather", "reduce-scatter"):
        assert plain[kind][0] - ring.get(kind, (0, 0))[0] >= config.layers * 4


def test_rings_give_the_loss_of_the_collectives_to_the_last_bits() -> None:
    made = [
        train(make_step(MODEL, *RINGS["tensor sequence"], by), initial_params(MODEL), batches(MODEL, 1))
        for by in (Manual(), RING)
    ]
    assert made[0].metrics[0]["loss"] == pytest.approx(made[1].metrics[0]["loss"], rel=1e-6)


def _stays(x: Array, axis: str, n: int) -> Array:
    return x


@pytest.mark.parametrize("planted", ["_to_next", "_to_previous"])
def test_a_ring_that_does_not_turn_is_seen(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding.overlap, planted, _stays)
    with pytest.raises(AssertionError, match=r"departs|loss|grad_norm"):
        parity(MODEL, *RINGS["tensor sequence"], RING)


def test_an_unknown_overlap_is_refused() -> None:
    wrong: Any = "rings"
    with pytest.raises(InputError, match=r"Manual\(overlap='rings'\): it is 'none' or 'ring'"):
        Manual(overlap=wrong)
