"""Tiles of attention: those that the trace knows are cut out for good."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding.ring
from sharding.ledger import equations
from sharding.ring import TILE, Sight, seen_attention

BY_INDEX = {"dynamic_slice", "dynamic_update_slice"}


def _cut_by_index() -> set[str]:
    """The ways in which causal attention over two tiles, forward and backward, cuts by an index of the run."""
    q, k = (jax.ShapeDtypeStruct((1, 2 * TILE, heads, 4), jnp.float32) for heads in (4, 2))
    loss = lambda q, k, v: jnp.sum(seen_attention(q, k, v, Sight()))
    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, k)
    return {eqn.primitive.name for eqn, *_ in equations(traced.jaxpr)} & BY_INDEX


def test_tiles_that_the_trace_knows_are_not_looked_up_when_it_runs() -> None:
    """An update by index copies the whole array, and two cuts of one tile are kept twice."""
    assert not _cut_by_index()


def test_a_list_of_tiles_that_only_the_run_knows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own: Any = sharding.ring.Pairs
    looked_up = lambda queries, keys, bias: own(jnp.asarray(queries), jnp.asarray(keys), bias)
    monkeypatch.setattr(sharding.ring, "Pairs", looked_up)
    assert _cut_by_index() == BY_INDEX


def test_known_tiles_and_tiles_by_index_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 64, heads, 4)), jnp.float32) for heads in (4, 2, 2))
    monkeypatch.setattr(sharding.ring, "TILE", 32)

    def both() -> Any:
        loss = lambda q, k, v: jnp.sum(jnp.square(seen_attention(q, k, v, Sight())))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    known, own = both(), sharding.ring.Pairs
    looked_up: Any = lambda queries, keys, bias: own(jnp.asarray(queries), jnp.asarray(keys), bias)
    monkeypatch.setattr(sharding.ring, "Pairs", looked_up)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), known, both())
