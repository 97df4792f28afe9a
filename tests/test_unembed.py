"""Token losses without whole logits are those with them, on every mesh; and nothing as large as the logits is ever held."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array, lax

import sharding.unembed
from models.transformer_config import TransformerConfig
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.ledger import collectives, equations, flops
from sharding.ops import embed
from sharding.params import bind
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules, also
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.hsdp import hsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from sharding.rules.zero2 import zero2
from sharding.unembed import unembed
from tests.support import (
    Named,
    Through,
    assert_same,
    batches,
    custom,
    departure,
    initial_params,
    make_step,
    model_configs,
    oracle,
    place,
    placements,
    start,
    train,
    widened_arrays,
    worst,
)

MESH = MeshShape(data=2, fsdp=2, tensor=2)
AXES = ("data", "fsdp", "tensor")
BOUND = 4e-6
"""As in test_ops: some 30 roundings of float32, relative to a leaf's largest entry."""
EXACT = 1e-13
"""float64 likewise, with room for the 16 sums of a token and the 64 of a matrix."""
PARTITIONERS = [Manual(), Auto()]
TABLES = {"untied": "embed vocab", "tied": "vocab embed"}
TWO = custom(
    compute={"embed": "fsdp", "vocab": "tensor"},
    activation={"embed": "fsdp", "vocab": "tensor", "batch": "data"},
)
"""The matrix split both ways in use: its scores are summands until one of the two gives way."""
TURNED = custom(
    compute={"embed": "fsdp", "vocab": "tensor"},
    activation={"vocab": "tensor", "batch": also("data")},
) | custom(activation={"batch": also("fsdp")})
"""The same matrix, where the rows have an axis that it splits what is summed over."""
DRAW = np.random.default_rng(11)
X = 3 * DRAW.normal(size=(8, 10, 8)).astype(np.float32)
W = DRAW.normal(size=(8, 16)).astype(np.float32)
LABELS = DRAW.integers(0, 16, (8, 10)).astype(np.int32)


def both(chunk: int) -> Callable[..., Array]:
    """A function of both results, so that its gradient needs both of their gradients."""

    def call(params: Mapping[str, Any], inputs: Mapping[str, Array]) -> Array:
        nats, partition = unembed(inputs["x"], params["w"], inputs["labels"], "batch length embed", chunk)
        return nats + jnp.asarray(0.3, partition.dtype) * jnp.square(partition)

    return call


def case(table: str, length: int = 10) -> tuple[dict[str, Named], dict[str, Named]]:
    """Parameters and inputs of `both`."""
    w = W if TABLES[table] == "embed vocab" else W.T
    inputs = {"x": ("batch length embed", X[:, :length]), "labels": ("batch length", LABELS[:, :length])}
    return {"w": (TABLES[table], w)}, inputs


def formula(x: np.ndarray, w: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Value and gradients of `both` written down in numpy, in float64, with the weights that `Through` draws."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    z = x @ w
    partition = np.log(np.exp(z).sum(-1))
    nats = partition - np.take_along_axis(z, labels[..., None], -1)[..., 0]
    g = np.random.default_rng(1).normal(size=labels.shape).astype(np.float32).astype(np.float64)
    p, hit = np.exp(z - partition[..., None]), np.eye(w.shape[1])[labels]
    dz = (p - hit) * g[..., None] + p * (0.6 * partition * g)[..., None]
    return {"": nats + 0.3 * partition**2, "x": dz @ w.T, "w": np.einsum("bld,blv->dv", x, dz)}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("chunk", [0, 1, 4, 10, 1000])
def test_values_and_gradients_are_their_formula_for_any_chunk(table: str, chunk: int) -> None:
    want = formula(X, W, LABELS)
    want["w"] = want["w"] if table == "untied" else want["w"].T
    error, leaf = worst(Through(both(chunk), *case(table), "batch length").value_and_gradients(), want)
    assert error < BOUND, (leaf, error)


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=str)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "rules",
    [
        data() | fsdp() | tensor(),
        data() | fsdp() | tensor() | sequence(),
        data() | fsdp() | sequence(),
        TWO,
        TURNED,
    ],
    ids=["tensor", "tensor sequence", "context", "both ways", "both ways and rows"],
)
def test_under_the_known_rules(rules: Rules, table: str, partitioner: Partitioner) -> None:
    plain = Through(both(0), *case(table), "batch length").value_and_gradients()
    found = Through(both(3), *case(table), "batch length", rules, MESH, partitioner).value_and_gradients()
    error, leaf = worst(found, plain)
    assert error < BOUND, (leaf or "value", error)


