"""One sequence over several devices: attention by ring and by all-to-all computes what one device computes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sharding.ring
from models.mlp import MLP
from models.mlp_config import MLPConfig
from models.transformer_config import TransformerConfig
from sharding.attention import attention, rope
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.flow import Flow
from sharding.layers import layers
from sharding.layout import Layouts
from sharding.ledger import collectives
from sharding.mesh import device_mesh
from sharding.ops import back, einsum, positions, rms_norm, whole
from sharding.order import ZigZag
from sharding.params import Entry
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules, also
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.hsdp import hsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from sharding.rules.ulysses import ulysses
from sharding.step import Split, TrainStep
from tests.support import (
    ROWS,
    Through,
    assert_same,
    batches,
    custom,
    departure,
    initial_params,
    make_step,
    model_configs,
    oracle,
    shrunk,
    start,
    train,
    worst,
)

BOUND = 4e-6
"""Relative to a leaf's largest entry: some 30 roundings of float32. Only the order of sums differs."""
OF_Q, OF_K = "batch length heads head_dim", "batch length kv_heads head_dim"
LENGTH = 32


def dense(q: Any, k: Any, v: Any, mask: str, window: int, segments: np.ndarray | None) -> Any:
    """Attention by its formula: the whole square, in one softmax."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("blhk,bmhk->bhlm", q, k) * q.shape[3] ** -0.5
    far = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])[None]
    seen = np.broadcast_to(far >= 0 if mask == "causal" else True, (q.shape[0], *far.shape))
    if window:
        seen = seen & (np.abs(far) < window)
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    powers = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhlm,bmhk->blhk", powers, v)


def operands(heads: int = 4, kv_heads: int = 2, length: int = LENGTH, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    segments = np.sort(draw.integers(0, 4, (4, length)), axis=1).astype(np.int32)
    return {
        "q": (OF_Q, normal(4, length, heads, 8)),
        "k": (OF_K, normal(4, length, kv_heads, 8)),
        "v": (OF_K, normal(4, length, kv_heads, 8)),
        "segments": ("batch length", segments),
    }


def calls(mask: str, window: int, packed: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The op, and the formula."""

    def op(_: Any, x: Any) -> Any:
        return attention(x["q"], x["k"], x["v"], mask, window, x["segments"] if packed else None)  # type: ignore[arg-type]  # drawn

    def formula(_: Any, x: Any) -> Any:
        segments = np.asarray(operands()["segments"][1]) if packed else None
        return dense(x["q"], x["k"], x["v"], mask, window, segments)

    return op, formula


