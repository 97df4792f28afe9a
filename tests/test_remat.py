"""Rematerialization by name: the same gradients, the bytes that were asked for, and words that no op has are refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import pytest

from sharding import marks
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.ledger import scan_counts, subjaxprs
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.remat import parse_remat
from sharding.rule import Rules
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.expert import expert
from sharding.rules.fsdp import fsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from tests.support import assert_same, batches, initial_params, make_step, model_configs, train

MODELS = model_configs()
BOUND = 1e-5
NAMED = "save:attention offload:mlp"
MESHES: dict[str, tuple[Rules, MeshShape]] = {
    "fsdp tensor": (data() | fsdp() | tensor(), MeshShape(data=2, fsdp=2, tensor=2)),
    "tensor sequence": (data() | tensor() | sequence(), MeshShape(data=2, tensor=4)),
    "context": (data() | context(), MeshShape(data=2, context=4)),
}


@pytest.mark.parametrize(
    "partitioner", [Manual(), pytest.param(Auto(), marks=pytest.mark.slow)], ids=["manual", "auto"]
)
@pytest.mark.parametrize("loop", ["scan", pytest.param("unroll", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", MESHES)
def test_gradients_are_those_of_a_step_that_keeps_everything(
    case: str, loop: Any, partitioner: Partitioner
) -> None:
    if case == "context" and isinstance(partitioner, Auto):
        case = "fsdp tensor"  # a ring is the manual region's alone
    plain = dataclasses.replace(MODELS["transformer"], loop=loop)
    named = dataclasses.replace(plain, remat=NAMED)
    accumulate = 1 + (loop == "scan")
    found, kept = (
        train(make_step(c, *MESHES[case], partitioner, accumulate), initial_params(plain), batches(plain, 1))
        for c in (named, plain)
    )
    assert_same(found, kept, BOUND)


@pytest.mark.parametrize(
    "model", [m for m, c in MODELS.items() if hasattr(c, "remat") and m != "transformer"]
)
def test_other_models_name_their_results_too(model: str) -> None:
    config = MODELS[model]
    words = "save:attention,einsum offload:project"
    rules, mesh = data() | expert() | tensor(), MeshShape(data=2, expert=2, tensor=2)
    rules, mesh = (rules, mesh) if model == "moe" else MESHES["fsdp tensor"]
    found, kept = (
        train(make_step(c, rules, mesh), initial_params(config), batches(config, 1))
        for c in (dataclasses.replace(config, remat=words), config)
    )
    assert_same(found, kept, BOUND)


@functools.cache
def temporary(remat: str, layers: int) -> int:
    """Temporary bytes of a compiled step of so many scanned layers on one device of eight."""
    sizes = {"layers": layers, "embed": 32, "heads": 4, "head_dim": 8, "mlp": 128, "length": 64}
    config = dataclasses.replace(MODELS["transformer"], remat=remat, loop="scan", **sizes)
    step = make_step(config, *MESHES["fsdp tensor"])
    batch = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=step.batch_shardings()[k])
        for k, x in step.abstract_batch(16).items()
    }
    held = step.step.lower(step.abstract_state(), batch).compile().memory_analysis()
    assert held is not None
    return held.temp_size_in_bytes


def test_each_layer_keeps_the_bytes_that_were_named() -> None:
    """Compiled bytes that six more layers take, beside those of layers that keep their input alone."""
    grown = {r: temporary(r, 12) - temporary(r, 6) for r in ("full", "save:attention", "save:mlp", "none")}
    tokens = 16 // 4 * 64  # of a device
    attention = tokens * 2 * (8 + 1) * 4  # two heads of 8 and their sums
    gates = tokens * 2 * 64 * 4  # half of gate and up
    assert grown["save:attention"] - grown["full"] == pytest.approx(6 * attention, rel=0.1)
    assert grown["save:mlp"] - grown["full"] == pytest.approx(6 * gates, rel=0.1)
    held = [temporary(r, 12) for r in ("full", "save:attention", "save:mlp", "dots", "none")]
    assert held == sorted(held)


def test_both_ways_to_keep_take_part_in_one_policy() -> None:
    both = parse_remat("save:attention,heads offload:mlp,project")
    marked = [
        "attention:",
        "einsum:batch length gates mlp",
        "project:batch length heads head_dim",
        "rms_norm:embed",
    ]
    assert [both.of(m) for m in marked] == ["save", "offload", "save", "drop"]
    assert both.offloads
    assert not parse_remat("save:mlp").offloads


@pytest.mark.parametrize(
    "text",
    [
        "",
        "some",
        "save",
        "save:",
        "save:a,,b",
        "keep:mlp",
        "save: mlp",
        "full save:mlp",
        "save:mlp none",
        3,
        None,
    ],
)
def test_a_text_that_is_no_policy_is_refused(text: Any) -> None:
    with pytest.raises(InputError, match="The policies are none, dots, full, or by name"):
        parse_remat(text)


def test_a_word_has_one_fate() -> None:
    with pytest.raises(InputError, match="both saves and offloads mlp"):
        parse_remat("save:attention,mlp offload:mlp")
    with pytest.raises(InputError, match="has save: twice"):
        parse_remat("save:attention save:mlp")


@pytest.mark.parametrize(
    ("remat", "loop", "near"),
    [
        ("save:mpl", "scan", "mlp"),
        ("offload:atention", "unroll", "attention"),
        ("save:mlp,projekt", "scan", "project"),
    ],
)
def test_a_word_that_nothing_is_called_is_refused_with_those_that_there_are(
    remat: str, loop: Any, near: str
) -> None:
    config = dataclasses.replace(MODELS["transformer"], remat=remat, loop=loop)
    step = make_step(config, *MESHES["fsdp tensor"])
    with pytest.raises(
        InputError, match=f"Did you mean {near!r}.*Its ops are attention, einsum, project, rms_norm"
    ):
        step.step.trace(step.abstract_state(), step.abstract_batch(16))


def test_the_words_of_a_model_are_the_same_on_every_mesh() -> None:
    config, made = MODELS["transformer"], []
    for case, partitioner in itertools.product(MESHES, (Manual(), Auto())):
        if case == "context" and isinstance(partitioner, Auto):
            continue
        step = make_step(config, *MESHES[case], partitioner)
        with marks.marks() as seen:
            step.step.trace(step.abstract_state(), step.abstract_batch(16))
        made.append({word for text in seen for word in text.replace(":", " ").split()})
    assert made[0] > {"attention", "einsum", "project", "rms_norm", "mlp", "heads"}
    assert all(words == made[0] for words in made)


def test_a_backend_without_host_memory_is_told_before_the_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "HOST", "elsewhere")
    step = make_step(dataclasses.replace(MODELS["transformer"], remat="offload:mlp"), *MESHES["fsdp tensor"])
    with pytest.raises(InputError, match="remat='offload:mlp' needs the memory 'elsewhere'"):
        step.step.trace(step.abstract_state(), step.abstract_batch(16))


def kept_by_layers(by: Partitioner) -> int:
    """Bytes on a device that the scanned layers of a transformer hand from the forward pass to the backward pass."""
    config = dataclasses.replace(MODELS["transformer"], loop="scan", layers=3, dtype="bfloat16")
    step = make_step(config, fsdp(), MeshShape(fsdp=8), by)
    jaxpr = jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(16))
    scan = next(e for e in every_equation(jaxpr.jaxpr) if e.primitive.name == "scan")
    stacked = scan.outvars[scan_counts(scan)[1] :]
    return sum(v.aval.size * v.aval.dtype.itemsize for v in stacked)


def every_equation(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield eqn
        for body in subjaxprs(eqn.params):
            yield from every_equation(body)


def test_layers_that_gather_again_keep_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are dropped, and what a norm or a gate computes again is not kept in their place."""
    keep, again = (kept_by_layers(Manual(gathered=how)) for how in ("keep", "regather"))
    assert again < keep
    monkeypatch.setattr("sharding.ops.recomputed", jax.checkpoint)  # whose policy the outer one overrules
    monkeypatch.setattr("models.transformer.recomputed", jax.checkpoint)
    assert kept_by_layers(Manual(gathered="regather")) > keep
