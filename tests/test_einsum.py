"""The named einsum: right for any layouts under both partitioners, with the bytes its plan states, and the fewest."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding import contraction
from sharding.contraction import Contraction, Plan, parse
from sharding.errors import InputError
from sharding.layout import local_shape
from sharding.moves import relayout_bytes
from sharding.ops import einsum
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from tests.products import AXES, CASE, MESH, cases, check, through
from tests.support import Through, custom

PAIR = ("data", "tensor")


@settings(max_examples=25)
@given(case=cases())
def test_value_and_gradients_for_any_layouts_in_the_manual_region(case: CASE) -> None:
    check(case, Manual())


@settings(max_examples=10)
@given(case=cases())
def test_value_and_gradients_for_any_layouts_under_xlas_partitioner(case: CASE) -> None:
    check(case, Auto())


@pytest.mark.slow
@settings(max_examples=120)
@given(case=cases(), partitioner=st.sampled_from([Manual(), Manual(), Auto()]))
def test_value_and_gradients_for_many_layouts(case: CASE, partitioner: Partitioner) -> None:
    check(case, partitioner)


def _lie(made: Through, case: CASE) -> list[Any]:
    """Layouts of the operands as the contraction finds them: a parameter's is that of its use."""
    terms, _ = parse(case[0])

    def lies(key, names):
        return made.lies[key].compute if key in made.lies else made.layouts.activation(names)

    return [lies(key, names).dims for key, names in zip(case[1]["arrays"], terms, strict=True)]


def stated(made: Through, case: CASE) -> tuple[Plan, int]:
    """The plan, and the bytes of bringing a parameter from rest to its use."""
    spec, drawn, _ = case
    terms, result = parse(spec)
    layouts, shapes, rest = _lie(made, case), [], 0
    for (key, array), lies in zip(drawn["arrays"].items(), layouts, strict=True):
        shapes.append(local_shape(array.shape, lies, made.sizes))
        if key in made.lies:
            at_rest = made.lies[key].param.dims
            rest = relayout_bytes(
                4 * math.prod(local_shape(array.shape, at_rest, made.sizes)), at_rest, lies, made.sizes
            )
    wanted = made.layouts.activation(result).dims
    fixed = tuple(key in made.lies for key in drawn["arrays"])
    items, sizes = (4,) * len(terms), tuple(made.sizes.items())
    asked = Contraction(spec, tuple(layouts), tuple(shapes), items, wanted, sizes, fixed=fixed)
    return contraction.plan(asked), rest


def single(case: CASE) -> CASE:
    spec, drawn, rules = case
    return spec, {**drawn, "arrays": {k: a.astype(np.float32) for k, a in drawn["arrays"].items()}}, rules


@settings(max_examples=80)
@given(case=cases())
def test_the_plan_states_the_bytes_that_are_traced(case: CASE) -> None:
    case = single(case)
    made = through(case)
    plan, rest = stated(made, case)
    assert sum(c.bytes for c in made.traced()) == plan.bytes + rest


