"""No false alarm: drawn chains of rules, meshes, sizes and head counts, all of them right."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import digits_mlp, quickstart
from experiments.config import Experiment
from experiments.data.contract import Dataset
from experiments.data.digits import Digits
from experiments.data.stdlib import Stdlib
from experiments.optimizers import AdamW
from experiments.verification import cases, verify
from models.mlp_config import MLPConfig
from models.transformer_config import TransformerConfig
from sharding.errors import InputError
from sharding.rule import Rules
from tests.support import examples, rule_files, split_axes

EXAMPLES = {repr(r): r for path in rule_files() for r in examples(path) if split_axes(r)}
"""Every shipped rule that splits something, found by its place, on the arguments that it is tested with."""
COUNTED: dict[str, int] = {}
"""Cases verified so far, by verdict."""


@st.composite
def experiments(draw: Any) -> Experiment:
    """A chain of up to three rules on a transformer or a perceptron of drawn sizes."""
    names = draw(st.lists(st.sampled_from(sorted(EXAMPLES)), min_size=1, max_size=3, unique=True))
    chain = Rules()
    for name in names:
        chain = chain | EXAMPLES[name]
    dims = st.sampled_from([8, 16, 24])
    base = replace(
        quickstart.config() if draw(st.booleans()) else digits_mlp.config(),
        rules=chain,
        batch=draw(st.sampled_from([16, 24])),
        accumulate=draw(st.sampled_from([1, 1, 2])),
        optimizer=AdamW(
            warmup=draw(st.sampled_from([1, 20])), clip=draw(st.sampled_from([math.inf, 1.0, 0.1]))
        ),
        seed=draw(st.integers(0, 5)),
    )
    layers = draw(st.integers(1, 3))
    if isinstance(base.data, Digits):
        return replace(
            base, model=MLPConfig(features=64, embed=draw(dims), mlp=draw(dims), layers=layers, classes=10)
        )
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    model = TransformerConfig(
        vocab=256, layers=layers, embed=draw(dims), heads=kv_heads * draw(st.sampled_from([1, 2])), kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4])), mlp=draw(dims), length=16, remat=draw(st.sampled_from(["none", "full"])),
        unembed=draw(st.sampled_from(["tied", "untied"])), loop=draw(st.sampled_from(["auto", "scan"])),
    )  # fmt: skip
    return replace(base, model=model, data=Stdlib(length=16))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Dataset]:
    """A dataset, opened once."""
    cache: Path = tmp_path_factory.mktemp("data")
    return functools.cache(lambda source: source.open(cache))


def _check(e: Experiment, opened: Callable[[Any], Dataset], pick: list[int]) -> None:
    try:
        every = cases(e, 8)
    except InputError:
        return  # two of the rules claim one dim: refused before anything runs
    chosen = [every[i % len(every)] for i in pick]
    try:
        made = verify(e, opened(e.data), jax.devices(), list(dict.fromkeys(chosen)), 3)
    except InputError:
        return
    for o in made.outcomes:
        kind = "refused" if o.refused else "departs" if o.departs else "agrees"
        COUNTED[kind] = COUNTED.get(kind, 0) + 1
    assert not made.departed, [(o.case.title, o) for o in made.departed]


@settings(max_examples=3)
@given(e=experiments(), pick=st.lists(st.integers(0, 10_000), min_size=6, max_size=6))
def test_right_splits_agree(e: Experiment, pick: list[int], opened: Callable[[Any], Dataset]) -> None:
    _check(e, opened, pick)


@pytest.mark.slow
def test_hundreds_of_right_splits_agree(opened: Callable[[Any], Dataset]) -> None:
    COUNTED.clear()

    @settings(max_examples=150)
    @given(e=experiments(), pick=st.lists(st.integers(0, 10_000), min_size=12, max_size=12))
    def many(e: Experiment, pick: list[int]) -> None:
        _check(e, opened, pick)

    many()
    print(COUNTED)
    assert COUNTED["agrees"] >= 300, f"too few cases were legal: {COUNTED}"