SIGHTS = list(itertools.product(["causal", "full"], [0, 5, 20], [False, True]))
LAYOUTS: dict[str, tuple[Rules, MeshShape | None]] = {
    "one device": (Rules(), None),
    "ring": (context(), MeshShape(context=8)),
    "ring in natural order": (data() | context(order="contiguous"), MeshShape(data=2, context=4)),
    "ring and heads": (data() | context() | tensor(), MeshShape(data=2, context=2, tensor=2)),
    "all-to-all": (data() | ulysses(), MeshShape(data=4, context=2)),
    "all-to-all after tensor, keys whole": (
        data() | tensor() | ulysses(kv_heads="whole"),
        MeshShape(data=2, context=2, tensor=2),
    ),
    "ring of 4, all-to-all of 2": (context() | ulysses("tensor"), MeshShape(context=4, tensor=2)),
    "ring, heads, sequence": (context() | tensor() | sequence(), MeshShape(context=4, tensor=2)),
    "keys whole, queries split": (
        custom(activation={"length": also("context"), "queries": "context", "batch": also("data")}),
        MeshShape(data=2, context=4),
    ),
}
EVERY = [(layout, *sight) for layout in LAYOUTS for sight in SIGHTS]
QUICK = {i for i in range(len(EVERY)) if i % len(SIGHTS) in {0, 7, (i // len(SIGHTS) * 5) % len(SIGHTS)}}
"""Of each layout plain causal attention, a window over packed rows, and another sight that goes round."""


@pytest.mark.parametrize(
    ("layout", "mask", "window", "packed"),
    [case if i in QUICK else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(EVERY)],
)
def test_attention_is_its_formula(layout: str, mask: str, window: int, packed: bool) -> None:
    rules, mesh = LAYOUTS[layout]
    op, formula = calls(mask, window, packed)
    expected = Through(formula, {}, operands(), OF_Q).value_and_gradients()
    found = Through(op, {}, operands(), OF_Q, rules, mesh).value_and_gradients()
    error, leaf = worst(found, expected)
    assert error < BOUND, (leaf or "value", error)


@pytest.mark.parametrize("layout", ["ring", "ring in natural order", "ring and heads"])
def test_many_tiles_make_the_same_numbers(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding.ring, "TILE", 2)
    monkeypatch.setattr(sharding.ring, "_tile_of", lambda unit: 2 if unit % 2 == 0 else 1)
    for mask, window, packed in [("causal", 0, False), ("causal", 9, True), ("full", 3, False)]:
        test_attention_is_its_formula(layout, mask, window, packed)


@pytest.mark.parametrize("layout", ["ring", "ring, heads, sequence"])
def test_in_double_precision_only_rounding_is_left(layout: str) -> None:
    rules, mesh = LAYOUTS[layout]
    op, formula = calls("causal", 0, True)
    with jax.enable_x64(True):
        wide = {k: (n, x if k == "segments" else x.astype(np.float64)) for k, (n, x) in operands().items()}
        expected = Through(formula, {}, wide, OF_Q).value_and_gradients()
        found = Through(op, {}, wide, OF_Q, rules, mesh).value_and_gradients()
    error, leaf = worst(found, expected)
    assert error < 1e-14, (leaf or "value", error)


def test_a_ring_that_goes_the_wrong_way_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is not blind: keys sent the other way meet queries that take them for another device's."""
    right = sharding.ring._Work.send
    monkeypatch.setattr(sharding.ring._Work, "send", lambda self, x, by=1: right(self, x, -by))
    op, formula = calls("causal", 0, False)
    expected = Through(formula, {}, operands(), OF_Q).value_and_gradients()
    found = Through(op, {}, operands(), OF_Q, *LAYOUTS["ring"]).value_and_gradients()
    assert worst(found, expected)[0] > 0.01


# orders


@given(parts=st.integers(1, 9), chunk=st.integers(1, 7))
def test_zigzag_is_a_permutation_that_gives_each_device_equal_work(parts: int, chunk: int) -> None:
    size = 2 * parts * chunk
    at = ZigZag("context").position(np.arange(size), size, parts)
    assert sorted(at) == list(range(size))
    assert [ZigZag("context").position(i, size, parts) for i in range(size)] == list(at)
    work = (at + 1).reshape(parts, -1).sum(axis=1)  # keys that a causal mask lets the queries of a device see
    assert len(set(work)) == 1


def test_positions_rope_and_whole_follow_the_order() -> None:
    x = np.random.default_rng(0).normal(size=(2, LENGTH, 4, 8)).astype(np.float32)
    inputs = {"x": (OF_Q, x)}
    turned = lambda _, x: rope(x["x"], OF_Q)
    mesh = MeshShape(data=2, context=4)
    for rules in (data() | context(), data() | context(order="contiguous")):
        found = Through(turned, {}, inputs, OF_Q, rules, mesh).value_and_gradients()
        assert worst(found, Through(turned, {}, inputs, OF_Q).value_and_gradients())[0] < BOUND
        number = lambda _, x: x["x"] * 0 + positions(x["x"], OF_Q).astype(jnp.float32)[None, :, None, None]
        found = Through(number, {}, inputs, OF_Q, rules, mesh).value()
        np.testing.assert_array_equal(found[0, :, 0, 0], np.arange(LENGTH))

        def shifted(_: Any, x: Any) -> Any:
            full, lies = whole(x["x"], OF_Q, "length")
            return back(jnp.roll(full, 3, axis=1), OF_Q, lies)

        found = Through(shifted, {}, inputs, OF_Q, rules, mesh).value()
        np.testing.assert_array_equal(found, np.roll(x, 3, axis=1))


# the whole step

STEPS: dict[str, tuple[Rules, MeshShape]] = {
    "ring": (data() | context(), MeshShape(data=2, context=4)),
    "ring of everything": (context(), MeshShape(context=4)),
    "fsdp ring": (fsdp() | context(), MeshShape(fsdp=2, context=4)),
    "fsdp ring tensor sequence": (
        fsdp() | context() | tensor() | sequence(),
        MeshShape(fsdp=2, context=2, tensor=2),
    ),
    "all-to-all": (data() | ulysses(), MeshShape(data=2, context=4)),
    "ring and all-to-all": (fsdp() | context() | ulysses("tensor"), MeshShape(fsdp=2, context=2, tensor=2)),
    "hsdp ring": (hsdp() | context(), MeshShape(data=2, fsdp=2, context=2)),
}


OFTEN = {("fsdp ring tensor sequence", "manual"), ("ring and all-to-all", "manual"), ("ring", "auto")}
WHOLE = [
    pytest.param(case, by, id=f"{case}-{name}", marks=() if (case, name) in OFTEN else pytest.mark.slow)
    for case in STEPS
    for name, by in (("manual", Manual()), ("auto", Auto()))
]


@pytest.mark.parametrize(("case", "partitioner"), WHOLE)
def test_a_step_is_that_of_one_device(case: str, partitioner: Partitioner) -> None:
    """Three updates on batches of unequal weights, some rows with none."""
    config = model_configs()["transformer"]
    step = make_step(config, *STEPS[case], partitioner, 1 + list(STEPS).index(case) % 2)
    found = train(step, initial_params(config), batches(config, 3))
    assert_same(found, oracle(config, 3), 1e-5)


def test_a_device_without_any_token_changes_nothing() -> None:
    """All weights of one device's part of the sequence are zero."""
    config = model_configs()["transformer"]
    rows = batches(config, 2)
    for batch in rows:
        batch["weights"][:, :2] = 0.0
    expected = train(make_step(config), initial_params(config), rows)
    step = make_step(config, data() | context(), MeshShape(data=2, context=4))
    assert_same(train(step, initial_params(config), rows), expected, 1e-5)


def test_a_result_leaves_the_region_in_its_natural_order() -> None:
    config = model_configs()["transformer"]
    params, tokens = initial_params(config), batches(config, 1)[0]["tokens"]
    split, made = make_step(config, data() | context(), MeshShape(data=2, context=4)), []
    for step in (make_step(config), split):
        forward = jax.jit(
            lambda p, t, s=step: s.forward(p, "logits", "batch length vocab", (t, "batch length"))
        )
        made.append(forward(start(step, params)["params"], jnp.asarray(tokens)))
    assert departure(made[1], made[0]) < BOUND


# what it costs


def ring_step(n: int, length: int = 64, layers: int = 3, **sizes: int) -> TrainStep:
    config = dataclasses.replace(shrunk(TransformerConfig()), length=length, layers=layers, **sizes)
    shape = MeshShape(context=n)
    split = Split(Layouts(context(), shape.sizes()), device_mesh(shape, jax.devices()[:n]), Manual())
    return TrainStep(config.build(), optax.sgd(0.1), split)


def traced(step: TrainStep) -> Any:
    """The jaxpr of one update over two rows."""
    return jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(2))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_rings_traffic_is_its_closed_form(n: int) -> None:
    step = ring_step(n)
    sent = collectives(traced(step), step.split.layouts.sizes)
    c: Any = step.model
    c = c.config
    keys = 2 * (c.length // n) * c.kv_heads * c.head_dim * 4  # bytes of a device's keys, and of its values
    forward, backward = 2 * (n - 1) * keys, 2 * (n - 1) * keys + 2 * n * keys
    ring = sum(x.bytes for x in sent if x.kind == "permute")
    assert ring == c.layers * (forward + backward)


def test_an_all_to_alls_traffic_is_its_closed_form() -> None:
    n, config = 4, dataclasses.replace(shrunk(TransformerConfig()), length=64)
    step = make_step(config, ulysses(), MeshShape(context=n))
    sent = collectives(traced(step), step.split.layouts.sizes)
    local = (
        2 * (config.length // n) * config.head_dim * 4
    )  # bytes of one head's vectors on a device, two rows
    each = local * (2 * config.heads + 2 * config.kv_heads) * (n - 1) // n
    assert sum(x.bytes for x in sent if x.kind == "all-to-all") == config.layers * 2 * each


def test_whole_key_heads_are_gathered_and_their_gradients_scattered_back() -> None:
    n, config = 4, dataclasses.replace(shrunk(TransformerConfig()), length=64, kv_heads=2)
    step = make_step(config, ulysses(kv_heads="whole"), MeshShape(context=n))
    sent = collectives(traced(step), step.split.layouts.sizes)
    keys = 2 * (config.length // n) * config.kv_heads * config.head_dim * 4
    for kind in ("all-gather", "reduce-scatter"):
        ours = [x for x in sent if x.kind == kind and x.op == "attention"]
        assert sum(x.bytes for x in ours) == config.layers * 2 * (n - 1) * keys
    assert all(x.source for x in sent)


@pytest.mark.parametrize("by", [Manual(), Auto()], ids=["manual", "auto"])
def test_heads_that_do_not_divide_inside_attention_are_refused_with_rule_and_line(by: Partitioner) -> None:
    config = dataclasses.replace(shrunk(TransformerConfig()), length=64, kv_heads=2)
    said = r"rule ulysses\(\) \(.*ulysses.py:\d+\) splits kv_heads = 2 into 4 parts \(context=4\).*kv_heads='whole'"
    with pytest.raises(InputError, match=said):
        traced(make_step(config, ulysses(), MeshShape(context=4), by))
    few = dataclasses.replace(config, heads=4)
    with pytest.raises(InputError, match="splits heads = 4 into 8 parts"):
        traced(make_step(few, ulysses(kv_heads="whole"), MeshShape(context=8), by))


def test_each_device_multiplies_the_same_and_no_more_than_the_triangle() -> None:
    """With tiles of a 16th of a chunk, a ring in zig-zag order computes the lower triangle and half its diagonal."""
    sizes, products = {"embed": 8, "heads": 1, "kv_heads": 1, "head_dim": 128, "mlp": 8, "vocab": 8}, {}
    for n in (1, 4):
        step = ring_step(n, 8192, 1, **sizes)
        flow = Flow(traced(step), step.split.layouts.sizes)
        products[n] = sum(p.flops for p in flow.products)
    assert abs(products[1] / (4 * products[4]) - 1) < 0.05, products


@pytest.mark.slow
def test_memory_falls_as_the_devices_grow_at_32k() -> None:
    """Compiled, not run: bytes of temporaries of a step over 32,768 positions, on 1, 2, 4 and 8 devices."""
    sizes = {"embed": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "mlp": 384, "vocab": 256}
    temp = {}
    for n in (1, 2, 4, 8):
        step = ring_step(n, 32768, 4, **sizes)
        rows = step.batch_shardings()
        batch = {
            k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows[k])
            for k, x in step.abstract_batch(1).items()
        }
        made = step.step.lower(step.abstract_state(), batch).compile()
        memory = made.memory_analysis()
        assert memory is not None
        temp[n] = memory.temp_size_in_bytes
    assert all(abs(temp[1] / (n * temp[n]) - 1) < 0.1 for n in temp), temp


# what is refused


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: context(order="zig"), ("order='zig'", "contiguous")),  # type: ignore[arg-type]  # a word that is none
        (lambda: ulysses(kv_heads="some"), ("kv_heads='some'", "whole")),  # type: ignore[arg-type]  # a word that is none
        (
            lambda: traced(ring_step(4, 36)),
            ("length = 36", "context=4", "multiple of 8", "contiguous"),
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(make: Callable[[], Any], said: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert all(word in str(error.value) for word in said), str(error.value)


def test_keys_and_queries_must_be_split_alike() -> None:
    rules = custom(activation={"length": also("context"), "keys": "context"})
    with pytest.raises(InputError, match="queries over nothing and keys over context"):
        Through(calls("causal", 0, False)[0], {}, operands(), OF_Q, rules, MeshShape(context=8)).value()


def test_an_order_needs_its_axis_in_every_array() -> None:
    rules = custom(activation={"queries": "context"}, order={"length": ZigZag("context")})
    with pytest.raises(InputError, match="length lies in the order"):
        Layouts(rules, MeshShape(context=2).sizes()).activation(("batch", "length"))


# what is computed of a whole sequence


class Pooled(MLP):
    """Classifies the mean of a sequence: after the mean nothing varies over the axis that split the positions."""

    def __init__(self, c: MLPConfig):
        super().__init__(c)
        self.inputs = {**self.inputs, "features": Entry("batch length features", (8, c.features), "float32")}

    def logits(self, features: jax.Array) -> jax.Array:
        """Scores `batch classes` of the mean over `length`."""
        x = einsum("batch length features, features embed -> batch length embed", features, self.enter)
        pooled = einsum("batch length embed -> batch embed", jax.nn.gelu(x)) / 8
        normed = rms_norm(layers(self.layers, pooled), self.norm, "batch embed")
        return einsum("batch embed, embed classes -> batch classes", normed, self.leave)


@pytest.mark.parametrize(
    ("rules", "mesh"),
    [
        (data() | context(), MeshShape(data=2, context=4)),
        (fsdp() | context() | tensor(), MeshShape(fsdp=2, context=2, tensor=2)),
    ],
    ids=repr,
)
def test_a_head_on_pooled_positions_computes_what_one_device_does(rules: Rules, mesh: MeshShape) -> None:
    config = model_configs()["mlp"]
    draw = np.random.default_rng(3)
    rows = [
        {**batch, "features": draw.normal(size=(ROWS, 8, config.features)).astype(np.float32)}
        for batch in batches(config, 3)
    ]
    expected = train(make_step(config, model=Pooled(config)), initial_params(config), rows)
    found = train(make_step(config, rules, mesh, model=Pooled(config)), initial_params(config), rows)
    assert_same(found, expected, 1e-5)