@settings(max_examples=15)
@given(
    rules=placements(
        ["batch length embed", "batch length vocab", "batch length"], ["embed vocab", "vocab embed"], AXES
    ),
    table=st.sampled_from(sorted(TABLES)),
    chunk=st.integers(0, 9),
    partitioner=st.sampled_from([Manual(), Manual(), Auto()]),
)
def test_for_any_layouts(rules: Rules, table: str, chunk: int, partitioner: Partitioner) -> None:
    given = case(table, 8)
    plain = Through(both(0), *given, "batch length").value_and_gradients()
    found = Through(both(chunk), *given, "batch length", rules, MESH, partitioner).value_and_gradients()
    error, leaf = worst(found, plain)
    assert error < BOUND, (leaf or "value", error)


@pytest.mark.parametrize("rules", [data() | fsdp() | tensor() | sequence(), TWO], ids=["tensor", "both ways"])
def test_in_double_precision_only_rounding_is_left(rules: Rules) -> None:
    params, inputs = widened_arrays(case("untied"))
    with jax.enable_x64(True):
        plain = Through(both(0), params, inputs, "batch length").value_and_gradients()
        found = Through(both(4), params, inputs, "batch length", rules, MESH).value_and_gradients()
    assert all(y.dtype == np.float64 for y in found.values())
    error, leaf = worst(found, plain)
    assert error < EXACT, (leaf, error)


def test_scores_of_bfloat16_are_not_rounded_to_it() -> None:
    low = X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    params, inputs = {"w": ("embed vocab", W)}, {**case("untied")[1], "x": ("batch length embed", low[0])}
    want = formula(low[0].astype(np.float32), low[1].astype(np.float32), LABELS)[""]
    assert departure(Through(both(4), params, inputs, "batch length").value(), want) < BOUND
    assert departure(Through(both(0), params, inputs, "batch length").value(), want) > 1e-4
    found = Through(both(4), params, inputs, "batch length").value_and_gradients()
    assert found["x"].dtype == jnp.bfloat16
    assert found["w"].dtype == np.float32


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("mesh", [None, MESH], ids=["one device", "mesh"])
def test_a_label_that_is_no_column_has_the_score_zero(mesh: MeshShape | None, chunk: int) -> None:
    params, inputs = case("untied")
    labels = LABELS.copy()
    labels[0, :4] = -1, -100, 16, 2**31 - 1
    inputs = {**inputs, "labels": ("batch length", labels)}

    def nats(params: Any, inputs: Any) -> Array:
        return unembed(inputs["x"], params["w"], inputs["labels"], "batch length embed", chunk)[0]

    rules = Rules() if mesh is None else data() | fsdp() | tensor()
    found = Through(nats, params, inputs, "batch length", rules, mesh).value()
    z = X.astype(np.float64) @ W
    partition = np.log(np.exp(z).sum(-1))
    assert departure(found[0, :4], partition[0, :4]) < BOUND
    chosen = np.take_along_axis(z, LABELS[..., None], -1)[..., 0]
    assert departure(found[1:], (partition - chosen)[1:]) < BOUND


# what crosses devices, and what is held


def _step(config: Any, *split: Any, **more: Any) -> Any:
    step = make_step(config, *split, **more)
    return step, jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(16))


SMALL = model_configs()["transformer"]


