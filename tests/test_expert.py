"""Expert parallelism: routing that no mesh changes, one all-to-all each way, balance, and experts without capacity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import models.moe
import sharding.region
import sharding.routing
from models.moe_config import MoEConfig
from models.transformer_config import TransformerConfig
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.grouped import BLOCK, _by_blocks, dropless
from sharding.layout import Layouts
from sharding.ledger import collectives
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.routing import combine, dispatch, dropped, seat, slots_of, top_k
from sharding.rule import Rules, also
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.expert import expert
from sharding.rules.fsdp import fsdp
from sharding.rules.hsdp import hsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from sharding.rules.ulysses import ulysses
from sharding.signed import rates
from tests.support import (
    Through,
    assert_same,
    batches,
    custom,
    departure,
    in_double,
    initial_params,
    make_step,
    oracle,
    shrunk,
    train,
    worst,
)

BOUND = 1e-5
"""As in test_parity: float32, relative to a leaf's largest entry."""
EXACT = 1e-12
PARTITIONERS = [Manual(), Auto()]
TIGHT = shrunk(MoEConfig(), capacity=0.5, router_z=0.01)
"""A model that drops choices: 8 slots where an even load is 8."""
TIGHT = dataclasses.replace(TIGHT, length=32)
FREE = dataclasses.replace(TIGHT, capacity=math.inf)
FULL = dataclasses.replace(TIGHT, shared=1, gates="all", balance_over="batch", bias_rate=0.01, balance=0.1)

MESHES: dict[str, tuple[Rules, MeshShape]] = {
    "expert": (expert(), MeshShape(expert=8)),
    "data expert": (data() | expert(), MeshShape(data=2, expert=4)),
    "fsdp expert": (fsdp() | expert(), MeshShape(fsdp=2, expert=4)),
    "fsdp expert tensor": (fsdp() | expert() | tensor(), MeshShape(fsdp=2, expert=2, tensor=2)),
    "expert tensor sequence": (expert() | tensor() | sequence(), MeshShape(expert=4, tensor=2)),
    "hsdp expert": (hsdp() | expert(), MeshShape(data=2, fsdp=2, expert=2)),
    "expert before fsdp": (expert() | fsdp(), MeshShape(fsdp=2, expert=2)),
    "data expert context": (data() | expert() | context(), MeshShape(data=2, expert=2, context=2)),
    "no expert": (data() | fsdp() | tensor(), MeshShape(data=2, fsdp=2, tensor=2)),
}


def some(*quick: str) -> list[Any]:
    """Every mesh, all but the named ones marked slow."""
    return [c if c in quick else pytest.param(c, marks=pytest.mark.slow) for c in MESHES]


def check(config: Any, case: str, partitioner: Partitioner, accumulate: int = 1) -> None:
    """Two updates on a mesh are those of one device."""
    step = make_step(config, *MESHES[case], partitioner, accumulate)
    found = train(step, initial_params(config), batches(config, 2))
    assert_same(found, oracle(config, 2), BOUND)


# the rule


def test_the_rule_tells_what_holds_experts_from_what_scores_them() -> None:
    layouts = Layouts(data() | fsdp() | expert() | tensor(), {"data": 2, "fsdp": 2, "expert": 2, "tensor": 2})
    lies = lambda names: layouts.activation(tuple(names.split())).text()
    assert lies("batch length routes") == "batch/data/fsdp/expert length routes"
    assert lies("expert batch slots embed") == "expert/expert batch/data/fsdp slots embed"
    assert lies("expert batch slots gates mlp") == "expert/expert batch/data/fsdp slots gates mlp/tensor"
    held = layouts.param("up", ("layers", "expert", "embed", "gates", "mlp"), (2, 8, 8, 2, 8))
    assert held.compute.text() == "layers expert/expert embed gates mlp/tensor"
    assert held.param.text() == "layers expert/expert embed/fsdp gates mlp/tensor"
    assert layouts.param("router", ("layers", "embed", "routes"), (2, 8, 8)).compute.axes == ()
    assert layouts.param("bias", ("layers", "routes"), (2, 8)).compute.axes == ()


# what is routed where

SCORES, TOKEN = "batch length routes", "batch length embed"