@settings(max_examples=10)
@given(case=cases(axes=PAIR))
def test_no_other_plan_with_as_few_products_sends_fewer_bytes(case: CASE) -> None:
    case = single(case)
    made = through(case)
    plan, rest = stated(made, case)
    terms, result = parse(case[0])
    arrays = case[1]["arrays"]
    every = {
        n: size
        for k, t in zip(arrays, terms, strict=True)
        for n, size in zip(t, arrays[k].shape, strict=True)
    }
    lying = [*zip(terms, _lie(made, case), strict=True), (result, made.layouts.activation(result).dims)]
    where = {
        a: [n for names, dims in lying for n, d in zip(names, dims, strict=True) if a in d] for a in PAIR
    }
    tried = 0
    for choice in itertools.product(*([*dict.fromkeys(where[a]), None] for a in PAIR)):
        for order in itertools.permutations(PAIR):
            on = dict(zip(PAIR, choice, strict=True))
            split = {n: tuple(a for a in order if on[a] == n) for n in every}
            other = Plan(
                tuple(tuple(split[n] for n in t) for t in terms),
                tuple(a for n in every if n not in result for a in split[n]),
                tuple(split[n] for n in result),
                0,
                math.prod(size // 2 ** len(split[n]) for n, size in every.items()),
            )
            lies = [layout for _, layout in lying]
            gathered = any(
                have != want[: len(have)]
                for key, src, dst in zip(arrays, lies, other.operands, strict=False)
                if key in made.lies
                for have, want in zip(src, dst, strict=True)
            )
            if gathered:
                continue  # a parameter is used as its `compute` role says
            assert other.products >= plan.products
            if other.products == plan.products:
                tried += 1
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("sharding.operands.plan", lambda *_, other=other: other)
                    sent = sum(c.bytes for c in through(case).traced())
                assert sent - rest >= plan.bytes, (other, plan)
    assert tried


def test_an_axis_that_no_name_has_room_for_is_given_up() -> None:
    # both axes would have to split the same two rows: one operand is gathered and the result is equal again
    rules = custom(activation=lambda ask: {"batch": "data"} if ask.names == ("batch", "embed") else {})
    rules |= custom(activation=lambda ask: {"batch": "fsdp"} if ask.names == ("batch", "mlp") else {})
    random = np.random.default_rng(0)
    arrays = {"x": random.normal(size=(2, 4)), "y": random.normal(size=(2, 4))}
    for result in ("embed mlp", "embed mlp batch", "batch mlp", "batch embed", ""):
        check((f"batch embed, batch mlp -> {result}", {"arrays": arrays, "param": False}, rules), Manual())


# What the literature says of known layouts, forward. B L D F are whole sizes; bytes that each device sends in float32.

B, L, D, F, V, N = 8, 16, 8, 32, 64, 2
COLUMN = "batch length embed, embed mlp -> batch length mlp"
ROW = "batch length mlp, mlp embed -> batch length embed"
TOKENS = 4 * B * L * D // 4  # of one of the 4 devices that share the batch (data x fsdp)


def _of_known_sizes(rules: Rules, spec: str, partitioner: Partitioner) -> Through:
    sizes = {"batch": B, "length": L, "embed": D, "mlp": F, "vocab": V}
    terms, result = parse(spec)
    x, w = (np.zeros([sizes[n] for n in t], np.float32) for t in terms)

    def call(p, i):
        return einsum(spec, i["x"], p["w"])

    params, inputs = {"w": (" ".join(terms[1]), w)}, {"x": (" ".join(terms[0]), x)}
    return Through(call, params, inputs, " ".join(result), rules, MESH, partitioner)


def _traced(rules: Rules, spec: str) -> list[tuple[str, tuple[str, ...], int]]:
    return [(c.kind, c.axes, c.bytes) for c in _of_known_sizes(rules, spec, Manual()).traced()]


def test_known_layouts_send_what_the_literature_says() -> None:
    both = data() | fsdp("fsdp") | tensor()
    gathered = (
        "all-gather",
        ("fsdp",),
        4 * D * F // 2 // 2 * (2 - 1),
    )  # w: split by tensor, and by fsdp at rest
    reduced = ("all-reduce", ("tensor",), 2 * TOKENS * (N - 1) // N)
    assert _traced(data(), COLUMN) == []
    assert _traced(data() | tensor(), COLUMN) == []
    assert _traced(both, COLUMN) == [gathered]
    assert _traced(both, ROW) == [gathered, reduced]
    # sequence parallelism: a gather before the columns, a reduce-scatter after the rows, half an all-reduce each
    assert _traced(both | sequence(), COLUMN) == [
        gathered,
        ("all-gather", ("tensor",), TOKENS // N * (N - 1)),
    ]
    assert _traced(both | sequence(), ROW) == [
        gathered,
        ("reduce-scatter", ("tensor",), TOKENS * (N - 1) // N),
    ]
    # the vocabulary is split: logits are produced where they lie
    vocab = "batch length embed, embed vocab -> batch length vocab"
    assert _traced(data() | tensor(), vocab) == []
    assert _traced(data() | tensor() | sequence(), vocab) == [
        ("all-gather", ("tensor",), 2 * TOKENS // N * (N - 1))
    ]


def _constraints(rules: Rules, spec: str) -> int:
    made = _of_known_sizes(rules, spec, Auto())
    steps = jax.make_jaxpr(made.function)(*made.arguments()).eqns
    return [e.primitive.name for e in steps].count("sharding_constraint")


def test_xlas_partitioner_is_told_the_plan_only_where_something_has_to_move() -> None:
    both = data() | fsdp("fsdp") | tensor()
    for rules, spec in itertools.product((data(), data() | tensor(), both), (COLUMN, ROW)):
        assert _constraints(rules, spec) == 2  # the parameter in use, the result
    assert _constraints(both | sequence(), ROW) == 2  # a reduce-scatter brings it there
    assert _constraints(both | sequence(), COLUMN) == 3  # the activation has to be gathered
    away = custom(activation=lambda ask: {"length" if "mlp" in ask.names else "batch": "data"})
    assert _constraints(away, COLUMN) == 3  # and here to be moved


def test_a_global_sum_is_one_all_reduce_of_a_number() -> None:
    def call(p, i):
        return einsum("batch length ->", i["x"])

    rules = data() | fsdp() | sequence()
    made = Through(call, {}, {"x": ("batch length", np.ones((8, 8), np.float32))}, "", rules, MESH)
    assert [(c.kind, sorted(c.axes), c.bytes) for c in made.traced()] == [
        ("all-reduce", sorted(AXES), 2 * 4 * 7 // 8)
    ]
    assert made.value() == 64.0


REFUSED = {
    "batch embed, embed mlp": ("an arrow",),
    "a, b, c -> a": ("one or two operands",),
    "batch batch -> batch": ("repeats a name",),
    "batch embed -> batch mlp": ("'mlp' is in no operand",),
}


@pytest.mark.parametrize("spec", REFUSED)
def test_a_malformed_text_is_refused(spec: str) -> None:
    with pytest.raises(InputError) as caught:
        einsum(spec, jnp.zeros((2, 2)), jnp.zeros((2, 2)))
    assert all(word in str(caught.value) for word in REFUSED[spec])
    assert repr(spec) in str(caught.value)


def test_operands_that_are_not_what_the_text_says_are_refused() -> None:
    x, w = np.zeros((8, 8), np.float32), ("embed mlp", np.zeros((8, 16), np.float32))

    def made(spec, *more):
        return Through(
            lambda p, i: einsum(spec, i["x"], p["w"], *more),
            {"w": w},
            {"x": ("batch embed", x)},
            "batch mlp",
            data(),
            MESH,
        )

    with pytest.raises(InputError, match="2 operands but got 3"):
        made("batch embed, embed mlp -> batch mlp", x).traced()
    with pytest.raises(
        InputError, match=r"names a parameter's dims 'embed vocab', but w was declared as 'embed mlp'"
    ):
        made("batch embed, embed vocab -> batch vocab").traced()
    with pytest.raises(InputError, match="3 names but 2 dims"):
        made("batch length embed, embed mlp -> batch mlp").traced()
    with pytest.raises(InputError, match="'mlp' is 8 in one operand and 16 in the other"):
        made("batch mlp, embed mlp -> batch embed").traced()


@pytest.mark.parametrize("partitioner", [Manual(), Auto()], ids=str)
def test_a_result_that_does_not_divide_is_refused(partitioner: Partitioner) -> None:
    x = np.zeros((8, 8), np.float32)

    def call(p, i):
        return einsum("batch embed, embed mlp -> batch mlp", i["x"], p["w"])

    w = ("embed mlp", np.zeros((8, 7), np.float32))
    rules = data() | custom(activation={"mlp": "tensor"})
    made = Through(call, {"w": w}, {"x": ("batch embed", x)}, "batch mlp", rules, MESH, partitioner)
    with pytest.raises(InputError, match="does not divide"):
        made.traced()


def test_an_operand_that_does_not_divide_is_refused_under_xlas_partitioner() -> None:
    def call(p, i):
        return einsum("batch embed -> embed", i["x"][:7])

    inputs = {"x": ("batch embed", np.zeros((8, 8), np.float32))}
    made = Through(call, {}, inputs, "embed", data(), MESH, Auto())
    with pytest.raises(InputError, match="dim of 7 is split into 2 parts"):
        made.traced()
