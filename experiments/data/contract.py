"""What a dataset is: a batch as a pure function of (seed, step).

A new source is ONE file: a frozen dataclass of values (no jax import) with `open(cache: Path) -> Dataset`. In this
folder it is found by its place; anywhere else a config imports it. A source that cannot be opened with its
default values also has a classmethod `example(folder: Path)`, which returns a small instance whose inputs it
wrote under `folder`: that is what the contract test opens. docs/data.md is a worked example.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

import experiments.data
from experiments.data.store.shuffle import epoch_order
from sharding.errors import InputError

Split = Literal["train", "heldout"]
MACHINERY = ("contract", "prefetch")  # the only modules of this folder that are not sources


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """Shape and dtype of one row of one batch entry, without the batch dim: `RowSpec((256,), "int32")`."""

    shape: tuple[int, ...]
    dtype: str


class Dataset(abc.ABC):
    """Rows by number. A subclass sets the attributes and writes `gather`; the order of rows is decided here.

    `inputs` names the entries of a batch; one of them is `weights` (float32, any row shape), by which the loss
    weighs what it sums. `train_rows` is the length of an epoch. `facts` says what the data are.
    `bytes_per_token_heldout` is for text alone, an average over all that is held out: with it a run counts tokens and
    says bits per byte, without it (None) a run counts examples and says neither.
    """

    inputs: Mapping[str, RowSpec]
    facts: Mapping[str, Any]
    train_rows: int
    heldout_rows: int
    bytes_per_token_heldout: float | None = None

    @abc.abstractmethod
    def gather(self, split: Split, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `indices` (int64, each in 0..rows of the split) in the split's natural order.

        Returns fresh arrays (len(indices), *shape) of the dtypes in `inputs`, and reads only those rows.
        """

    def rows(
        self, split: Split, seed: int, step: int, batch: int, start: int, stop: int
    ) -> dict[str, np.ndarray]:
        """Rows start..stop of the global batch of `step`; a pure function of its arguments, O(stop - start).

        Row i of the batch is global row r = step * batch + i. In "train", epoch r // train_rows has its own
        seeded permutation, so any process may read any slice and every mesh sees the same order. "heldout" runs
        in order whatever the seed; rows past its end carry weight 0, so that any batch size works.
        Each array is (stop - start, *shape). Raises InputError for arguments out of range.
        """
        _check_slice(split, seed, step, batch, start, stop)
        numbers = step * batch + np.arange(start, stop, dtype=np.int64)
        if split == "train":
            return self.gather(split, epoch_order(seed, numbers, self.train_rows))
        inside = numbers < self.heldout_rows
        out = self.gather(split, np.where(inside, numbers, 0))
        out["weights"][~inside] = 0
        return out

    def heldout_facts(self, rows: int) -> Mapping[str, Any]:
        """What is known, without a model, of the text that the labels of the first `rows` held-out rows stand for.

        `bytes_per_token` of a text; a dataset that can read those bytes says their own, and what a model has to beat on
        them: `unigram_bits_per_byte`, `xz_bits_per_byte`. Bytes are those of the text before it became tokens: a dataset
        that does not know them says `no_bits_per_byte` instead, the reason. Empty where rows are no text. Of several
        processes the first alone asks.
        """
        size = self.bytes_per_token_heldout
        return {} if size is None else {"bytes_per_token": size}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; InputError for a dataset that holds no text."""
        raise InputError(
            f"{self.facts.get('name', 'this dataset')} holds no text, so there is nothing to encode."
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a sequence of token ids; InputError for a dataset that holds no text."""
        raise InputError(
            f"{self.facts.get('name', 'this dataset')} holds no text, so there is nothing to decode."
        )


@runtime_checkable
class Source(Protocol):
    """A dataset as a config names it: a frozen, jax-free dataclass."""

    def open(self, cache: Path) -> Dataset:
        """Open the data, building under `cache` what has to be built once. InputError when they are not there."""
        ...


def sources() -> dict[str, type]:
    """Every source of this folder by module name. A module here that defines no source is an InputError."""
    files = (path for folder in experiments.data.__path__ for path in Path(folder).glob("*.py"))
    names = sorted(path.stem for path in files if not path.stem.startswith("_"))
    return {name: source_class(name) for name in names if name not in MACHINERY}


