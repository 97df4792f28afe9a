"""Optimizers that draw random numbers keep typed PRNG keys: a run with one goes on bit for bit like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.checkpoints import CheckpointStore
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.step import TrainStep
from tests.support import batches, initial_params, make_step, model_configs, place, start

CONFIG = model_configs()["mlp"]


def trainer(shape: MeshShape) -> TrainStep:
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.adam(1e-2))
    return make_step(CONFIG, data() | fsdp(), shape, optimizer=noisy)


def numbers(tree: Any) -> list[np.ndarray]:
    keys = jax.dtypes.prng_key
    leaves = jax.tree.leaves(tree)
    return [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x) for x in leaves]


def test_a_run_whose_optimizer_holds_a_key_goes_on_bit_for_bit(tmp_path: Path) -> None:
    step = trainer(MeshShape(data=2, fsdp=4))
    given = batches(CONFIG, 4)
    state = start(step, initial_params(CONFIG))
    for at, batch in enumerate(given):
        if at == 2:
            with CheckpointStore(tmp_path / "checkpoints", 1) as store:
                store.save(2, state, {})
        state, _ = step.step(state, place(step, batch))
    with CheckpointStore(tmp_path / "checkpoints", 1) as store:
        resumed, meta = store.restore(2, step.abstract_state())
    assert [kind for _, kind in meta["tree"].values() if kind.startswith("key")] == ["key<fry>"]
    for batch in given[2:]:
        resumed, _ = step.step(resumed, place(step, batch))
    assert jax.tree.structure(resumed) == jax.tree.structure(state)
    for found, want in zip(numbers(resumed), numbers(state), strict=True):
        np.testing.assert_array_equal(found, want)


def test_a_key_comes_back_on_another_mesh(tmp_path: Path) -> None:
    step, other = trainer(MeshShape(data=2, fsdp=4)), trainer(MeshShape(fsdp=2))
    state = start(step, initial_params(CONFIG))
    with CheckpointStore(tmp_path / "checkpoints", 1) as store:
        store.save(1, state, {})
        store.wait()
        moved, _ = store.restore(1, other.abstract_state())
    for found, want in zip(numbers(moved), numbers(state), strict=True):
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("asked", [jax.random.key(0, impl="unsafe_rbg"), jnp.zeros(4, "uint32")])
def test_keys_of_another_kind_are_refused_although_they_hold_as_many_numbers(
    asked: Any, tmp_path: Path
) -> None:
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"key": jax.ShapeDtypeStruct(asked.shape, asked.dtype, sharding=whole)}
    with CheckpointStore(tmp_path / "checkpoints", 1) as store:
        store.save(1, {"key": jax.random.key(0, impl="rbg")}, {})
        store.wait()
        with pytest.raises(InputError, match=r"dtypes.*key<rbg>"):
            store.restore(1, abstract)
