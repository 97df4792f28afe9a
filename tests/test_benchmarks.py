"""The hand-written steps that shardlab is measured against compute what it does: losses, and every weight's gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import Array, lax

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CLOSE = 2e-5
"""Of the largest element of an array: float32 sums in another order."""


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' own imports, as when they are run."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def small(split: str) -> Any:
    """The workload of a split with few and narrow layers; of experts one in which choices are dropped."""
    cases = import_module("cases")
    sizes = cases.CASES[split].sizes
    if split == "spatial":
        return replace(sizes, height=16, width=8, embed=8, mlp=16, layers=1)
    sizes = replace(sizes, vocab=32, embed=16, layers=2, heads=4, kv_heads=4, head_dim=4, mlp=16)
    if split == "expert":
        return replace(sizes, batch=8, length=64, capacity=1.0)
    return replace(sizes, batch=2 if split == "context" else 8, length=64)


def apart(split: str) -> tuple[float, str, dict[str, Array]]:
    """How far the two sides are from each other after a step, relative to an array's largest element: the most of the loss and
    of every gradient (as the first moment of AdamW holds it), which it is, and what shardlab reports.
    """
    cases, sizes = import_module("cases"), small(split)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        step, state, batch = cases.build_theirs(split, sizes)
        state, loss = step(state, batch)
    moments = {name: np.asarray(x) for name, x in _first_moments(state["optimizer"]).items()}
    for name in [name for name in moments if name.endswith("gate_up")]:
        both, layer = moments.pop(name), name.removesuffix("gate_up")
        moments |= {f"{layer}gate": both[..., 0, :], f"{layer}up": both[..., 1, :]}
    theirs = cases.parameters(moments, sizes)
    step, state, batch = cases.build_ours(split, sizes)
    state, told = step(state, batch)
    ours = _first_moments(state["optimizer"])
    assert ours.keys() == theirs.keys()
    far = {
        p: float(np.abs(np.asarray(x) - theirs[p]).max() / np.abs(theirs[p]).max()) for p, x in ours.items()
    }
    far["loss"] = abs(float(told["loss"]) / float(loss) - 1)
    worst = max(far, key=lambda p: far[p])
    return far[worst], worst, told


def _first_moments(state: Any) -> dict[str, Array]:
    """AdamW's, by the name of the weight."""
    (found,) = [x.mu for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")]
    return found


@pytest.mark.parametrize("split", ["context", "sequence", "ulysses", "expert", "spatial"])
def test_a_hand_written_step_computes_what_shardlab_does(split: str) -> None:
    far, worst, told = apart(split)
    assert far < CLOSE, f"{worst} differs by {far:.1e}"
    assert split != "expert" or float(told["dropped"]) > 0.02  # else its capacity would not have been seen


FAULTS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "more slots": ("expert", "slots_of", lambda sizes: sizes.length),
    "no rows of neighbours": (
        "spatial",
        "with_halo",
        lambda x, rows: jax.numpy.pad(x, ((0, 0), (rows, rows), (0, 0), (0, 0))),
    ),
    "heads of another device": (
        "ulysses",
        "to_length",
        lambda x: lax.all_to_all(x[:, :, ::-1], "context", split_axis=1, concat_axis=2, tiled=True)[:, ::-1],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_hand_written_step_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split, name, wrong = FAULTS[fault]
    module = import_module(import_module("cases").CASES[split].reference)
    monkeypatch.setattr(module, name, wrong)
    assert apart(split)[0] > 100 * CLOSE
