"""Every source of experiments/data keeps the contract; new files are found by their place."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import experiments.data
from experiments.data import contract
from experiments.data.digits import DigitsDataset
from sharding.errors import InputError

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", contract.sources())
def test_each_source_keeps_the_contract(name: str, cache: Path, tmp_path: Path) -> None:
    cls: Any = contract.source_class(name)
    source = cls.example(tmp_path) if hasattr(cls, "example") else cls()
    assert issubclass(cls, contract.Source)
    with pytest.raises(dataclasses.FrozenInstanceError):
        source.anything = 1
    assert hash(source) == hash(dataclasses.replace(source))
    dataset = source.open(cache)
    contract.check(dataset)
    again = source.open(cache)
    assert again.facts == dataset.facts
    first, second = (d.rows("train", 1, 2, 4, 0, 4) for d in (dataset, again))
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_text_sources_know_their_text(cache: Path) -> None:
    facts = contract.source_class("stdlib")().open(cache).facts
    assert facts["tokenizer"] == "bytes"
    assert facts["vocab"] == 256
    assert facts["train_tokens"] == facts["train_bytes"] > 5_000_000
    assert 0.02 < facts["heldout_files"] / facts["files"] < 0.15
    assert 0 < facts["heldout_xz_bits_per_byte"] < facts["heldout_entropy_bits_per_byte"]
    assert facts["heldout_entropy_bits_per_byte"] < facts["heldout_unigram_bits_per_byte"] < 8


def test_no_source_imports_jax() -> None:
    code = (
        "import sys; from experiments.data.contract import sources; assert len(sources()) >= 8; "
        "import experiments.commands.tokenize; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0


def test_a_new_file_is_found_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (Path(experiments.data.__path__[0]) / "digits.py").read_text(encoding="utf-8")
    (tmp_path / "my_new_source.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(experiments.data, "__path__", [*experiments.data.__path__, str(tmp_path)])
    assert contract.sources()["my_new_source"].__name__ == "Digits"


def test_a_file_without_a_source_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_source.py").write_text('"""Nothing here."""\n', encoding="utf-8")
    monkeypatch.setattr(experiments.data, "__path__", [*experiments.data.__path__, str(tmp_path)])
    with pytest.raises(InputError, match="must define one dataclass"):
        contract.sources()


def test_the_worked_example_of_the_docs_keeps_the_contract(tmp_path: Path) -> None:
    text = (REPO / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    path = tmp_path / "my_source.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("my_source", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["my_source"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        dataset = module.PackageDescriptions(length=64).open(tmp_path / "cache")
    finally:
        del sys.modules["my_source"]
    contract.check(dataset)
    assert "Name: " in dataset.decode(np.asarray(dataset.files["train"].tokens[:2000]))


@pytest.fixture(scope="module")
def digits(cache: Path) -> DigitsDataset:
    return contract.source_class("digits")().open(cache)


class TestDigits:
    """The image source, and the base class through it: small rows that can be told apart."""

    def test_values(self, digits: DigitsDataset) -> None:
        rows = digits.rows("train", 0, 0, digits.train_rows, 0, digits.train_rows)
        assert rows["features"].min() == 0
        assert rows["features"].max() == 1
        assert set(rows["labels"].tolist()) == set(range(10))

    def test_an_epoch_visits_each_training_row_once(self, digits: DigitsDataset) -> None:
        n = digits.train_rows
        natural = digits.gather("train", np.arange(n))["features"]
        for epoch in (0, 1):
            shuffled = digits.rows("train", 5, epoch, n, 0, n)["features"]
            assert not np.array_equal(shuffled, natural)
            assert np.array_equal(np.sort(shuffled, axis=0), np.sort(natural, axis=0))
        assert not np.array_equal(
            digits.rows("train", 5, 0, n, 0, n)["labels"], digits.rows("train", 5, 1, n, 0, n)["labels"]
        )

    def test_a_batch_may_straddle_epochs(self, digits: DigitsDataset) -> None:
        n = digits.train_rows
        long = digits.rows("train", 5, 0, 2 * n, n - 3, n + 4)["features"]
        before = digits.rows("train", 5, 0, n, n - 3, n)["features"]
        after = digits.rows("train", 5, 1, n, 0, 4)["features"]
        assert np.array_equal(long, np.concatenate([before, after]))

    def test_heldout_rows_come_in_order_and_padding_has_no_weight(self, digits: DigitsDataset) -> None:
        n = digits.heldout_rows
        seen = [digits.rows("heldout", 9, step, 64, 0, 64) for step in range(n // 64 + 2)]
        weights = np.concatenate([rows["weights"] for rows in seen])
        labels = np.concatenate([rows["labels"] for rows in seen])
        assert weights[:n].all()
        assert not weights[n:].any()
        assert np.array_equal(labels[:n], digits.gather("heldout", np.arange(n))["labels"])

    def test_no_heldout_image_is_trained_on(self, digits: DigitsDataset) -> None:
        train = digits.gather("train", np.arange(digits.train_rows))["features"]
        heldout = digits.gather("heldout", np.arange(digits.heldout_rows))["features"]
        assert not {row.tobytes() for row in train} & {row.tobytes() for row in heldout}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("test", 0, 0, 4, 0, 4), "split 'test'"),
            (("train", 0, 0, 4, 2, 5), "rows 2..5 of a batch of 4"),
            (("train", 0, 0, 4, 3, 2), "rows 3..2"),
            (("train", 0, -1, 4, 0, 4), "step -1"),
            (("train", -1, 0, 4, 0, 4), "seed -1"),
        ],
    )
    def test_arguments_out_of_range(self, digits: DigitsDataset, arguments: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            digits.rows(*arguments)

    def test_images_are_no_text(self, digits: DigitsDataset) -> None:
        with pytest.raises(InputError, match="holds no text"):
            digits.encode("x")
        assert digits.bytes_per_token_heldout is None
        assert digits.heldout_facts(5) == {}

    def test_without_scikit_learn_the_error_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(InputError, match=r"pip install 'shardlab\[digits\]'"):
            contract.source_class("digits")().open(tmp_path)


class Broken(contract.Dataset):
    """Digits with one fault planted, to see that `check` catches it."""

    def __init__(self, good: DigitsDataset, fault: str):
        self.good, self.fault = good, fault
        self.inputs, self.facts = dict(good.inputs), dict(good.facts)
        self.train_rows, self.heldout_rows = good.train_rows, good.heldout_rows
        if fault == "no weights":
            del self.inputs["weights"]
        if fault == "no licence":
            del self.facts["licence"]
        if fault == "wrong dtype":
            self.inputs["labels"] = contract.RowSpec((), "int64")

    def gather(self, split: contract.Split, indices: np.ndarray) -> dict[str, np.ndarray]:
        return self.good.gather(split, indices)

    def rows(
        self, split: Any, seed: int, step: int, batch: int, start: int, stop: int
    ) -> dict[str, np.ndarray]:
        if self.fault == "ignores the seed":
            seed = 0
        if self.fault == "ignores the slice" and split == "train":
            start, stop = 0, stop - start
        if self.fault == "pads with weight" and split == "heldout":
            return self.gather(split, np.arange(start, stop))
        return super().rows(split, seed, step, batch, start, stop)


FAULTS = [
    ("no weights", "lacks `weights`"),
    ("no licence", "licence"),
    ("wrong dtype", "labels is int32"),
    ("ignores the seed", "another seed"),
    ("ignores the slice", "do not concatenate"),
    ("pads with weight", "past the end has weight"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_the_check_catches_a_planted_fault(fault: str, message: str, digits: DigitsDataset) -> None:
    contract.check(Broken(digits, "none"))
    with pytest.raises(InputError, match=message):
        contract.check(Broken(digits, fault))
