"""Products of 8-bit integers and floats: their error, that the mesh does not change them, and gradients straight through."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding.scaled
from configs.quickstart import config as quickstart
from experiments.verification import cases
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.ledger import subjaxprs
from sharding.partitioner import PRODUCTS, Manual
from sharding.product import product
from sharding.proof.double import doubled
from sharding.region import Region, enter
from sharding.rule import Rules
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from sharding.rules.tensor2d import tensor2d
from sharding.scaled import LARGEST, Scaling, scaled_product
from tests.support import (
    Trained,
    assert_same,
    batches,
    departure,
    initial_params,
    make_step,
    model_configs,
    oracle,
    widened_arrays,
)
from tests.support import train as trained

CONFIG = model_configs()["transformer"]
KINDS = tuple(k for k in PRODUCTS if k != "none")
EPS = {"int8": 0.5 / 127, "float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3}
"""Largest error of a rounded entry: of int8 as a share of its row's largest, of the floats as a share of itself."""
MESHES: dict[str, tuple[Rules, MeshShape]] = {
    "fsdp tensor": (data() | fsdp() | tensor(), MeshShape(data=2, fsdp=2, tensor=2)),
    "tensor sequence": (data() | tensor() | sequence(), MeshShape(data=2, tensor=4)),
    "tensor2d": (tensor2d(), MeshShape(context=2, tensor=4)),
}
FORMULAS = {
    "ab,bc->ac": ((64, 48), (48, 32)),
    "abcd,cde->abe": ((2, 8, 4, 6), (4, 6, 5)),
    "ab,cb->ca": ((8, 9), (7, 9)),
}


def drawn(formula: str) -> list[jax.Array]:
    """Operands whose rows differ in size a thousandfold."""
    draw = np.random.default_rng(0)
    return [
        jnp.array(draw.normal(size=s) * 10.0 ** draw.uniform(-2, 1, (s[0], *(1 for _ in s[1:]))), jnp.float32)
        for s in FORMULAS[formula]
    ]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_that_of_rounding_rows_and_columns(kind: str, formula: str) -> None:
    """Against float64: below the bound that follows from the rounding of the operands, and not by much."""
    a, b = drawn(formula)
    found = np.asarray(scaled_product(formula, Scaling(kind, ()), a, b), np.float64)
    wide = [np.asarray(x, np.float64) for x in (a, b)]
    left, _, result = formula.partition("->")
    terms = left.split(",")
    off = []
    for x, term in zip(wide, terms, strict=True):
        summed = tuple(d for d, n in enumerate(term) if n not in result)
        top = np.abs(x).max(axis=summed, keepdims=True)
        small = {"int8": 0.0, "float8_e4m3fn": 2.0**-10 / 448, "float8_e5m2": 2.0**-17 / 57344}[kind]
        off.append(
            EPS[kind] * (top + 0 * x) if kind == "int8" else np.maximum(EPS[kind] * abs(x), small * top)
        )
    pairs = ((off[0], abs(wide[1])), (abs(wide[0]), off[1]), off)
    bound = np.sum([np.einsum(formula, *pair) for pair in pairs], axis=0)
    error = abs(found - np.einsum(formula, *wide))
    assert (error <= bound * 1.01).all()
    assert error.max() > 1e-3 * bound.max()  # it was rounded at all


def test_int8_is_exact_where_every_row_holds_whole_numbers_up_to_127() -> None:
    draw = np.random.default_rng(1)
    a, b = (draw.integers(-127, 128, s).astype(np.float32) for s in ((8, 16), (16, 4)))
    a[:, 0] = b[0] = 127
    found = scaled_product("ab,bc->ac", Scaling("int8", ()), jnp.array(a), jnp.array(b))
    np.testing.assert_array_equal(found, a @ b)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_of_next_to_nothing_and_of_no_numbers(kind: str) -> None:
    a = jnp.array(
        [[0.0, 0.0], [jnp.nan, 1.0], [jnp.inf, 1.0], [1.0, 2.0], [1e-36, 0.0], [1e-37, 0]], jnp.float32
    )
    found = np.asarray(scaled_product("ab,bc->ac", Scaling(kind, ()), a, jnp.ones((2, 3), jnp.float32)))
    assert (found[0] == 0).all()
    assert not np.isfinite(found[1:3]).any()
    np.testing.assert_allclose(found[3], 3.0, rtol=2 * EPS[kind])
    assert (np.abs(found[4:]) < 2e-36).all()