def source_class(name: str) -> type:
    """The source that `experiments/data/NAME.py` defines: its one dataclass with `open`."""
    module = importlib.import_module(f"experiments.data.{name}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and dataclasses.is_dataclass(value)
        and callable(getattr(value, "open", None))
    ]
    if len(classes) != 1:
        raise InputError(
            f"experiments/data/{name}.py must define one dataclass with `open(cache)`, found {len(classes)}: "
            f"{[c.__name__ for c in classes]}. Shared code belongs in experiments/data/store/."
        )
    return classes[0]


def check(dataset: Dataset, seed: int = 0) -> None:
    """Raise InputError at the first promise of the contract that `dataset` breaks. For sources anywhere.

    Reads a few small batches: shapes and dtypes, purity, slices that concatenate to the whole, an order that
    depends on the seed, held-out rows past the end with weight 0.
    """
    _check_entries(dataset)
    rows, batch = dataset.train_rows, 6
    whole = dataset.rows("train", seed, 3, batch, 0, batch)
    _require(
        set(whole) == set(dataset.inputs),
        f"rows() returned {sorted(whole)}, inputs has {sorted(dataset.inputs)}",
    )
    for name, spec in dataset.inputs.items():
        got = whole[name]
        _require(
            got.shape == (batch, *spec.shape) and got.dtype == np.dtype(spec.dtype),
            f"{name} is {got.dtype}{list(got.shape)}, inputs promise {spec.dtype}{[batch, *spec.shape]}",
        )
    parts = [dataset.rows("train", seed, 3, batch, a, b) for a, b in ((0, 1), (1, 1), (1, 4), (4, batch))]
    for name in whole:
        joined = np.concatenate([part[name] for part in parts])
        _require(
            np.array_equal(joined, whole[name]), f"slices of {name} do not concatenate to the whole batch"
        )
    again = dataset.rows("train", seed, 3, batch, 0, batch)
    _require(all(np.array_equal(again[n], whole[n]) for n in whole), "the same arguments gave other rows")
    if rows >= 50:
        other = dataset.rows("train", seed + 1, 3, batch, 0, batch)
        _require(
            any(not np.array_equal(other[n], whole[n]) for n in whole), "another seed gave the same rows"
        )
    last = dataset.rows("heldout", seed, dataset.heldout_rows, 1, 0, 1)
    _require(not last["weights"].any(), "a held-out row past the end has weight")
    first = dataset.rows("heldout", seed, 0, 1, 0, 1)
    _require(first["weights"].any(), "the first held-out row has no weight")


def _check_entries(dataset: Dataset) -> None:
    """The attributes: counts, facts, and the `weights` entry."""
    _require("weights" in dataset.inputs, f"inputs lacks `weights`; it has {sorted(dataset.inputs)}")
    _require(dataset.inputs["weights"].dtype == "float32", "weights must be float32")
    _require(
        dataset.train_rows > 0 and dataset.heldout_rows > 0, "train_rows and heldout_rows must be positive"
    )
    size = dataset.bytes_per_token_heldout
    _require(
        size is None or size > 0, "bytes_per_token_heldout must be positive, or None where there is no text"
    )
    missing = [key for key in ("name", "licence", "sha256") if not dataset.facts.get(key)]
    _require(not missing, f"facts lack {missing}")


def _require(holds: bool | np.bool_, message: str) -> None:
    if not holds:
        raise InputError(f"The dataset breaks its contract: {message}. See experiments/data/contract.py.")


def _check_slice(split: str, seed: int, step: int, batch: int, start: int, stop: int) -> None:
    if split not in ("train", "heldout"):
        raise InputError(f"Asked for the split {split!r}; a dataset has 'train' and 'heldout'.")
    if not (0 <= start <= stop <= batch and batch > 0):
        raise InputError(
            f"Asked for rows {start}..{stop} of a batch of {batch}: need 0 <= start <= stop <= batch."
        )
    if step < 0 or seed < 0:
        raise InputError(f"Asked for step {step} with seed {seed}: both must be 0 or more.")
