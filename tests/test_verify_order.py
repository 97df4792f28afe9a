"""Of an array whose positions lie in zig-zag order the bisector names the shard that is wrong."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest
from jax import Array, lax

import sharding.ops
from sharding.axes import MeshShape
from sharding.region import current
from sharding.rules.context import context
from sharding.rules.data import data
from tests.verified import Opened, judged, only, small


@pytest.mark.parametrize("times", [0.0, 1.25])
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_the_wrong_shard_is_named_in_any_order(
    order: Any, times: float, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    real = sharding.ops.tap

    def planted(op: str, names: tuple[str, ...], x: Array) -> Array:
        region = current()
        if op == "rms_norm" and region is not None and region.manual:
            x = jnp.where(lax.axis_index("context") == 1, x * jnp.asarray(times, x.dtype), x)
        return real(op, names, x)

    monkeypatch.setattr(sharding.ops, "tap", planted)
    e = small("transformer", data() | context(order=order))
    departure = only(judged(e, opened, MeshShape(context=4))).departure
    assert departure is not None
    assert "rms_norm" in departure.what
    if times:
        assert "each of the 4 shards of length (context)" in departure.looks, departure
        assert "(1, 1.25, 1, 1)" in departure.looks, departure
    else:
        assert "these are shards [1] of the 4 over context" in departure.looks, departure
