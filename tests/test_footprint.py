"""Predicted memory: closed forms, each habit of a compiler on a program that shows nothing else, and real compilers' word."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, ShapeDtypeStruct, lax

from experiments.compilers.ask import compile_for
from experiments.config import Devices, Experiment
from experiments.data.stdlib import Stdlib
from experiments.optimizers import AdamW
from experiments.plans.estimate import estimate
from models.transformer_config import TransformerConfig
from sharding.axes import MeshShape
from sharding.price.footprint import peak
from sharding.price.prediction import Footprint
from sharding.price.target import parse_target
from sharding.rule import Rules
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.tensor import tensor
from tests.test_compilers import need

WORDS = TransformerConfig(
    vocab=4096, layers=4, embed=256, heads=4, kv_heads=2, head_dim=64, mlp=1024, length=256, loop="scan"
)
HALF = dataclasses.replace(
    WORDS, vocab=8192, layers=5, embed=512, heads=8, kv_heads=4, mlp=2048, length=512, dtype="bfloat16"
)
FSDP, RING = (fsdp(), {"fsdp": 8}), data() | context()
SPLIT = (data() | fsdp() | tensor(), {"data": 2, "fsdp": 2, "tensor": 2})
ROWS = 64


def case(
    model: TransformerConfig, rules: Rules, sizes: dict[str, int], rows: int = ROWS, **more: Any
) -> Experiment:
    """An experiment with everything but its memory left aside."""
    return Experiment(
        name="footprint",
        model=dataclasses.replace(model, **more),
        data=Stdlib(length=256),
        rules=rules,
        mesh=MeshShape(**sizes),
        devices=Devices("pretend", 8),
        optimizer=AdamW(),
        batch=rows,
        steps=1,
    )


def predicted(
    model: TransformerConfig, split: tuple[Rules, dict[str, int]], target: str, **more: Any
) -> Footprint:
    return estimate(case(model, *split, **more), parse_target(target)).predicted.memory


# Closed forms.


@pytest.mark.parametrize("target", ["cpu:8", "gpu:h100:8"])
def test_full_remat_keeps_one_activation_a_layer(target: str) -> None:
    """Whatever else is alive when most is, it does not grow with the layers."""
    few, more = (predicted(HALF, FSDP, target, remat="full", layers=n).kept for n in (6, 16))
    activation = ROWS // 8 * HALF.length * HALF.embed * 2
    assert more - few == 10 * activation


def test_what_is_kept_doubles_with_the_layers() -> None:
    few, more = (predicted(HALF, FSDP, "gpu:h100:8", remat="none", layers=n) for n in (8, 16))
    most = (predicted(HALF, FSDP, "gpu:h100:8", remat="none", layers=24)).kept
    assert more.kept - few.kept == most - more.kept
    assert more.kept == pytest.approx(2 * few.kept, rel=0.15)


@pytest.mark.parametrize("target", ["cpu:8", "gpu:h100:8", "tpu:v5p:2x2x2"])
def test_the_more_is_computed_again_the_less_lies(target: str) -> None:
    none, dots, full = (predicted(HALF, FSDP, target, remat=r).total for r in ("none", "dots", "full"))
    assert none > 1.1 * dots
    assert dots > 1.1 * full


def test_rows_divide_what_is_kept_and_leave_parameters() -> None:
    one, two = (predicted(HALF, FSDP, "gpu:h100:8", rows=n) for n in (64, 128))
    assert two.kept == pytest.approx(2 * one.kept, rel=0.01)
    assert (two.parameters, two.optimizer, two.batch) == (one.parameters, one.optimizer, 2 * one.batch)


def test_a_ring_divides_what_is_kept() -> None:
    split = lambda n: (RING, {"data": 2, "context": 4} if n == 4 else {"data": 4, "context": 2})
    two, four = (predicted(HALF, split(n), "gpu:h100:8", rows=16 if n == 4 else 32) for n in (2, 4))
    assert four.kept == pytest.approx(two.kept / 2, rel=0.05) or four.kept < two.kept
    whole = predicted(HALF, (data(), {"data": 8}), "gpu:h100:8", rows=64)
    assert four.kept < 0.6 * whole.kept


def test_tensor_divides_parameters_and_what_lies_in_a_layer() -> None:
    whole, split = (
        predicted(HALF, (data() | tensor(), sizes), "gpu:h100:8", rows=8 * sizes["data"])
        for sizes in ({"data": 8}, {"data": 4, "tensor": 2})
    )
    assert whole.parameters * 0.5 <= split.parameters < 0.51 * whole.parameters
    assert 0.5 * whole.kept < split.kept < 0.75 * whole.kept


def test_memory_on_a_chip_takes_from_the_devices() -> None:
    """A v5e has 112 MiB for it, a v5p 48; never more than is alive."""
    small, large = (predicted(HALF, FSDP, t, remat="full") for t in ("tpu:v5p:2x2x2", "tpu:v5e:2x4"))
    assert (small.on_chip, large.on_chip) == (48 * 2**20, 112 * 2**20)
    assert small.kept + small.made + small.on_chip == large.kept + large.made + large.on_chip
    tiny = predicted(WORDS, FSDP, "tpu:v5e:2x4", remat="full", rows=8, length=32)
    assert min(tiny.kept, tiny.made) >= 0
    assert tiny.on_chip < 112 * 2**20


# Habits, each on a program of arrays of 4 MiB (A) or 2 MiB (in bfloat16).

A = ShapeDtypeStruct((1024, 1024), jnp.float32)
MIB = 2**20


def bytes_of(call: Callable[..., Any], *given: Any, platform: str = "tpu", on_chip: int = 0) -> int:
    return peak(jax.make_jaxpr(call)(*given), platform, on_chip).total


def test_elementwise_work_is_fused() -> None:
    assert bytes_of(lambda x, w: jnp.sum(jnp.tanh(x @ w) * 2 + 1), A, A) == pytest.approx(4 * MIB, abs=64)
    assert bytes_of(lambda x, w: (jnp.tanh(x @ w) * 2) @ w, A, A) == 8 * MIB


def test_what_is_read_late_lies_until_then() -> None:
    def call(x: Array, w: Array) -> Array:
        y = x @ w
        return (w @ (w @ y)) @ y

    assert bytes_of(call, A, A) == 12 * MIB


def test_the_cpu_computes_dear_results_once() -> None:
    def call(x: Array, w: Array) -> Array:
        e = jnp.exp(x @ w)
        return jnp.sum(e, axis=0) + jnp.sum(jnp.square(lax.stop_gradient(e)) @ w, axis=0)

    # on CPU `e` lies beside its square, which a product reads, and elsewhere the product that it is computed from
    assert bytes_of(call, A, A, platform="cpu") >= bytes_of(call, A, A)
    two = lambda x, w: (jnp.exp(x @ w) + 1, jnp.exp(x @ w) + 2)
    once = lambda x, w: (lambda e: (e.sum(0), (e + 1).sum(0), e.sum(1)))(jnp.exp(x @ w))
    assert bytes_of(two, A, A, platform="cpu") >= 8 * MIB
    assert bytes_of(once, A, A, platform="cpu") == pytest.approx(4 * MIB, abs=20_000)


def test_the_cpu_copies_a_turned_operand() -> None:
    straight = bytes_of(lambda x, w: jnp.einsum("ab,bc->ac", x, w), A, A, platform="cpu")
    turned = bytes_of(lambda x, w: jnp.einsum("ba,bc->ac", x, w), A, A, platform="cpu")
    assert (straight, turned) == (4 * MIB, 8 * MIB)


def test_rounding_and_widening_leave_what_was() -> None:
    """The narrow array lies for the product that reads it, but the sum reads the wide one."""

    def call(x: Array, w: Array) -> tuple[Array, Array]:
        y = jnp.dot(x, w)
        narrow = y.astype(jnp.bfloat16)
        return narrow @ narrow, jnp.tanh(narrow.astype(jnp.float32)) + 1

    assert bytes_of(call, A, A) == (4 + 2 + 2) * MIB


def loop(x: Array, stack: Array) -> Array:
    return lax.scan(lambda x, w: (x @ (w + 1) @ (w + 2), None), x, stack)[0]


def test_a_gpu_cuts_rows_out() -> None:
    stack = ShapeDtypeStruct((8, 1024, 1024), jnp.float32)
    assert bytes_of(loop, A, stack, platform="gpu") >= bytes_of(loop, A, stack) + 4 * MIB


def test_a_gpu_puts_gradients_of_matrices_last() -> None:
    """The gradient of the second matrix waits for the loop, and with it both arrays that it is made of."""
    stack = ShapeDtypeStruct((8, 1024, 1024), jnp.float32)

    def call(x: Array, above: Array, stack: Array) -> tuple[Array, Array]:
        y = jnp.tanh(x @ x)
        return jnp.einsum("ab,ac->bc", y, above @ above), lax.scan(
            lambda c, w: (c @ w, None), above @ x, stack
        )[0]

    assert bytes_of(call, A, A, stack, platform="gpu") >= bytes_of(call, A, A, stack) + 4 * MIB


def test_a_tpu_casts_a_stack_before_its_loop() -> None:
    stack = ShapeDtypeStruct((8, 1024, 1024), jnp.float32)
    x = ShapeDtypeStruct((1024, 1024), jnp.bfloat16)

    def cast(x: Array, stack: Array) -> Array:
        return lax.scan(lambda x, w: (x @ w.astype(jnp.bfloat16), None), x, stack)[0]

    given = lambda platform: bytes_of(cast, x, stack, platform=platform)
    assert (
        given("tpu") - given("gpu") >= 16 * MIB - 4 * MIB
    )  # the whole stack in bfloat16; the GPU cuts a row out in float32


# Compilers.


def compiled(folder: Path, name: str, target: str) -> int:
    """Bytes that a compiler lays out beside its program's code."""
    path = folder / "case.py"
    path.write_text(f"from tests.test_footprint import CASES\ndef config():\n    return CASES[{name!r}]\n")
    found = compile_for(path, (), parse_target(target), "manual")
    assert found.memory is not None
    return found.memory.total - found.memory.code