def test_three_numbers_a_token_cross_devices_once_for_all_chunks() -> None:
    found = Through(both(2), *case("untied"), "batch length", data() | tensor(), MeshShape(data=4, tensor=2))
    moved = found.traced()
    assert [(c.kind, c.axes, c.shape, c.times) for c in moved] == 3 * [
        ("all-reduce", ("tensor",), (2, 10), 1)
    ]
    assert sum(c.bytes for c in moved) == 3 * 2 * 10 * 4 * 2 * (2 - 1) // 2


def test_a_matrix_split_both_ways_is_brought_together_and_no_work_repeated() -> None:
    for rules, moves in ((TWO, "all-to-all"), (TURNED, "all-gather")):
        found = Through(both(2), *case("untied", 8), "batch length", rules, MESH)
        moved = found.traced()
        assert all(c.times == 1 for c in moved)
        assert next(c.kind for c in moved if c.axes == ("fsdp",)) == moves
        assert ("all-gather", (4, 8)) in [
            (c.kind, c.shape) for c in moved if c.axes == ("fsdp",)
        ]  # the matrix
        products = flops(jax.make_jaxpr(found.function)(*found.arguments()))
        assert products == 2 * 8 * 8 * 8 * 16 // 8


@pytest.mark.parametrize(
    ("rules", "mesh"),
    [
        (data() | fsdp() | tensor(), MESH),
        (fsdp() | sequence("context") | tensor(), MeshShape(fsdp=2, context=2, tensor=2)),
    ],
)
def test_chunks_send_what_whole_logits_send_backward_too(rules: Rules, mesh: MeshShape) -> None:
    sent = []
    for chunk in (0, 1, 2):
        config = dataclasses.replace(SMALL, loss_chunk=chunk, loop="unroll")
        step, traced = _step(config, rules, mesh)
        found = collectives(traced, step.split.layouts.sizes)
        assert all(c.times == 1 for c in found), [c for c in found if c.times > 1]
        sent.append(sum(c.bytes for c in found))
    assert sent[1] == sent[2]
    assert sent[1] <= sent[0]


def _largest(traced: Any) -> int:
    """Elements of the largest array that a traced program makes inside a device's part of it."""
    return max(
        math.prod(getattr(v.aval, "shape", ())) for eqn, *_ in equations(traced.jaxpr) for v in eqn.outvars
    )


