"""Of an array whose positions lie in zig-zag order the bisector names the shard that is wrong."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest
from jax import Array, lax

import sharding.ops
from sharding.axes import MeshShape
from sharding.region import current
from sharding.rule import Rules
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from tests.verified import Opened, judged, only, small

TENSOR = tensor() | sequence()


@pytest.mark.parametrize(
    ("order", "times", "further"),
    [
        ("zigzag", 1.25, Rules()),
        ("contiguous", 0.0, Rules()),
        ("zigzag", 1.25, TENSOR),
        ("zigzag", 0.0, TENSOR),
    ],
    ids=str,
)
def test_the_wrong_shard_is_named_in_any_order(
    order: Any, times: float, further: Rules, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    real = sharding.ops.tap
    mesh = MeshShape(context=2, tensor=2) if further == TENSOR else MeshShape(context=4)
    axes = tuple(a for a, n in mesh.sizes().items() if n > 1)

    def planted(op: str, names: tuple[str, ...], x: Array) -> Array:
        region = current()
        if op == "rms_norm" and region is not None and region.manual:
            x = jnp.where(lax.axis_index(axes) == 1, x * jnp.asarray(times, x.dtype), x)
        return real(op, names, x)

    monkeypatch.setattr(sharding.ops, "tap", planted)
    e = small("transformer", data() | context(order=order) | further)
    departure = only(judged(e, opened, mesh)).departure
    assert departure is not None
    assert "rms_norm" in departure.what
    if times:
        assert f"each of the 4 shards of length ({'/'.join(axes)})" in departure.looks, departure
        assert "(1, 1.25, 1, 1)" in departure.looks, departure
    else:
        assert f"these are shards [1] of the 4 over {' x '.join(axes)}" in departure.looks, departure
