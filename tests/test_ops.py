"""Every named op computes on a mesh what it computes on one device: values and gradients, many layouts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.attention import attention, rope
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.ops import cross_entropy, einsum, embed, positions, rms_norm
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules, also, if_free
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from tests.support import (
    Named,
    Through,
    Trained,
    assert_like_one_device,
    assert_same,
    batches,
    custom,
    departure,
    initial_params,
    make_step,
    model_configs,
    placements,
    train,
)

MESH = MeshShape(data=2, fsdp=2, tensor=2)
AXES = ("data", "fsdp", "tensor")
PARTITIONERS = [Manual(), Auto()]
BOUND = 4e-6
"""Relative to a leaf's largest entry: some 30 roundings of float32. Only the order of sums differs."""

Call = Callable[..., Any]
RANDOM = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


# embed

TOKENS = np.array([[3, 3, 3, 3, 0, 15, 8, 7], *([[5] * 8] * 3), *RANDOM.integers(0, 16, (4, 8))], np.int32)
"""Tokens that repeat within a row and between rows that lie on different devices: their gradients add up."""
EMBED = (
    lambda p, x: embed(p["w"], x["ids"], "batch length"),
    {"w": ("vocab embed", normal(16, 8))},
    {"ids": ("batch length", TOKENS)},
    "batch length embed",
)


def test_the_embeddings_gradient_adds_up_the_tokens_that_repeat() -> None:
    plain = Through(*EMBED).value_and_gradients()
    weigh = np.random.default_rng(1).normal(size=(8, 8, 8)).astype(np.float32)
    added = np.zeros((16, 8))
    np.add.at(added, TOKENS.ravel(), weigh.reshape(-1, 8))
    assert departure(plain["w"], added) < BOUND
    np.testing.assert_array_equal(plain[""], EMBED[1]["w"][1][TOKENS])


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=str)
@pytest.mark.parametrize(
    "rules", [data() | fsdp() | tensor(), data() | fsdp() | tensor() | sequence()], ids=repr
)
def test_embed_under_the_known_rules(rules: Rules, partitioner: Partitioner) -> None:
    assert_like_one_device(*EMBED, rules, MESH, partitioner)


@settings(max_examples=12)
@given(rules=placements(["batch length", "batch length embed"], ["vocab embed"], AXES))
def test_embed_for_any_layouts(rules: Rules) -> None:
    assert_like_one_device(*EMBED, rules, MESH, Manual())


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=str)
def test_a_table_used_in_bfloat16_is_gathered_in_it_and_its_gradients_are_summed_in_float32(
    partitioner: Partitioner,
) -> None:
    ids = np.zeros(
        (8, 512), np.int32
    )  # one row of the table, 4096 times: a sum in bfloat16 would stop growing
    narrow = Through(
        lambda p, x: embed(p["w"], x["ids"], "batch length", jnp.dtype("bfloat16")),
        EMBED[1],
        {"ids": ("batch length", ids)},
        "batch length embed",
        fsdp(),
        MESH,
        partitioner,
    )
    if partitioner == Manual():
        assert {(x.kind, x.dtype) for x in narrow.traced()} == {("all-gather", "bfloat16")}
    found = narrow.value_and_gradients()
    assert found[""].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[""], EMBED[1]["w"][1].astype(jnp.bfloat16)[ids])
    weigh = np.random.default_rng(1).normal(size=(8, 512, 8)).astype(jnp.bfloat16).astype(np.float64)
    added = np.zeros((16, 8))
    added[0] = weigh.sum((0, 1))
    assert departure(found["w"], added) < 0.01


# rms_norm

NORM = (
    lambda p, x: rms_norm(x["x"], p["scale"], "batch length embed"),
    {"scale": ("embed", normal(8))},
    {"x": ("batch length embed", normal(8, 8, 8))},
    "batch length embed",
)


def test_the_norm_is_its_formula() -> None:
    x, scale = NORM[2]["x"][1].astype(np.float64), NORM[1]["scale"][1]
    found = Through(*NORM).value()
    assert departure(found, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale) < BOUND