@functools.cache
def one(kind: Any) -> Trained:
    """Two updates on a mesh of one device."""
    step = make_step(CONFIG, data(), MeshShape(data=1), Manual(products=kind))
    return trained(step, initial_params(CONFIG), batches(CONFIG, 2))


@functools.cache
def in_double(kind: Any, case: str = "", accumulate: int = 1) -> Trained:
    """Two updates in double, where no rounding of a sum tips a rounding to 8 bits; without a case on one device."""
    rules, mesh = MESHES[case] if case else (data(), MeshShape(data=1))
    params, rows = widened_arrays((initial_params(CONFIG), batches(CONFIG, 2)))
    wide = dataclasses.replace(CONFIG, dtype="float64")
    with jax.enable_x64(True):
        by = Manual(products=kind)
        return trained(
            make_step(wide, rules, mesh, by, accumulate, model=doubled(wide.build())), params, rows
        )


@pytest.mark.parametrize("case", MESHES)
@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])])
def test_the_mesh_and_micro_batches_do_not_change_the_numbers(kind: Any, case: str) -> None:
    assert_same(in_double(kind, case, 2), in_double(kind), 1e-9)


def test_scales_of_the_shard_alone_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault planted: each device scales by the largest entry that it holds itself."""
    real = sharding.scaled._rounded
    alone = lambda x, term, summed, scaling: real(x, term, summed, dataclasses.replace(scaling, sums=()))
    monkeypatch.setattr(sharding.scaled, "_rounded", alone)
    with pytest.raises(AssertionError):
        assert_same(in_double.__wrapped__("int8", "fsdp tensor"), in_double("int8"), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_stays_near_full_precision(kind: Any) -> None:
    """It is rounded, and by no more than a few times what a product's own rounding is."""
    for found, full in zip(one(kind).metrics, oracle(CONFIG, 2).metrics, strict=True):
        assert 1e-7 < abs(found["loss"] / full["loss"] - 1) < EPS[kind] / 10


def test_the_backward_pass_is_that_of_the_unscaled_product() -> None:
    a, b = drawn("ab,bc->ac")
    out = jnp.ones((64, 32), jnp.float32)
    layouts = make_step(CONFIG).split.layouts

    def gradients(partitioner: Manual, sums: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        with enter(Region(layouts, None, partitioner)):
            made, back = jax.vjp(lambda a, b: product("ab,bc->ac", a, b, sums), a, b)
        return made, back(out)

    plain, scaled = gradients(Manual(), ()), gradients(Manual(products="int8"), ())
    assert departure(np.asarray(scaled[0]), np.asarray(plain[0])) > 1e-4
    jax.tree.map(np.testing.assert_array_equal, scaled[1], plain[1])
    apart = gradients(Manual(products="int8"), None)  # no matrix of parameters takes part
    np.testing.assert_array_equal(apart[0], plain[0])


def test_products_of_integers_are_what_is_compiled() -> None:
    """The dots of the forward pass of int8: q, k and v in one, out, gate and up, down, and the logits."""
    step = make_step(
        dataclasses.replace(CONFIG, loop="scan"), *MESHES["fsdp tensor"], Manual(products="int8")
    )
    traced = step.evaluate.trace(step.abstract_state()["params"], step.abstract_batch(16)).jaxpr

    def dots(jaxpr: Any) -> list[str]:
        own = [str(e.invars[0].aval.dtype) for e in jaxpr.eqns if e.primitive.name == "dot_general"]
        return own + [d for e in jaxpr.eqns for body in subjaxprs(e.params) for d in dots(body)]

    assert dots(traced.jaxpr).count("int8") == 5


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(InputError, match="it is one of none, int8, float8_e4m3fn, float8_e5m2"):
        Manual(products="int4")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Take one of the two"):
        Manual(products="int8", overlap="ring")
    assert set(LARGEST) == set(KINDS)


def test_verify_says_that_it_cannot_hold_them_to_rounding() -> None:
    experiment = dataclasses.replace(quickstart(), partitioner=Manual(products="int8"))
    with pytest.raises(InputError, match=r"rounds operands on purpose.*--partitioner manual"):
        cases(experiment, 8)
