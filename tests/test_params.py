"""The abstract tree: what a model declares before any array exists, and the initial values that derive from it."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sharding.params
from models.transformer_config import TransformerConfig
from sharding.errors import InputError
from sharding.params import bind, declare, drawing, initial, matrices, normal, ones, param, stack, values

SMALL = TransformerConfig(vocab=16, layers=2, embed=8, heads=2, kv_heads=1, head_dim=4, mlp=12, length=8)


class Block(nnx.Module):
    """A matrix and a scale."""

    def __init__(self) -> None:
        self.weight = param("embed mlp", (4, 8), normal(1.0))
        self.scale = param("mlp", (8,), ones)


class Stacked(nnx.Module):
    """Three blocks in one."""

    def __init__(self) -> None:
        self.layers = stack(Block(), 3)


def test_a_stacked_block_has_a_leading_dim_with_a_name() -> None:
    tree = declare(Stacked())
    assert {p: (s.names, s.shape) for p, s in tree.items()} == {
        "layers.weight": (("layers", "embed", "mlp"), (3, 4, 8)),
        "layers.scale": (("layers", "mlp"), (3, 8)),
    }
    assert matrices(tree) == {"layers.weight": True, "layers.scale": False}


def test_large_arrays_are_drawn_the_same_as_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = declare(SMALL.build())
    flat = jax.jit(lambda: initial(tree, 3))()
    monkeypatch.setattr(sharding.params, "FLAT_UP_TO", 0)
    shaped = jax.jit(lambda: initial(tree, 3))()
    for path in tree:
        np.testing.assert_array_equal(flat[path], shaped[path])


def test_initial_values_depend_on_seed_and_path_alone() -> None:
    tree = declare(SMALL.build())
    first, other = initial(tree, 0), initial(tree, 1)
    alone = initial({"table": tree["table"]}, 0)
    np.testing.assert_array_equal(first["table"], alone["table"])
    assert not np.array_equal(first["table"], other["table"])
    assert not np.array_equal(first["layers.attention.k"], first["layers.attention.v"])


@pytest.fixture
def offset() -> Iterator[None]:
    """JAX_RANDOM_SEED_OFFSET set, for the test."""
    jax.config.update("jax_random_seed_offset", 7)
    yield
    jax.config.update("jax_random_seed_offset", 0)


def test_an_offset_of_jax_changes_no_initial_value(request: pytest.FixtureRequest) -> None:
    tree = declare(SMALL.build())
    usual = initial(tree, 3)
    request.getfixturevalue("offset")
    assert jax.random.key_data(jax.random.key(3)).tolist() == [0, 10], "the setting is in force"
    drawn, jitted = initial(tree, 3), jax.jit(lambda: initial(tree, 3))()
    for path in tree:
        np.testing.assert_array_equal(usual[path], drawn[path])
        np.testing.assert_array_equal(usual[path], jitted[path])


@pytest.mark.parametrize("seed", [0, 3, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("x64", [False, True])
def test_the_key_of_a_seed_is_the_one_that_jax_makes(seed: int, x64: bool) -> None:
    with jax.enable_x64(x64), drawing(seed) as key:
        asked = jax.random.key(seed, impl="threefry2x32")
        assert key.dtype == asked.dtype
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(asked))


@pytest.mark.parametrize("setting", ["rbg", "not partitionable"])
def test_initial_values_depend_on_no_setting_of_jax(setting: str) -> None:
    tree = declare(SMALL.build())
    usual, jitted = initial(tree, 3), jax.jit(lambda: initial(tree, 3))()
    other = jax.default_prng_impl("rbg") if setting == "rbg" else jax.threefry_partitionable(False)
    with other:
        drawn, again = initial(tree, 3), jax.jit(lambda: initial(tree, 3))()
    for path in tree:
        np.testing.assert_array_equal(usual[path], drawn[path])
        np.testing.assert_array_equal(jitted[path], again[path])


def test_bound_arrays_are_what_the_model_holds() -> None:
    model = Stacked()
    arrays = {p: jnp.zeros(s.shape, s.dtype) for p, s in declare(model).items()}
    held = values(bind(model, arrays))
    assert all(held[p] is arrays[p] for p in arrays)
    assert isinstance(values(model)["layers.weight"], jax.ShapeDtypeStruct), "the template holds no arrays"


def test_a_parameter_without_names_is_refused() -> None:
    class Bare(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.zeros((2, 2)))

    with pytest.raises(InputError, match=r"weight carries no names.*sharding\.params\.param"):
        declare(Bare())
    with pytest.raises(InputError, match=r"names 1 dims \(embed\) for a shape of 2 dims"):
        param("embed", (2, 3), ones)
