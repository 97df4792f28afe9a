"""Handwritten digits, 8x8 pixels: scikit-learn's copy of the UCI set, 1,797 images, as feature vectors or as images."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.data.contract import Dataset, RowSpec, Split
from experiments.data.store.shuffle import permute
from sharding.errors import InputError

HELDOUT = 270  # of 1,797: 15 %
_SPLIT_SEED = 20201  # fixed for ever: changing it would mix training and held-out images


@dataclasses.dataclass(frozen=True)
class Digits:
    """Digits in 0..1 as float32, labels () int32 in 0..10, weights () float32. Needs scikit-learn."""

    form: Literal["features", "images"] = "features"
    """As `features` (64,) for a perceptron, or as `pixels` (8, 8, 1)."""

    def open(self, cache: Path) -> DigitsDataset:
        """Load the images that scikit-learn ships; `cache` is not used. InputError without scikit-learn."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError(
                "The data source digits needs scikit-learn, which is not installed. Install the extra: "
                "pip install 'shardlab[digits]', or pip install scikit-learn."
            ) from error
        images, labels = load_digits(return_X_y=True)
        return DigitsDataset(np.asarray(images), np.asarray(labels), self.form)


class DigitsDataset(Dataset):
    """The images in a fixed order, the last HELDOUT of a fixed permutation held out."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        form: Literal["features", "images"] = "features",
    ):
        """images [n, 64] with pixels 0..16, labels [n]; InputError for a form that does not exist."""
        if form not in ("features", "images"):
            raise InputError(f"Digits(form={form!r}): it is 'features' or 'images'. Change it.")
        self._entry, row = {"features": ("features", (64,)), "images": ("pixels", (8, 8, 1))}[form]
        order = permute(np.arange(len(images)), len(images), _SPLIT_SEED, 0)
        self._rows = (images / 16).astype(np.float32)[order].reshape(-1, *row)
        self._labels = labels.astype(np.int32)[order]
        self.train_rows, self.heldout_rows = len(images) - HELDOUT, HELDOUT
        self.inputs = {
            self._entry: RowSpec(row, "float32"),
            "labels": RowSpec((), "int32"),
            "weights": RowSpec((), "float32"),
        }
        raw = np.ascontiguousarray(images, "<f8").tobytes() + np.ascontiguousarray(labels, "<i8").tobytes()
        self.facts = {
            "name": "digits",
            "licence": "CC-BY-4.0 (UCI, Alpaydin and Kaynak 1998), shipped with scikit-learn",
            "sha256": hashlib.sha256(raw).hexdigest(),
            "train_rows": self.train_rows,
            "heldout_rows": self.heldout_rows,
            "classes": 10,
        }

    def gather(self, split: Split, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Images `indices` of a split: features [n, 64] or pixels [n, 8, 8, 1], labels [n], weights [n] of ones."""
        at = np.asarray(indices) + (self.train_rows if split == "heldout" else 0)
        return {
            self._entry: self._rows[at],
            "labels": self._labels[at],
            "weights": np.ones(len(at), np.float32),
        }
