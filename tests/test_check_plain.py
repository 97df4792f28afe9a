"""The checker on plain jax: positions of a split dim are refused with the line, anything else is left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from sharding.check import check
from sharding.errors import InputError
from sharding.ops import back, whole
from sharding.partitioner import Auto
from sharding.rule import Rule, Rules, rule
from sharding.rules.data import data
from sharding.rules.tensor import tensor
from tests.checked import WIDE, PlainConfig, found, inside, line_of, step_of


def _brought_together(h: jax.Array) -> jax.Array:
    all_of_it, lies = whole(h, "batch mlp", "mlp")
    return back(jnp.roll(all_of_it, 1, axis=1), "batch mlp", lies)


HOW: dict[str, Any] = {
    "one": lambda h: h * h[..., 0][:, None],
    "one beyond": lambda h: h * h[:, 12][:, None],
    "rest": lambda h: jnp.pad(h[:, 1:], ((0, 0), (0, 1))),
    "step": lambda h: jnp.repeat(h[:, ::2], 2, axis=1),
    "roll": lambda h: jnp.roll(h, 1, axis=1),
    "pad": lambda h: lax.pad(h, jnp.zeros((), h.dtype), ((0, 0, 0), (1, -1, 0))),
    "join": lambda h: jnp.concatenate([h, h], axis=1).reshape(*h.shape, 2).sum(-1),
    "halves": lambda h: jnp.concatenate(jnp.split(h, 2, axis=1)[::-1], axis=1),
    "flip": lambda h: jnp.flip(h, axis=1),
    "take": lambda h: jnp.take(h, jnp.array([0] * h.shape[1]), axis=1),
    "set": lambda h: h.at[:, 0].set(0.0),
    "dynamic": lambda h: h * lax.dynamic_slice_in_dim(h, 1, 1, axis=1),
    "update": lambda h: lax.dynamic_update_slice_in_dim(h, jnp.zeros_like(h[:, :1]), 1, axis=1),
    "conv": lambda h: lax.conv_general_dilated(h[:, None], jnp.ones((1, 1, 3)), (1,), "SAME")[:, 0],
    "rows": lambda h: jnp.pad(h[1:], ((0, 1), (0, 0))),
    "tile": lambda h: jnp.tile(h, (1, 2)).reshape(*h.shape, 2).sum(-1),
}
CLEAN: dict[str, Any] = {
    "elementwise": lambda h: jax.nn.gelu(h) * 2.0,
    "all of it": lambda h: h[:, :][:, 0 : h.shape[1]][...],
    "new dim": lambda h: h[:, None, :][:, 0] + jnp.stack([h, h], axis=1)[:, 1],
    "counted": lambda h: h + jnp.arange(h.shape[1], dtype=h.dtype)[None],
    "brought together": _brought_together,
}
HOW |= CLEAN


@pytest.mark.parametrize("how", [h for h in HOW if h not in CLEAN])
def test_plain_jax_that_takes_positions_of_a_split_dim_is_refused(how: str) -> None:
    line = HOW[how].__code__.co_firstlineno
    with pytest.raises(InputError, match=rf"test_check_plain\.py:{line}: plain jax") as caught:
        found(data() | tensor(), PlainConfig(HOW[how]), data=2, tensor=2)
    assert " 16 " in str(caught.value) or "mlp = 16" in str(caught.value) or how == "rows"
    unsplit, mesh = (Rules(), {}) if how == "rows" else (data(), {"data": 4})
    assert inside(lambda: check(step_of(unsplit, PlainConfig(HOW[how]), **mesh), 16)) == ()
    alone = step_of(data() | tensor(), PlainConfig(HOW[how]), Auto(), data=2, tensor=2)
    assert inside(lambda: check(alone, 16)) == (), "XLA's partitioner sees whole arrays"


@pytest.mark.parametrize("how", CLEAN)
def test_plain_jax_that_takes_no_positions_is_left_alone(how: str) -> None:
    assert found(data() | tensor(), PlainConfig(HOW[how]), data=2, tensor=2) == []


@rule
def splits_gates(axis: str = "tensor") -> Rule:
    """Splits what the transformer's feed-forward indexes."""
    return Rule(compute={"gates": axis}, activation={"gates": axis})


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_a_model_that_cannot_be_traced_on_shards_is_told_which_dim(loop: Any) -> None:
    with pytest.raises(InputError, match=r"models/transformer\.py:\d+: plain jax \(slice\)") as caught:
        found(splits_gates(), replace(WIDE, loop=loop), tensor=2)
    assert f"gates = 2, which rule splits_gates() ({line_of(splits_gates)}) splits over tensor" in str(
        caught.value
    )


def test_what_fails_in_the_package_itself_is_not_called_the_models_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sharding.relayout.scatter_axes", None)
    with pytest.raises(TypeError, match="not callable"):
        found(data() | tensor(), PlainConfig(HOW["elementwise"]), data=2, tensor=2)