def test_no_array_as_large_as_the_logits_is_ever_made() -> None:
    config = dataclasses.replace(SMALL, vocab=4096)
    tokens, columns = 16 // 4 * SMALL.length, 4096 // 2
    held = [
        _largest(_step(dataclasses.replace(config, loss_chunk=n), data() | fsdp() | tensor(), MESH)[1])
        for n in (0, 1, 2)
    ]
    assert held[0] >= tokens * columns  # as it is without chunks, so that the test could fail
    assert held[1] <= max(tokens * columns // SMALL.length, 4096 * SMALL.embed)
    assert held[2] <= max(tokens * columns // SMALL.length * 2, 4096 * SMALL.embed)


@pytest.mark.parametrize("tied", TABLES)
def test_temporary_memory_at_a_vocabulary_of_128k_is_a_fourth(tied: Any) -> None:
    config = TransformerConfig(
        vocab=2**17,
        layers=2,
        embed=512,
        heads=8,
        kv_heads=4,
        head_dim=64,
        mlp=1536,
        length=1024,
        unembed=tied,
    )
    temp = []
    for chunk in (0, 64):
        step = make_step(dataclasses.replace(config, loss_chunk=chunk))
        lowered = step.step.lower(step.abstract_state(), step.abstract_batch(8))
        memory: Any = lowered.compile().memory_analysis()
        temp.append(memory.temp_size_in_bytes)
    assert temp[0] > 8 * 1024 * 2**17 * 4
    assert temp[1] * 4 <= temp[0], temp


# the model

CASES: dict[str, tuple[Rules, MeshShape, dict[str, Any]]] = {
    "data": (data(), MeshShape(data=8), {"unembed": "tied"}),
    "fsdp": (fsdp(), MeshShape(fsdp=8), {}),
    "tensor": (tensor(), MeshShape(tensor=4), {"unembed": "tied"}),
    "data fsdp tensor sequence": (data() | fsdp() | tensor() | sequence(), MESH, {"unembed": "tied"}),
    "hsdp tensor": (hsdp("replica") | tensor(), MeshShape(replica=2, fsdp=2, tensor=2), {}),
    "zero2 tensor sequence": (zero2() | tensor() | sequence(), MeshShape(data=4, tensor=2), {}),
    "data context": (data() | sequence("context"), MeshShape(data=2, context=4), {"unembed": "tied"}),
    "fsdp context tensor": (
        fsdp() | sequence("context") | tensor(),
        MeshShape(fsdp=2, context=2, tensor=2),
        {"loop": "scan"},
    ),
}
QUICK = {"data", "data fsdp tensor sequence", "fsdp context tensor"}


def chunked(**changes: Any) -> Any:
    """The shrunk transformer in chunks of 3 of its 8 positions, which leaves a shorter one, with a large z-loss."""
    return dataclasses.replace(SMALL, **{"loss_chunk": 3, "z_loss": 0.1, **changes})


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize(
    "name", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_the_transformer_trains_as_on_one_device_with_whole_logits(
    name: str, partitioner: Partitioner
) -> None:
    # Weights differ by row and the first eighth of the rows weighs nothing: over data = 8, all that one device has.
    rules, mesh, changes = CASES[name]
    config = chunked(**changes)
    step = make_step(config, rules, mesh, partitioner, accumulate=1 + list(CASES).index(name) % 2)
    found = train(step, initial_params(config), batches(config, 3))
    assert_same(found, oracle(dataclasses.replace(config, loss_chunk=0), 3), 1e-5)


def test_the_loss_told_is_the_cross_entropy_and_what_is_minimized_is_beside_it() -> None:
    plain, with_z = oracle(SMALL, 1), oracle(chunked(), 1)
    told = with_z.metrics[0]
    assert told["loss"] == pytest.approx(plain.metrics[0]["loss"], rel=1e-6)
    assert told["objective"] == pytest.approx(told["loss"] + told["z_loss"], rel=1e-6)
    assert set(plain.metrics[0]) == {"loss", "weight", "grad_norm"}

    (batch,), params = batches(SMALL, 1), initial_params(SMALL)

    def penalty(params: Any) -> Array:
        z = bind(SMALL.build(), params).logits(jnp.array(batch["tokens"]))
        far = jnp.square(jax.nn.logsumexp(z, axis=-1)) * batch["weights"]
        return jnp.float32(0.1) * far.sum() / jnp.float32(batch["weights"].sum())

    value, gradient = jax.value_and_grad(penalty)(jax.tree.map(jnp.array, params))
    assert told["z_loss"] == pytest.approx(float(value), rel=1e-5)
    grown = {p: with_z.gradients[0][p] - plain.gradients[0][p] for p in params}
    scale = max(float(np.abs(g).max()) for g in plain.gradients[0].values())
    for path, g in gradient.items():
        assert np.abs(grown[path] - np.asarray(g)).max() < 1e-5 * scale, path
    assert max(float(np.abs(np.asarray(g)).max()) for g in gradient.values()) > 0.01 * scale


def test_evaluation_tells_the_cross_entropy() -> None:
    (batch,), params = batches(SMALL, 1), initial_params(SMALL)
    sums = []
    for step in (make_step(SMALL), make_step(chunked(), data() | fsdp() | tensor(), MESH)):
        made = step.evaluate(start(step, params)["params"], place(step, batch))
        sums.append({k: float(v) for k, v in made.items()})
    assert sums[1]["loss"] == pytest.approx(sums[0]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("loss_chunk", -1, r"loss_chunk=-1.* Set model.loss_chunk to 1 or more, or to 0"),
        ("z_loss", -0.1, r"z_loss=-0.1.* Set model.z_loss to 1e-4"),
        ("z_loss", math.nan, "z_loss=nan"),
        ("z_loss", math.inf, "z_loss=inf"),
    ],
)
def test_a_config_without_meaning_is_refused(field: str, value: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        TransformerConfig(**{field: value})


@pytest.mark.parametrize(
    ("names", "shape"), [("mlp vocab", (8, 16)), ("embed", (8,)), ("embed heads vocab", (8, 2, 8))]
)
def test_a_table_of_other_dims_is_refused(names: str, shape: tuple[int, ...]) -> None:
    given = {"w": (names, np.ones(shape, np.float32))}
    with pytest.raises(InputError, match=rf"one is 'embed'.*{names}.*Declare it as 'embed vocab'"):
        Through(both(4), given, case("untied")[1], "batch length").value()


def test_a_chunk_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match="chunks of -2 positions"):
        Through(both(-2), *case("untied"), "batch length").value()


# planted faults


def _depart(monkeypatch: pytest.MonkeyPatch, name: str, planted: Any) -> float:
    rules, mesh, given = data() | fsdp() | tensor(), MESH, case("untied")
    plain = Through(both(0), *given, "batch length").value_and_gradients()
    monkeypatch.setattr(sharding.unembed, name, planted)
    return worst(Through(both(3), *given, "batch length", rules, mesh).value_and_gradients(), plain)[0]


FAULTS: dict[str, tuple[str, Any]] = {
    "every chunk takes the first positions": ("_starts", lambda size, count: jnp.zeros(count, jnp.int32)),
    "a label's column is sought on every device": (
        "_is_label",
        lambda z, labels: labels[..., None] % 8 == lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1),
    ),
    "chunks come back in another order": ("_joined", lambda y: jnp.moveaxis(y[::-1], 0, -2).reshape(2, -1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_departs_from_one_device(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _depart(monkeypatch, *FAULTS[fault]) > 1000 * BOUND


class Unreduced:
    """jax.lax, whose sums stay where they are made."""

    def __getattr__(self, name: str) -> Any:
        return (lambda x, _: x) if name in ("psum", "pmax") else getattr(lax, name)


def test_sums_over_the_columns_that_are_forgotten_are_an_error_of_types(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises((ValueError, TypeError)):
        _depart(monkeypatch, "lax", Unreduced())


# the embedding gather, whose backward pass is a scatter: against a dense product of one-hot rows, in double precision

IDS = {
    "repeated": np.array(
        [[3, 3, 3, 3, 0, 15, 8, 7], *([[5] * 8] * 3), *DRAW.integers(0, 16, (4, 8))], np.int32
    ),
    "all in the first shard": DRAW.integers(0, 4, (8, 8)).astype(np.int32),
    "all in the last shard": DRAW.integers(12, 16, (8, 8)).astype(np.int32),
    "one": np.full((8, 8), 9, np.int32),
}


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize(
    "rules", [data() | tensor(), data() | tensor() | sequence()], ids=["whole", "sequence"]
)
def test_rows_of_a_split_table_are_a_dense_product(rules: Rules, ids: str, partitioner: Partitioner) -> None:
    table = DRAW.normal(size=(16, 8))
    params: dict[str, Named] = {"w": ("vocab embed", table)}
    inputs: dict[str, Named] = {"ids": ("batch length", IDS[ids])}
    hot = np.eye(16)[IDS[ids]]
    weigh = np.random.default_rng(1).normal(size=(8, 8, 8))
    want = {"": hot @ table, "w": np.einsum("blv,bld->vd", hot, weigh)}

    def call(params: Any, inputs: Any) -> Array:
        return embed(params["w"], inputs["ids"], "batch length")

    with jax.enable_x64(True):
        lies = (rules, MeshShape(data=2, tensor=4), partitioner)
        found = Through(call, params, inputs, "batch length embed", *lies).value_and_gradients()
    assert found["w"].dtype == np.float64
    assert worst(found, want)[0] < EXACT
