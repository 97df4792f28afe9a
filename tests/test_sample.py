"""The text that a trained model writes: which tokens it may draw, what is refused before training, what is kept."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.assemble import train_step
from experiments.config import Sample, load
from experiments.evaluate import bits_per_byte, check_sample, sample
from experiments.progress import Progress
from sharding.errors import InputError
from tests.small import ROOT, only, shardlab

pytestmark = pytest.mark.usefixtures("at_home")
DIGITS, LINEN = ROOT / "configs" / "digits_mlp.py", ROOT / "configs" / "foreign_linen.py"


@pytest.fixture
def wide() -> tuple[Any, dict[str, Any], Any]:
    """A step of a model of 512 tokens over bytes, parameters that score token 403 highest everywhere, the data."""
    e = load("small.py")
    model: Any = e.model
    e = replace(e, model=replace(model, vocab=512))
    step, dataset = train_step(e, jax.devices()), e.data.open(Path("cache"))
    scored = step.forward

    def forward(*given: Any) -> Any:
        return scored(*given).at[..., 403].set(1e9)

    step.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    return step, step.init(0)["params"], dataset


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_only_tokens_of_the_data_are_drawn(wide: tuple[Any, dict[str, Any], Any], temperature: float) -> None:
    step, params, dataset = wide
    text = sample(step, params, dataset, Sample("def ", 6, temperature), 32, 0)
    assert text.startswith("def ")
    assert len(text) > len("def ")


@pytest.mark.parametrize("setting", ["rbg", "not partitionable"])
def test_a_sample_depends_on_no_setting_of_jax(setting: str) -> None:
    e = load("small.py")
    dataset, texts = e.data.open(Path("cache")), []
    for other in (
        contextlib.nullcontext(),
        jax.default_prng_impl("rbg") if setting == "rbg" else jax.threefry_partitionable(False),
    ):
        step = train_step(e, jax.devices())
        params = step.init(0)["params"]
        with other:
            texts.append(sample(step, params, dataset, Sample("def ", 6, 1.0), 32, 0))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            DIGITS,
            "MLP writes none: that takes a method `logits` and `tokens` among its inputs; it has logits and reads",
        ),
        (
            LINEN,
            "Foreign writes none: that takes a method `logits` and `tokens` among its inputs; it has no logits and",
        ),
    ],
    ids=["no tokens", "no logits"],
)
def test_a_sample_of_a_model_that_writes_none_is_refused_before_training(
    config: Path, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shardlab("train", config, "--runs", "unbegun", "--sample.tokens", 5) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "sample.tokens asks for 5 tokens" in said
    assert "Set sample.tokens to 0" in said
    assert said.count("\n") == 1
    assert not Path("unbegun").exists()


def test_a_prompt_that_cannot_be_encoded_is_refused_before_training() -> None:
    e = load("small.py")
    step, dataset = train_step(e, jax.devices()), e.data.open(Path("cache"))
    check_sample(step, dataset, Sample("def ", 4))
    check_sample(step, dataset, Sample("a\0b", 0))
    with pytest.raises(InputError, match="NUL"):
        check_sample(step, dataset, Sample("a\0b", 4))


class GoneError(Exception):
    """The reader left."""


def test_the_sample_is_kept_where_nobody_reads_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Progress.line

    def line(self: Progress, text: str, style: str = "") -> None:
        if text == "sample:":
            raise GoneError
        shown(self, text, style)

    monkeypatch.setattr(Progress, "line", line)
    with pytest.raises(GoneError):
        shardlab("train", "small.py", "--runs", "gone", "--steps", 1)
    assert (only(Path("gone")) / "sample.txt").read_text().startswith("def ")


def test_bits_per_byte_are_of_the_text_that_is_evaluated() -> None:
    assert bits_per_byte(np.log(2) * 6, {"bytes_per_token": 3.0}) == {"bits_per_byte": pytest.approx(2)}
    assert bits_per_byte(1.0, {}) == {}
