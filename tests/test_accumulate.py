"""Gradient accumulation: one program for all micro-batches, each of its own rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.accumulate import Order, accumulated
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.ledger import equations
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from tests.support import make_step, model_configs

MESH = MeshShape(data=2, fsdp=2)


def products(partitioner: Partitioner, accumulate: int) -> int:
    """Matrix products written in the program of a step, each loop's body once."""
    step = make_step(model_configs()["mlp"], data() | fsdp(), MESH, partitioner, accumulate)
    traced = jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(16))
    return sum(eqn.primitive.name == "dot_general" for eqn, *_ in equations(traced.jaxpr))


@pytest.mark.parametrize("partitioner", [Manual(), Auto()], ids=["manual", "auto"])
def test_micro_batches_add_no_program(partitioner: Partitioner) -> None:
    once = products(partitioner, 1)
    assert once > 0
    assert products(partitioner, 2) == products(partitioner, 4) == once


@pytest.mark.parametrize(
    ("order", "rows"), [("consecutive", ([0, 1], [2, 3], [4, 5])), ("interleaved", ([0, 3], [1, 4], [2, 5]))]
)
def test_the_sum_is_over_micro_batches_of_these_rows(order: Order, rows: tuple[list[int], ...]) -> None:
    x = (
        np.random.default_rng(0).integers(-9, 9, (6, 5)).astype(np.float32)
    )  # whole numbers: every sum is exact

    def one(part: Any) -> dict[str, Any]:
        return {"product": jnp.prod(part["x"], axis=0), "rows": jnp.asarray(len(part["x"]), jnp.int32)}

    found = jax.jit(lambda x: accumulated(one, {"x": x}, 3, order))(x)
    np.testing.assert_array_equal(found["product"], sum(x[of].prod(axis=0) for of in rows))
    assert int(found["rows"]) == 6


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="6 rows on a device cannot be accumulated in 4"):
        accumulated(lambda part: part["x"].sum(), {"x": jnp.ones((6, 2))}, 4, "consecutive")
