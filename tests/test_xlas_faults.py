"""Layouts for which XLA's own partitioner multiplies wrongly: the named einsum is right there under both."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from sharding.contraction import Plan, parse
from sharding.layout import Dims
from sharding.partitioner import Auto, Manual
from sharding.rule import Ask, Rules, also
from tests.products import CASE, check, expected, in_plain_jax
from tests.support import custom

XLAS_FAULTS = {
    "a reduce-scatter while the axes of another dim change order": (
        "batch length, mlp length -> batch mlp",
        {
            "batch length": (("fsdp", "tensor"), ("data",)),
            "mlp length": ((), ("data",)),
            "batch mlp": (("tensor", "fsdp"), ("data",)),
        },
    ),
    "one of two summed axes laid outside the axis of a kept dim": (
        "batch length, batch length -> batch",
        {"batch length": (("fsdp",), ("data", "tensor")), "batch": (("data", "fsdp"),)},
    ),
    "operands whose summed dims are split differently": (
        "batch length embed, length embed batch ->",
        {"batch length embed": ((), ("data",), ("fsdp",)), "length embed batch": (("data",), (), ("fsdp",))},
    ),
    "two summed axes, of which one is scattered": (
        "batch embed, batch embed -> batch",
        {"batch embed": (("fsdp",), ("data", "tensor")), "batch": (("fsdp", "tensor"),)},
    ),
    "two summed axes, scattered onto two dims": (
        "mlp length embed, mlp embed -> mlp length",
        {
            "mlp length embed": (("tensor",), (), ("data", "fsdp")),
            "mlp embed": (("tensor",), ("data", "fsdp")),
            "mlp length": (("tensor", "data"), ("fsdp",)),
        },
    ),
}
"""Layouts for which XLA's partitioner computes another product (jaxlib 0.10.2 and 0.12.0, CPU): found by drawing layouts
as in test_einsum.py. No error, no warning."""


def laid(spec: str, layouts: dict[str, Dims]) -> CASE:
    """A case whose arrays, all of them activations, lie exactly so."""
    turns = {
        names: [(n, axis) for n, axes in zip(names.split(), dims, strict=True) for axis in axes]
        for names, dims in layouts.items()
    }

    def place(turn: int) -> Any:
        def where(ask: Ask) -> dict[str, Any]:
            mine = turns.get(" ".join(ask.names), [])[turn : turn + 1]
            return {name: also(axis) for name, axis in mine}

        return where

    rules = Rules()
    for turn in range(max(map(len, turns.values()))):
        rules |= custom(activation=place(turn))
    random = np.random.default_rng(0)
    arrays = {f"x{i}": random.normal(size=(8,) * len(t)) for i, t in enumerate(parse(spec)[0])}
    return spec, {"arrays": arrays, "param": False}, rules


@pytest.mark.parametrize("what", XLAS_FAULTS)
def test_plain_jax_is_wrong_there_and_the_named_einsum_is_right(what: str) -> None:
    case = laid(*XLAS_FAULTS[what])
    with jax.enable_x64(True):
        want, bound = expected(case)[""]
        off = abs(in_plain_jax(case)[""] - want)
    assert (off > 1e6 * bound).any(), (
        "XLA is mended here: for this fault the plan need not be stated any more"
    )
    check(case, Manual())
    check(case, Auto())


@pytest.mark.parametrize("what", XLAS_FAULTS)
def test_it_is_the_stated_plan_that_mends_it(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "only_reduces", lambda *_: True)
    with pytest.raises(AssertionError, match="value"):
        check(laid(*XLAS_FAULTS[what]), Auto())