CASES = {
    **{f"{r} cpu": case(WORDS, *FSDP, remat=r) for r in ("none", "dots", "full")},
    **{f"{r} fsdp": case(HALF, *FSDP, remat=r) for r in ("none", "dots", "full", "save:attention")},
    **{f"{r} split": case(HALF, *SPLIT, remat=r) for r in ("none", "full")},
    "ring": case(HALF, RING, {"data": 2, "context": 4}, length=1024),
    "data": case(HALF, data(), {"data": 8}),
    "none large": case(HALF, *FSDP, rows=640),
}


def test_the_cpus_compiler_lays_out_what_was_predicted(tmp_path: Path) -> None:
    lies = compiled(tmp_path, "dots cpu", "cpu:8")
    assert estimate(CASES["dots cpu"], parse_target("cpu:8")).predicted.memory.total == pytest.approx(
        lies, rel=0.1
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("none cpu", "cpu:8"),
        ("full cpu", "cpu:8"),
        *((name, "gpu:h100:8") for name in CASES if not name.endswith(("cpu", "large"))),
        ("none large", "tpu:v5e:2x4"),
        ("ring", "tpu:v5e:2x4"),
        ("data", "tpu:v5e:2x4"),
        ("full fsdp", "tpu:v5p:2x2x2"),
        ("none fsdp", "tpu:v5p:2x2x2"),
    ],
)
def test_compilers_lay_out_what_was_predicted(name: str, target: str, tmp_path: Path) -> None:
    need(target)
    lies = compiled(tmp_path, name, target)
    assert estimate(CASES[name], parse_target(target)).predicted.memory.total == pytest.approx(lies, rel=0.1)
