"""A split computes the numbers of one device: initial parameters to the bit, loss, gradients and updates to rounding.

Every rule file and every model is taken up by being where it is. Faults are planted to see that the comparison, or the
types of the manual region, would catch them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import sharding.attention
import sharding.causal
import sharding.ops
import sharding.relayout
import sharding.step
from configs import quickstart
from experiments.optimizers import AdamW
from models.mlp import MLP
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.relayout import relayout, vary
from sharding.rule import Rules, also
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.hsdp import hsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from sharding.rules.zero1 import zero1
from sharding.rules.zero2 import zero2
from tests.faults import other_block, reduced_twice
from tests.support import (
    assert_same,
    batches,
    custom,
    departure,
    examples,
    in_double,
    initial_params,
    load,
    make_step,
    model_configs,
    oracle,
    rule_files,
    split_mesh,
    train,
    worst,
)

MODELS = model_configs()
BOUND = 1e-5
"""float32, relative to a leaf's largest entry: about 80 roundings, for sums over 128 tokens in another order and three
updates on top of each other."""
EXACT = 1e-12
"""float64 likewise."""
SMALL_MESH = MeshShape(data=2, fsdp=2, tensor=2)

CASES: dict[str, tuple[Rules, MeshShape]] = {
    "data": (data(), MeshShape(data=8)),
    "zero1": (zero1(), MeshShape(data=8)),
    "zero2": (zero2(), MeshShape(data=4)),
    "fsdp": (fsdp(), MeshShape(fsdp=8)),
    "hsdp": (hsdp(), MeshShape(data=2, fsdp=4)),
    "tensor": (tensor(), MeshShape(tensor=4)),
    "tensor sequence": (data() | tensor() | sequence(), MeshShape(data=2, tensor=4)),
    "data fsdp tensor": (data() | fsdp() | tensor(), SMALL_MESH),
    "data fsdp tensor sequence": (data() | fsdp() | tensor() | sequence(), SMALL_MESH),
    "data zero1 tensor": (data() | zero1("fsdp") | tensor(), SMALL_MESH),
    "zero2 tensor sequence": (zero2() | tensor() | sequence(), MeshShape(data=4, tensor=2)),
    "zero2 fsdp tensor": (zero2() | fsdp() | tensor(), SMALL_MESH),
    "zero1 fsdp": (zero1() | fsdp(), MeshShape(data=2, fsdp=4)),
    "hsdp tensor": (hsdp("replica") | tensor(), MeshShape(replica=2, fsdp=2, tensor=2)),
    "data context": (data() | sequence("context"), MeshShape(data=2, context=4)),
    "fsdp context tensor": (fsdp() | sequence("context") | tensor(), MeshShape(fsdp=2, context=2, tensor=2)),
    "stack of layers at rest": (
        custom(param={"layers": "fsdp"}, activation={"batch": also("fsdp")}),
        MeshShape(fsdp=2),
    ),
}
QUICK = {
    "hsdp",
    "tensor",
    "data fsdp tensor sequence",
    "zero2 tensor sequence",
    "fsdp context tensor",
    "stack of layers at rest",
}
"""Cases that between them hold every shipped strategy but ZeRO-1, which the quick tests of rules and of AdamW hold."""


def check(
    model: str,
    rules: Rules,
    mesh: MeshShape,
    partitioner: Partitioner = Manual(),  # noqa: B008
    accumulate: int = 1,
    clip: float = math.inf,
) -> None:
    """Three updates from the same parameters, on batches with unequal weights, one shard's all zero."""
    config = MODELS[model]
    step = make_step(config, rules, mesh, partitioner, accumulate, clip)
    found = train(step, initial_params(config), batches(config, 3))
    assert_same(found, oracle(config, 3, clip=clip), BOUND)


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_the_transformer_in_the_manual_region(case: str) -> None:
    check("transformer", *CASES[case], accumulate=1 + list(CASES).index(case) % 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_transformer_under_xlas_partitioner(case: str) -> None:
    check("transformer", *CASES[case], partitioner=Auto(), accumulate=1 + list(CASES).index(case) % 2)


@pytest.mark.slow
@pytest.mark.parametrize("partitioner", [Manual(), Auto()], ids=["manual", "auto"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", sorted(set(MODELS) - {"transformer"}))
def test_the_other_models(model: str, case: str, partitioner: Partitioner) -> None:
    odd = list(CASES).index(case) + isinstance(partitioner, Manual)
    check(model, *CASES[case], partitioner=partitioner, accumulate=1 + odd % 2)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("partitioner", [Manual(), Auto()], ids=["manual", "auto"])
def test_every_model_found_in_its_folder(model: str, partitioner: Partitioner) -> None:
    check(model, data() | fsdp() | tensor(), SMALL_MESH, partitioner, accumulate=2)


@pytest.mark.parametrize("rules", [r for path in rule_files() for r in examples(path)], ids=repr)
def test_every_rule_found_in_its_folder(rules: Rules) -> None:
    check("mlp", rules, split_mesh(rules))


def test_a_rule_from_outside_the_repo(tmp_path: Path) -> None:
    path = tmp_path / "rows.py"
    path.write_text(
        "from sharding.rule import Rule, also, rule\n\n@rule\ndef rows(axis: str = 'expert') -> Rule:\n"
        "    return Rule(compute={'embed': axis}, activation={'batch': also('data')})\n"
    )
    check("mlp", load(path, "somebodys_rows").rows(), MeshShape(data=2, expert=4))


def test_gathered_parameters_may_be_kept() -> None:
    check("mlp", hsdp(), MeshShape(data=2, fsdp=4), Manual(gathered="keep"))


def test_clipping_sees_the_norm_of_the_whole_gradient() -> None:
    free = oracle(MODELS["mlp"], 3)
    clip = 0.5 * min(m["grad_norm"] for m in free.metrics)
    norm = float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in free.gradients[0].values())))
    assert free.metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert departure(oracle(MODELS["mlp"], 3, clip=clip).metrics[0]["grad_norm"], norm) < BOUND
    for partitioner in (Manual(), Auto()):
        check("mlp", zero2() | fsdp() | tensor(), SMALL_MESH, partitioner, clip=clip)