def routed(scores: np.ndarray, k: int, factor: float, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rule in plain Python: experts (batch, length, k) and whether each choice has a slot."""
    rows, length, count = scores.shape
    each = 8 * math.ceil(math.ceil(length * k * factor / count) / 8)
    experts = np.zeros((rows, length, k), int)
    kept = np.zeros((rows, length, k), bool)
    for b in range(rows):
        held = [0] * count
        for at in range(length):
            best = sorted(range(count), key=lambda e: (-scores[b, at, e], e))[:k]
            experts[b, at] = best
            for j, e in enumerate(best):
                if present[b, at] and held[e] < each:
                    held[e] += 1
                    kept[b, at, j] = True
    return experts, kept


def through(k: int, factor: float, gates: Any = "chosen") -> Callable[..., Any]:
    """Tokens to their experts, where expert e multiplies by e + 1 and by a parameter, and back."""

    def call(p: Any, x: Any) -> Any:
        seats = seat(top_k(x["scores"], k, x["weights"] > 0, gates), factor)
        slots = dispatch(x["x"], seats)
        from sharding.ops import einsum

        scaled = einsum(
            "expert batch slots embed, expert embed mlp -> expert batch slots mlp", slots, p["up"]
        )
        made = einsum(
            "expert batch slots mlp, expert mlp embed -> expert batch slots embed", scaled, p["down"]
        )
        lost = dropped(seats)
        return combine(made, seats) + jax.lax.stop_gradient(lost)[..., None]

    return call


def given_inputs(seed: int, rows: int = 8, length: int = 16, count: int = 4, ties: bool = True) -> Any:
    draw = np.random.default_rng(seed)
    scores = draw.integers(0, 3, (rows, length, count)) if ties else draw.normal(size=(rows, length, count))
    weights = draw.integers(0, 3, (rows, length)).astype(np.float32)
    inputs = {
        "x": (TOKEN, draw.normal(size=(rows, length, 4)).astype(np.float32)),
        "scores": (SCORES, scores.astype(np.float32)),
        "weights": ("batch length", weights),
    }
    up = draw.normal(size=(count, 4, 8)).astype(np.float32)
    down = draw.normal(size=(count, 8, 4)).astype(np.float32)
    return {"up": ("expert embed mlp", up), "down": ("expert mlp embed", down)}, inputs


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, 3), factor=st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_slots_are_given_out_in_order_of_position_and_ties_go_to_the_lower_expert(
    seed: int, k: int, factor: float
) -> None:
    params, inputs = given_inputs(seed, rows=2, length=32)
    found = Through(through(k, factor), params, inputs, TOKEN).value()
    x, scores, weights = (inputs[n][1].astype(np.float64) for n in ("x", "scores", "weights"))
    experts, kept = routed(scores, k, factor, weights > 0)
    own = np.take_along_axis(scores, experts, axis=-1)
    gates = np.exp(own) / np.exp(own).sum(-1, keepdims=True)
    made = np.einsum("bld,edf,efg->bleg", x, params["up"][1], params["down"][1])
    chosen = np.take_along_axis(made, experts[..., None], axis=2)
    want = (chosen * (gates * kept)[..., None]).sum(2)
    want += (np.where(weights > 0, 1 - kept.mean(-1), 0.0))[..., None]
    assert departure(found, want) < 1e-5
    assert not kept.all()


LAYOUTS: dict[str, tuple[Rules, MeshShape]] = {
    "data expert": (data() | expert(), MeshShape(data=2, expert=4)),
    "expert tensor": (expert() | tensor(), MeshShape(expert=4, tensor=2)),
    "expert tensor sequence": (
        data() | expert() | tensor() | sequence(),
        MeshShape(data=2, expert=2, tensor=2),
    ),
    "expert context": (expert() | context(), MeshShape(expert=2, context=4)),
    "context in natural order": (expert() | context(order="contiguous"), MeshShape(expert=2, context=4)),
    "expert ulysses": (expert() | ulysses(), MeshShape(expert=4, context=2)),
    "length split, slots whole": (
        expert() | custom(activation=lambda ask: {"length": "tensor"} if "length" in ask.names else {}),
        MeshShape(expert=4, tensor=2),
    ),
    "embed split": (
        expert() | custom(activation={"embed": "tensor"}, compute={"embed": "tensor"}),
        MeshShape(expert=4, tensor=2),
    ),
    "scores split": (
        data() | custom(activation=lambda ask: {"routes": "tensor"} if ask.names[-1] == "routes" else {}),
        MeshShape(data=2, tensor=4),
    ),
    "expert before data": (expert() | data(), MeshShape(data=2, expert=4)),
}


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_tokens_go_and_come_back_alike_for_chosen_layouts(case: str, partitioner: Partitioner) -> None:
    rules, mesh = LAYOUTS[case]
    params, inputs = given_inputs(5, length=32)
    call = through(2, 0.5, "all")
    plain = Through(call, params, inputs, TOKEN).value_and_gradients()
    found = Through(call, params, inputs, TOKEN, rules, mesh, partitioner)
    error, leaf = worst(found.value_and_gradients(), plain)
    assert error < BOUND, (leaf or "value", error)


def chosen_experts(_: Any, x: Any) -> Any:
    route = top_k(x["scores"], 2, x["weights"] > 0)
    return sharding.routing.chosen(route)


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize("case", ["data expert", "expert tensor sequence", "expert context"])
def test_equal_scores_choose_the_same_experts_on_every_mesh(case: str, partitioner: Partitioner) -> None:
    _, inputs = given_inputs(3, length=32)
    inputs.pop("x")
    plain = Through(chosen_experts, {}, inputs, SCORES).value()
    experts, _ = routed(inputs["scores"][1], 2, 1.0, inputs["weights"][1] > 0)
    want = np.zeros(plain.shape)
    np.put_along_axis(want, experts, 1.0, axis=-1)
    np.testing.assert_array_equal(plain, want * (inputs["weights"][1] > 0)[..., None])
    rules, mesh = LAYOUTS[case]
    np.testing.assert_array_equal(
        Through(chosen_experts, {}, inputs, SCORES, rules, mesh, partitioner).value(), plain
    )


def test_no_token_depends_on_a_later_one() -> None:
    step = make_step(TIGHT)
    params = {p: jnp.array(w) for p, w in initial_params(TIGHT).items()}
    tokens = batches(TIGHT, 1)[0]["tokens"]
    later = tokens.copy()
    later[:, 20:] = (later[:, 20:] + 7) % 32
    forward = lambda t: np.asarray(
        step.forward(params, "logits", "batch length vocab", (jnp.array(t), "batch length"))
    )
    a, b = forward(tokens), forward(later)
    assert departure(a[:, :20], b[:, :20]) < BOUND
    assert departure(a[:, 20:], b[:, 20:]) > 0.01


@pytest.mark.parametrize("k", [0, 5])
def test_choosing_more_experts_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=f"choose {k} of 4"):
        top_k(jnp.zeros((1, 2, 4)), k, jnp.ones((1, 2), bool))


def test_slots_are_an_equal_share_up_to_a_multiple_of_eight() -> None:
    assert slots_of(256, 2, 8, 1.0) == 64
    assert slots_of(256, 2, 8, 1.25) == 80
    assert slots_of(8, 2, 8, 1.0) == 8
    assert slots_of(100, 1, 3, 1.0) == 40


# models


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize("case", some("data expert context", "expert tensor sequence"))
def test_a_mixture_that_drops_tokens_is_that_of_one_device(case: str, partitioner: Partitioner) -> None:
    assert oracle(TIGHT, 2).metrics[0]["dropped"] > 0.02, "nothing is dropped, so nothing is tested"
    check(TIGHT, case, partitioner, accumulate=1 + list(MESHES).index(case) % 2)


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize("case", some("fsdp expert tensor"))
def test_a_dropless_mixture_is_that_of_one_device(case: str, partitioner: Partitioner) -> None:
    check(FREE, case, partitioner, accumulate=1 + list(MESHES).index(case) % 2)


@pytest.mark.slow
@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize("case", MESHES)
def test_shared_experts_and_balance_over_the_batch_on_every_mesh(case: str, partitioner: Partitioner) -> None:
    check(FULL, case, partitioner)


@pytest.mark.parametrize("capacity", [0.5, math.inf])
def test_in_double_precision_only_rounding_is_left(capacity: float) -> None:
    config = dataclasses.replace(FULL, capacity=capacity)
    assert_same(*in_double(config, *MESHES["expert tensor sequence"]), EXACT)


@pytest.mark.parametrize(
    ("remat", "loop"),
    [("full", "scan"), *(pytest.param(r, "scan", marks=pytest.mark.slow) for r in ("none", "dots"))],
)
def test_scanned_and_rematerialized_layers_sum_alike(remat: Any, loop: Any) -> None:
    step = make_step(dataclasses.replace(TIGHT, remat=remat, loop=loop), *MESHES["data expert"])
    found, want = train(step, initial_params(TIGHT), batches(TIGHT, 1)), oracle(TIGHT, 2)
    assert found.metrics[0] == pytest.approx(want.metrics[0], rel=BOUND)
    assert worst(found.gradients[0], want.gradients[0])[0] < BOUND


def test_dropless_is_capacity_that_is_never_reached() -> None:
    roomy = dataclasses.replace(TIGHT, capacity=TIGHT.experts / TIGHT.top)
    one, other = (train(make_step(c), initial_params(TIGHT), batches(TIGHT, 1)) for c in (roomy, FREE))
    assert one.metrics[0].pop("dropped") == 0
    assert_same(one, other, BOUND)


def test_padding_goes_to_no_expert_and_counts_nowhere() -> None:
    (batch,) = batches(FULL, 1)
    other = {**batch, "tokens": batch["tokens"].copy()}
    assert not batch["weights"][:2].any()
    other["tokens"][:2] = 0  # two rows of padding that would all choose the same experts
    made = [train(make_step(FULL), initial_params(FULL), [b]) for b in (batch, other)]
    assert_same(made[0], made[1], 1e-6)


def test_packed_documents_go_to_experts_alike_and_their_padding_to_none() -> None:
    config = dataclasses.replace(FREE, documents="packed")
    rows = batches(config, 2)
    for batch in rows:
        batch["segments"] = np.sort(batch["segments"] % 4, axis=1)
        batch["weights"][batch["segments"] == 0] = 0
    step = make_step(config, *MESHES["data expert context"])
    want = train(make_step(config), initial_params(config), rows)
    assert_same(train(step, initial_params(config), rows), want, BOUND)
    rows[0]["tokens"] = np.where(rows[0]["segments"] == 0, 0, rows[0]["tokens"])
    again = train(make_step(config), initial_params(config), rows)
    assert_same(again, want, BOUND)


# faults

FAULTS: dict[str, tuple[Any, str, Any]] = {
    "slots of another device": (
        sharding.routing,
        "_part",
        lambda region, each, home: (each if not (region and home[2]) else each // 2, 0),
    ),
    "rows of slots that are not sent": (
        sharding.routing,
        "_between",
        lambda region, x, home, away: (
            jnp.roll(REAL_BETWEEN(region, x, home, away), 1, axis=0) if region else x
        ),
    ),
    "statistics of a shard": (
        models.moe,
        "chosen",
        lambda route: sharding.routing.chosen(route) * (1.0 + jnp.float32(route.experts.shape[0])),
    ),
}
REAL_BETWEEN = sharding.routing._between


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_departs_from_one_device(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = oracle(TIGHT, 2)
    monkeypatch.setattr(*FAULTS[fault])
    step = make_step(TIGHT, *MESHES["expert tensor sequence"])
    found = train(step, initial_params(TIGHT), batches(TIGHT, 2))
    assert worst(found.gradients[0], want.gradients[0])[0] > 100 * BOUND


# what it costs


def sent(config: Any, rules: Rules, mesh: MeshShape, kind: str, axis: str, rows: int = 16) -> int:
    step = make_step(config, rules, mesh)
    found = collectives(
        jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(rows)), mesh.sizes()
    )
    return sum(c.bytes for c in found if c.axes == (axis,) and c.kind == kind)


@pytest.mark.parametrize(
    ("case", "parts"), [("data expert", 8), ("fsdp expert tensor", 4), ("expert tensor sequence", 8)]
)
def test_the_all_to_all_sends_its_closed_form(case: str, parts: int) -> None:
    rules, mesh = MESHES[case]
    config, n = dataclasses.replace(TIGHT, capacity=1.0), mesh.expert
    slots = config.experts * slots_of(config.length, config.top, config.experts, 1.0)
    # A row's slots, there and back, forward and backward, of the rows (and slots) of one device.
    want = config.layers * 4 * (16 * slots // parts) * config.embed * 4 * (n - 1) // n
    assert sent(config, rules, mesh, "all-to-all", "expert") == want


def test_dropless_gathers_tokens_and_scatters_results() -> None:
    rules, mesh = MESHES["data expert"]
    tokens = (
        16 * FREE.length // 8 * FREE.embed * 4 * 3
    )  # of one device, to the three others that share its experts
    chosen = 16 * FREE.length // 8 * FREE.top * 4 * 3
    gathered = FREE.layers * (
        2 * tokens + 2 * chosen
    )  # forward tokens, gates, experts; backward results' gradients
    assert sent(FREE, rules, mesh, "all-gather", "expert") == gathered
    assert sent(FREE, rules, mesh, "all-to-all", "expert") == 0


def compiled_flops(config: Any) -> float:
    step = make_step(config)
    made: Any = step.step.lower(step.abstract_state(), step.abstract_batch(4)).compile().cost_analysis()
    return (made[0] if isinstance(made, list) else made)["flops"]


def test_balanced_experts_cost_the_products_of_a_dense_model_of_the_same_active_size() -> None:
    sizes: dict[str, Any] = {"vocab": 64, "layers": 2, "embed": 128, "heads": 4, "kv_heads": 2, "length": 128}
    mixed = MoEConfig(**sizes, mlp=128, experts=8, top=2, capacity=1.0, loop="unroll")
    dense = TransformerConfig(**sizes, mlp=256, loop="unroll")
    assert compiled_flops(mixed) / compiled_flops(dense) == pytest.approx(1.0, abs=0.03)


# balance


def test_the_auxiliary_loss_is_its_formula_over_rows_and_over_the_batch() -> None:
    (batch,), params = batches(TIGHT, 1), initial_params(TIGHT)
    weights = batch["weights"].astype(np.float64)
    seen: list[np.ndarray] = []
    shares: list[np.ndarray] = []
    for over in ("row", "batch"):
        config = dataclasses.replace(TIGHT, layers=1, balance_over=over, balance=1.0, router_z=0.0)
        one = {p: w[:1] if p.startswith("layers.") else w for p, w in params.items()}
        step = make_step(config)
        real = models.moe.statistics

        def keep(s: Any, e: Any) -> None:
            seen.append(s)
            shares.append(e)

        def listening(c: Any, scores: Any, route: Any, *rest: Any, real: Any = real) -> Any:
            jax.debug.callback(keep, scores, route.experts)
            return real(c, scores, route, *rest)

        models.moe.statistics = listening
        try:
            found = jax.device_get(step.evaluation(*jax.tree.map(jnp.array, (one, batch))))
        finally:
            models.moe.statistics = real
        scores, experts = np.asarray(seen[-1]).astype(np.float64), np.asarray(shares[-1])
        p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        f = np.zeros_like(p)
        np.put_along_axis(f, experts, 1 / config.top, axis=-1)
        if over == "row":
            f, p = (np.einsum("ble,bl->be", a, weights) for a in (f, p))
            want = sum(8 * (f[b] * p[b]).sum() / weights[b].sum() for b in range(16) if weights[b].any())
        else:
            f, p = (np.einsum("ble,bl->e", a, weights) for a in (f, p))
            want = 8 * (f * p).sum() / weights.sum()
        assert found["balance"] == pytest.approx(want, rel=1e-5)


BIASED = dataclasses.replace(TIGHT, balance=0.0, bias_rate=0.05)


def test_a_bias_is_moved_by_the_sign_of_its_load_error_and_evens_the_load() -> None:
    model = BIASED.build()
    assert rates(model) == {"layers.mlp.bias": 0.05}
    data_ = [batches(BIASED, 1)[0]] * 12
    made = train(make_step(BIASED, optimizer=optax.sgd(0.0)), initial_params(BIASED), data_)
    first, last = (made.metrics[at]["dropped"] for at in (0, -1))
    assert last < 0.8 * first
    bias = made.params["layers.mlp.bias"]
    np.testing.assert_allclose(bias / 0.05, np.round(bias / 0.05), atol=1e-3)
    assert np.abs(bias).max() > 0.05
    for path, w in initial_params(BIASED).items():
        assert path == "layers.mlp.bias" or np.array_equal(made.params[path], w), "the bias alone is moved"


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bias_moves_alike_on_every_mesh_to_the_bit(partitioner: Partitioner, accumulate: int) -> None:
    rows = batches(BIASED, 1)
    optimizer = optax.sgd(0.0)
    one = train(make_step(BIASED, optimizer=optimizer), initial_params(BIASED), rows)
    many = train(
        make_step(BIASED, *MESHES["fsdp expert tensor"], partitioner, accumulate, optimizer=optimizer),
        initial_params(BIASED),
        rows,
    )
    path = "layers.mlp.bias"
    np.testing.assert_array_equal(many.params[path], one.params[path])
    assert departure(many.gradients[0][path], one.gradients[0][path]) < BOUND
    counts = one.gradients[0][path] * 1024 * rows[0]["weights"].sum()
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-2)
    np.testing.assert_allclose(counts.sum(-1), 0, atol=0.05)


# products over groups


@settings(max_examples=10, deadline=None)
@given(blocks=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_products_by_block_are_those_of_each_group(blocks: list[int]) -> None:
    draw = np.random.default_rng(sum(blocks))
    sizes, rows = [n * BLOCK for n in blocks], BLOCK * (sum(blocks) + 1)
    x, w = draw.normal(size=(rows, 3)), draw.normal(size=(len(blocks), 3, 5))
    dy = draw.normal(size=(rows, 5))
    x, w, dy = (a.astype(np.float32) for a in (x, w, dy))
    made, pull = jax.vjp(
        lambda x, w: _by_blocks(x, w, jnp.array(sizes, jnp.int32)), jnp.array(x), jnp.array(w)
    )
    dx, dw = pull(jnp.array(dy))
    first = 0
    for e, n in enumerate(sizes):
        at = slice(first, first + n)
        np.testing.assert_allclose(made[at], x[at] @ w[e], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dx[at], dy[at] @ w[e].T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dw[e], x[at].T @ dy[at], rtol=1e-3, atol=1e-4)
        first += n
    assert not np.asarray(made[first:]).any()


def test_ragged_products_of_an_accelerator_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    want = train(make_step(FREE), initial_params(FREE), batches(FREE, 1))
    monkeypatch.setattr("sharding.grouped.BLOCK", 1)  # what says that groups need not be filled up
    found = train(make_step(FREE, *MESHES["fsdp expert tensor"]), initial_params(FREE), batches(FREE, 1))
    assert_same(found, want, BOUND)


def test_dropless_refuses_a_split_embed() -> None:
    params, inputs = given_inputs(0)

    def call(p: Any, x: Any) -> Any:
        route = top_k(x["scores"], 2, x["weights"] > 0)
        return dropless(
            x["x"], route, lambda rows, product: product(product(rows, p["up"]), p["down"]), *p.values()
        )

    plain = Through(call, params, inputs, TOKEN).value_and_gradients()
    found = Through(
        call, params, inputs, TOKEN, data() | expert() | tensor(), MeshShape(data=2, expert=2, tensor=2)
    )
    assert worst(found.value_and_gradients(), plain)[0] < BOUND
    rules = expert() | custom(activation={"embed": "tensor"})
    with pytest.raises(InputError, match="split embed over tensor"):
        Through(call, params, inputs, TOKEN, rules, MeshShape(expert=4, tensor=2)).value()


# configuration


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top": 9}, "experts=8, top=9"),
        ({"top": 0}, "top=0"),
        ({"shared": -1}, "shared=-1"),
        ({"capacity": 0.0}, "capacity=0.0"),
        ({"capacity": math.nan}, "capacity=nan"),
        ({"balance": -1.0}, "balance=-1.0"),
        ({"bias_rate": math.inf}, "bias_rate=inf"),
        ({"embed": 0}, "embed=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        MoEConfig(**changes)


def test_slots_that_do_not_divide_are_refused() -> None:
    many = custom(activation=lambda ask: {n: also(a) for n, a in (("slots", "data"),) if n in ask.names})
    many |= custom(activation=lambda ask: {"slots": also("tensor")} if "slots" in ask.names else {})
    params, inputs = given_inputs(0)
    step = Through(through(2, 0.5), params, inputs, TOKEN, many, MeshShape(data=2, tensor=4))
    assert departure(step.value(), Through(through(2, 0.5), params, inputs, TOKEN).value()) < BOUND
    with pytest.raises(InputError, match="12 slots of an expert into 8 parts"):
        Through(seats_of_twelve, params, inputs, TOKEN, many, MeshShape(data=2, tensor=4)).value()


def seats_of_twelve(_: Any, x: Any) -> Any:
    sharding.routing._part(sharding.region.current(), 12, ((), (), ("data", "tensor"), ()))
    return x["x"]