@settings(max_examples=10)
@given(
    rules=placements(["batch length embed"], ["embed"], AXES),
    partitioner=st.sampled_from([Manual(), Manual(), Auto()]),
)
def test_rms_norm_for_any_layouts(rules: Rules, partitioner: Partitioner) -> None:
    assert_like_one_device(*NORM, rules, MESH, partitioner)


# cross_entropy

LOSS = (
    lambda p, x: cross_entropy(x["z"], x["labels"], "batch length vocab"),
    {},
    {"z": ("batch length vocab", 30 * normal(8, 8, 16)), "labels": ("batch length", TOKENS)},
    "batch length",
)


def test_the_loss_is_that_of_optax() -> None:
    want = optax.softmax_cross_entropy_with_integer_labels(LOSS[2]["z"][1], LOSS[2]["labels"][1])
    assert departure(Through(*LOSS).value(), want) < BOUND


@settings(max_examples=12)
@given(
    rules=placements(["batch length", "batch length vocab"], [], AXES),
    partitioner=st.sampled_from([Manual(), Manual(), Auto()]),
)
def test_cross_entropy_for_any_layouts(rules: Rules, partitioner: Partitioner) -> None:
    assert_like_one_device(*LOSS, rules, MESH, partitioner)


# positions and rope

HEADS, KV = "batch length heads head_dim", "batch length kv_heads head_dim"
LENGTHS = [custom(activation={"length": "tensor"}), custom(activation={"length": "data"}) | sequence()]
SPLIT_TWICE = custom(activation={"length": also("data")}) | custom(activation={"length": also("tensor")})


@pytest.mark.parametrize("rules", [*LENGTHS, SPLIT_TWICE, data()], ids=range(4))
def test_positions_count_the_whole_length(rules: Rules) -> None:
    def call(p, x):
        return x["x"] + positions(x["x"], "batch length").astype(jnp.float32)[None, :]

    made = Through(
        call, {}, {"x": ("batch length", np.zeros((4, 16), np.float32))}, "batch length", rules, MESH
    )
    np.testing.assert_array_equal(made.value(), np.tile(np.arange(16.0), (4, 1)))


ROPE = (lambda p, x: rope(x["x"], HEADS), {}, {"x": (HEADS, normal(4, 8, 4, 8))}, HEADS)


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=str)
@pytest.mark.parametrize(
    "rules", [data() | tensor(), data() | custom(activation={"length": "tensor"}), SPLIT_TWICE], ids=range(3)
)
def test_rope_turns_by_the_global_position(rules: Rules, partitioner: Partitioner) -> None:
    assert_like_one_device(*ROPE, rules, MESH, partitioner)


def test_rope_is_a_rotation_whose_products_depend_on_the_distance_alone() -> None:
    x, y = normal(8), normal(8)

    def turn(v):
        return Through(*ROPE[:2], {"x": (HEADS, np.tile(v, (1, 16, 1, 1)))}, HEADS).value()[0, :, 0]

    products = turn(x) @ turn(y).T
    for distance in range(4):
        diagonal = np.diagonal(products, distance)
        assert departure(diagonal, np.full_like(diagonal, diagonal[0])) < 2e-5
    assert departure(np.linalg.norm(turn(x), axis=-1), np.full(16, np.linalg.norm(x))) < BOUND


def test_rope_with_a_split_head_dim_is_right_or_refused() -> None:
    rules = custom(activation={"head_dim": "tensor"})
    try:
        assert_like_one_device(*ROPE, rules, MESH, Manual())
    except InputError as error:
        assert "head_dim" in str(error)  # noqa: PT017 (refusing is right, and so is computing)


# attention

