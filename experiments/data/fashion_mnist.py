"""Debian's dataset-fashion-mnist: 70,000 grey images of clothes, 28x28 pixels, in 10 classes (Xiao et al. 2017)."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import struct
import zlib
from pathlib import Path
from typing import Self

import numpy as np

from experiments.data.contract import Dataset, RowSpec, Split
from sharding.errors import InputError

PACKAGE = "dataset-fashion-mnist"
FOLDER = "usr/share/datasets/fashion-mnist"
KINDS = {"images-idx3-ubyte": (2051, 3), "labels-idx1-ubyte": (2049, 1)}
"""What a file of the MNIST format is called -> its magic number and how many dims it has."""


@dataclasses.dataclass(frozen=True)
class FashionMNIST:
    """pixels (28, 28, 1) float32 in 0..1, labels () int32 in 0..10, weights () float32; the 10,000 test images held out.

    Read when the package is installed. `root` is "/" or where the package was unpacked (`dpkg-deb -x`).
    """

    root: str = "/"

    def open(self, cache: Path) -> FashionMNISTDataset:
        """Read the four files, 55 MB unpacked; `cache` is not used. InputError where they are not there or damaged."""
        folder = Path(self.root) / FOLDER
        names = [f"{side}-{kind}.gz" for side in ("train", "t10k") for kind in KINDS]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"The data source fashion_mnist needs the Debian package {PACKAGE}: there is no {folder / missing[0]}. Install "
                f"it (`apt-get install {PACKAGE}`), or unpack it with `dpkg-deb -x {PACKAGE}_*.deb DIR` and set root to DIR."
            )
        images, labels, heldout, answers = (_read(folder / name) for name in names)
        return FashionMNISTDataset((images, labels), (heldout, answers))

    @classmethod
    def example(cls, folder: Path) -> Self:
        """A small instance over files laid out as the package lays out its own, for the contract test."""
        draw = np.random.default_rng(0)
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        for side, n in (("train", 120), ("t10k", 30)):
            for kind, (magic, dims) in KINDS.items():
                shape = (n, 28, 28)[:dims]
                raw = (
                    struct.pack(f">{dims + 1}i", magic, *shape)
                    + draw.integers(0, 256 if dims == 3 else 10, shape, np.uint8).tobytes()
                )
                (folder / FOLDER / f"{side}-{kind}.gz").write_bytes(gzip.compress(raw))
        return cls(root=str(folder))


class FashionMNISTDataset(Dataset):
    """The package's training images and, held out, its test images, each in its own order."""

    def __init__(self, train: tuple[np.ndarray, np.ndarray], heldout: tuple[np.ndarray, np.ndarray]):
        """Of each side images uint8 [n, 28, 28] and labels uint8 [n]."""
        self._sides: dict[Split, tuple[np.ndarray, np.ndarray]] = {"train": train, "heldout": heldout}
        for images, labels in self._sides.values():
            if len(images) != len(labels) or not len(labels) or labels.max() > 9:
                raise InputError(
                    f"Fashion-MNIST has {len(images)} images with {len(labels)} labels up to "
                    f"{labels.max(initial=0)}, where each image has one of 0 to 9. The files do not belong together: install "
                    f"{PACKAGE} again."
                )
        self.train_rows, self.heldout_rows = len(train[1]), len(heldout[1])
        self.inputs = {
            "pixels": RowSpec((*train[0].shape[1:], 1), "float32"),
            "labels": RowSpec((), "int32"),
            "weights": RowSpec((), "float32"),
        }
        digest = hashlib.sha256()
        for array in (*train, *heldout):
            digest.update(np.ascontiguousarray(array).data)
        self.facts = {
            "name": "fashion_mnist",
            "licence": f"MIT (Zalando SE, Xiao et al. 2017), Debian's {PACKAGE}",
            "sha256": digest.hexdigest(),
            "train_rows": self.train_rows,
            "heldout_rows": self.heldout_rows,
            "classes": 10,
        }

    def gather(self, split: Split, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Images `indices` of a split: pixels [n, 28, 28, 1], labels [n], weights [n] of ones."""
        images, labels = self._sides[split]
        return {
            "pixels": (images[indices].astype(np.float32) / 255)[..., None],
            "labels": labels[indices].astype(np.int32),
            "weights": np.ones(len(indices), np.float32),
        }


def _read(path: Path) -> np.ndarray:
    """The array in a gzipped file of the MNIST format: a magic number, the sizes of its dims, bytes."""
    magic, dims = next(known for kind, known in KINDS.items() if kind in path.name)
    try:
        raw = gzip.decompress(path.read_bytes())
        found, *shape = struct.unpack_from(f">{dims + 1}i", raw)
        pixels = np.frombuffer(raw, np.uint8, offset=4 * (dims + 1))
        if found != magic or (dims == 3 and shape[1:] != [28, 28]):
            raise ValueError(f"its first numbers are {found} and {shape}")
        return pixels.reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise InputError(
            f"{path} is damaged: {error}. Install {PACKAGE} again (`apt-get install --reinstall {PACKAGE}`)."
        ) from error