def test_rows_that_do_not_accumulate_are_refused() -> None:
    config = MODELS["mlp"]
    step = make_step(config, data(), MeshShape(data=8), accumulate=4)
    with pytest.raises(InputError, match="2 rows on a device cannot be accumulated in 4"):
        train(step, initial_params(config), batches(config, 1))


@pytest.mark.parametrize(
    "case", ["zero1", "data fsdp tensor", pytest.param("tensor sequence", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("model", MODELS)
def test_initial_parameters_are_those_of_one_device_to_the_bit(model: str, case: str) -> None:
    state = make_step(MODELS[model], *CASES[case]).init(0)
    for path, made in jax.device_get(state["params"]).items():
        np.testing.assert_array_equal(made, initial_params(MODELS[model])[path], err_msg=path)


@pytest.mark.parametrize("partitioner", [Manual(), Auto()], ids=["manual", "auto"])
def test_adamw_of_the_quickstart_makes_the_same_updates(partitioner: Partitioner) -> None:
    # A gradient near zero has a sign that rounding decides and AdamW makes it a whole step: judged by the whole leaf.
    config, adamw = MODELS["mlp"], quickstart.config().optimizer
    assert isinstance(adamw, AdamW)
    made = [
        train(
            make_step(config, *split, clip=adamw.clip, optimizer=adamw.build(10)),
            initial_params(config),
            batches(config, 3),
        )
        for split in [(), (zero1() | fsdp() | tensor(), SMALL_MESH, partitioner)]
    ]
    for path, want in made[0].params.items():
        assert np.linalg.norm(made[1].params[path] - want) < 1e-4 * np.linalg.norm(want), path


def _sums(step: Any, params: dict[str, np.ndarray], batch: dict[str, np.ndarray]) -> dict[str, float]:
    from tests.support import place, start

    return {k: float(v) for k, v in step.evaluate(start(step, params)["params"], place(step, batch)).items()}


@pytest.mark.parametrize("partitioner", [Manual(), Auto()], ids=["manual", "auto"])
def test_evaluation_gives_the_same_global_sums(partitioner: Partitioner) -> None:
    config = MODELS["mlp"]
    (batch,), params = batches(config, 1), initial_params(config)
    want = _sums(make_step(config), params, batch)
    found = _sums(make_step(config, data() | fsdp() | tensor(), SMALL_MESH, partitioner), params, batch)
    assert found == pytest.approx(want, rel=BOUND)
    assert want["weight"] == pytest.approx(batch["weights"].sum(), rel=1e-6)


# Double precision: what is left is rounding, so nothing but the order of sums may differ.


@pytest.mark.parametrize(
    ("model", "case"),
    [
        ("mlp", "data fsdp tensor"),
        ("mlp", "zero2 fsdp tensor"),
        ("transformer", "data fsdp tensor sequence"),
        pytest.param("transformer", "zero2 tensor sequence", marks=pytest.mark.slow),
        pytest.param("transformer", "fsdp context tensor", marks=pytest.mark.slow),
    ],
)
def test_in_double_precision_only_rounding_is_left(model: str, case: str) -> None:
    many, one = in_double(MODELS[model], *CASES[case])
    assert_same(many, one, EXACT)
    assert_same(oracle(MODELS[model], 2), one, 1e-4)  # and the float32 of above is the same model


@pytest.mark.slow
def test_bfloat16_activations_agree_to_their_own_rounding() -> None:
    # 8 bits of mantissa, gradients reduced in bfloat16 where parameters are gathered in it: a few per cent of a leaf's
    # largest entry, against float32 as against one device in bfloat16.
    config = dataclasses.replace(MODELS["transformer"], dtype="bfloat16")
    found = train(
        make_step(config, data() | fsdp() | tensor(), SMALL_MESH),
        initial_params(MODELS["transformer"]),
        batches(config, 2),
    )
    for want in (oracle(config, 2), oracle(MODELS["transformer"], 2)):
        assert abs(found.metrics[0]["loss"] - want.metrics[0]["loss"]) < 0.02 * want.metrics[0]["loss"]
        error, leaf = worst(found.gradients[0], want.gradients[0])
        assert error < 0.1, (leaf, error)
    assert all(w.dtype == np.float32 for w in found.params.values())


# Planted faults: the types of the manual region refuse a missing reduction, the comparison sees the rest.

PLANT = (data() | fsdp() | tensor(), SMALL_MESH)


def _no_reduction(x: Any, partial: Any, src: Any, dst: Any) -> Any:
    return relayout(x, src, dst)


def _wrong_axis(x: Any, partial: Any, src: Any, dst: Any) -> Any:
    swap = {"data": "fsdp", "fsdp": "data", "tensor": "data"}
    over = tuple(dict.fromkeys(swap[a] for a in partial))
    return relayout(lax.psum(vary(x, frozenset(over)), over) if over else x, src, dst)


FORGOTTEN: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "an op forgets to reduce": (sharding.ops, "finish", _no_reduction),
    "an op reduces over another axis": (sharding.ops, "finish", _wrong_axis),
    "gradients are not reduced over data": (sharding.step.TrainStep, "_reduce", lambda self, path, g: g),
    "the loss is left where it is": (
        MLP,
        "loss",
        lambda self, b: {"loss": jnp.sum(b["weights"]), "weight": jnp.sum(b["weights"])},
    ),
}


@pytest.mark.parametrize("fault", FORGOTTEN)
def test_a_forgotten_reduction_is_an_error_of_types_before_anything_runs(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*FORGOTTEN[fault])
    step = make_step(MODELS["mlp"], *PLANT)
    with pytest.raises((ValueError, TypeError)):
        jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(16))


def _own_weights(self: Any, sums: Any, norm: Any) -> Any:
    weight = sums["weight"] / 2 + 8.0  # a mean over rows, as if every shard weighed the same
    means = {name: total / weight for name, total in sums.items() if name != "weight"}
    return 1.0 / weight, {**means, "weight": sums["weight"], "grad_norm": norm / weight}


WRONG: dict[str, tuple[str, Any, str, Callable[..., Any], Rules]] = {
    "gradients reduced twice": ("mlp", sharding.step.TrainStep, "_reduce", reduced_twice, PLANT[0]),
    "blocks taken in another order": (
        "mlp",
        sharding.relayout,
        "_slice",
        other_block,
        zero1() | fsdp() | tensor(),
    ),
    "a mean over shards of unequal weight": (
        "mlp",
        sharding.step.TrainStep,
        "_finished",
        _own_weights,
        PLANT[0],
    ),
    "embedding rows of another device": (
        "transformer",
        sharding.ops,
        "_own_rows",
        lambda ids, axes, rows: (
            vary(ids, frozenset(axes)) % rows,
            (vary(ids, frozenset(axes)) // rows) == 0,
        ),
        PLANT[0],
    ),
    "positions that start anew on each device": (
        "transformer",
        sharding.attention,
        "positions",
        lambda x, names: jnp.arange(x.shape[1], dtype=jnp.int32),
        data() | fsdp() | sequence(),
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_planted_fault_departs_from_one_device(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, where, name, planted, rules = WRONG[fault]
    config = MODELS[model]
    want = oracle(config, 3)
    monkeypatch.setattr(where, name, planted)
    found = train(make_step(config, rules, SMALL_MESH), initial_params(config), batches(config, 1))
    with pytest.raises(AssertionError, match=r"departs|loss|correct|grad_norm"):
        assert_same(found, want._replace(metrics=want.metrics[:1], gradients=want.gradients[:1]), 100 * BOUND)
    assert worst(found.gradients[0], want.gradients[0])[0] > 100 * BOUND, (
        "by the gradients, not by a metric alone"
    )


def test_a_fault_that_gradients_hide_is_seen_in_the_update() -> None:
    config, want = MODELS["mlp"], oracle(MODELS["mlp"], 1)
    step = make_step(config, *PLANT, optimizer=optax.sgd(0.1001))
    found = train(step, initial_params(config), batches(config, 1))
    assert worst(found.gradients[0], want.gradients[0])[0] < BOUND
    with pytest.raises(AssertionError, match=r"parameter .* departs"):
        assert_same(found, want, BOUND)