ATTENTION = (
    lambda p, x: attention(x["q"], x["k"], x["v"]),
    {},
    {"q": (HEADS, normal(4, 8, 4, 8)), "k": (KV, normal(4, 8, 2, 8)), "v": (KV, normal(4, 8, 2, 8))},
    HEADS,
)
SPLITS = {
    "heads and kv_heads": data() | tensor(),
    "kv_heads whole": data() | custom(activation={"heads": "tensor"}),
    "kv_heads whole, heads split twice": custom(activation={"heads": also("tensor")})
    | custom(activation={"heads": also("fsdp")})
    | data(),
    "heads split twice, kv_heads once": tensor() | custom(activation={"heads": also("fsdp")}) | data(),
    "heads whole": data() | custom(activation={"kv_heads": "tensor"}),
    "length": data() | custom(activation={"length": "tensor"}),
    "length of queries only": data()
    | custom(activation=lambda ask: {"length": "tensor"} if {"length", "heads"} <= {*ask.names} else {}),
    "length split twice": SPLIT_TWICE,
    "length and heads": data("fsdp") | tensor() | custom(activation={"length": "data"}),
    "head_dim": data() | custom(activation={"head_dim": "tensor"}),
    "batch of keys elsewhere": custom(activation={"heads": "tensor"})
    | custom(activation={"batch": if_free("tensor")}),
}


def test_attention_is_its_formula() -> None:
    (_, q), (_, k), (_, v) = ((n, a.astype(np.float64)) for n, a in ATTENTION[2].values())
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)  # query head h reads key head h // 2
    scores = np.einsum("bqhk,bshk->bhqs", q, k) * 8**-0.5
    scores = np.where(np.tril(np.ones((8, 8), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bhqs,bshk->bqhk", weights / weights.sum(-1, keepdims=True), v)
    assert departure(Through(*ATTENTION).value(), want) < BOUND


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=str)
@pytest.mark.parametrize("case", SPLITS)
def test_attention_for_chosen_layouts(case: str, partitioner: Partitioner) -> None:
    assert_like_one_device(*ATTENTION, SPLITS[case], MESH, partitioner)


def test_query_heads_that_key_heads_do_not_divide_are_refused() -> None:
    inputs = {"q": (HEADS, normal(2, 4, 4, 8)), "k": (KV, normal(2, 4, 3, 8)), "v": (KV, normal(2, 4, 3, 8))}
    with pytest.raises(InputError, match="4 query heads for 3 key heads"):
        Through(ATTENTION[0], {}, inputs, HEADS).value()


# what does not divide

UNEVEN: dict[str, tuple[Call, dict[str, Named], dict[str, Named], str]] = {
    "embed": (EMBED[0], {"w": ("vocab embed", normal(16, 6))}, EMBED[2], "batch length embed"),
    "rms_norm of a projection": (
        lambda p, x: rms_norm(
            einsum("batch length, length embed -> batch embed", x["x"], p["w"]), p["s"], "batch embed"
        ),
        {"w": ("length embed", normal(8, 6)), "s": ("embed", normal(6))},
        {"x": ("batch length", normal(8, 8))},
        "batch embed",
    ),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_a_dim_that_the_split_does_not_divide_is_refused_and_never_cut(case: str) -> None:
    rules = custom(activation={"embed": "tensor"})
    with pytest.raises(InputError, match=r"6.*does not divide|does not divide.*6"):
        Through(*UNEVEN[case], rules, MeshShape(data=2, tensor=4)).value()


# layers


@pytest.fixture(scope="module")
def loops() -> dict[tuple[str, str], Trained]:
    """One update of every model that has the choice, for each remat policy, scanned and unrolled."""
    rules = data() | fsdp() | tensor() | sequence()
    found = {}
    for remat, loop in itertools.product(("none", "dots", "full"), ("scan", "unroll")):
        config = dataclasses.replace(model_configs()["transformer"], remat=remat, loop=loop)
        found[remat, loop] = train(make_step(config, rules, MESH), initial_params(config), batches(config, 1))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["scan", "unroll"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scanned_and_rematerialized_layers_give_the_same_gradients(
    loops: dict[tuple[str, str], Trained], remat: str, loop: str
) -> None:
    assert_same(loops[remat, loop], loops["none", "unroll"], BOUND)


def test_an_unknown_remat_policy_is_refused() -> None:
    with pytest.raises(InputError, match="The policies are none, dots, full, or by name"):
        dataclasses.replace(model_configs()["transformer"], remat="some")
