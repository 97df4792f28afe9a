"""A run on rows that are not text: examples and the part of them that is right, never tokens or bits per byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.assemble import train_step
from experiments.config import load
from experiments.data.digits import Digits
from experiments.evaluate import held_out
from experiments.records import read
from sharding.params import bind
from sharding.partitioner import Auto
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from tests.small import only, shardlab
from tests.support import custom

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "digits_mlp.py"
SPLITS = {
    "of the config": {},
    "classes split": {"rules": data() | fsdp() | custom(activation={"classes": "tensor"})},
    "auto": {"partitioner": Auto()},
}


def test_a_classifier_counts_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shardlab("train", CONFIG, "--steps", 20, "--log-every", 10, "--checkpoints.every", 0) == 0
    said = capsys.readouterr().out
    assert "examples/s" in said
    assert "270 examples" in said
    run = only(tmp_path / "runs")
    records = read(run / "records.jsonl")
    last = {r.kind: r.values for r in records}
    assert last["step"]["examples"] == 20 * 64
    assert last["step"]["examples_per_second"] > 0
    assert last["eval"]["examples"] == 270
    assert 0.5 < last["eval"]["correct"] <= 1
    report = (run / "report.html").read_text()
    assert "held-out nats per example" in report
    names = {name for r in records for name in r.values}
    assert not [name for name in names if "tokens" in name or "bits" in name]
    assert not [word for word in ("tok/s", " tokens", "bits/byte") if word in said]
    assert "bits per byte" not in report


@pytest.mark.parametrize("change", SPLITS.values(), ids=list(SPLITS))
def test_correct_is_the_part_of_rows_whose_label_scores_highest(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    e = replace(load(CONFIG), **change)
    dataset, step = Digits().open(tmp_path), train_step(e, jax.devices())
    params = step.init(0)["params"]
    got = held_out(step, params, dataset, e.batch, 5)["correct"]
    model: Any = step.model
    alone = {path: jnp.asarray(np.asarray(w)) for path, w in params.items()}
    rows = dataset.rows("heldout", 0, 0, 270, 0, 270)
    scores = bind(model, alone).logits(jnp.asarray(rows["features"]))
    assert got == pytest.approx(np.mean(np.argmax(scores, -1) == rows["labels"]))
    assert 0 < got < 0.5
