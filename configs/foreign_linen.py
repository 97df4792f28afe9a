"""A Flax Linen transformer that knows nothing of shardlab, split by data, fsdp and tensor on 8 pretend devices.

Claim:    names given by path are enough: the rules that split the house's own models split somebody else's attention by
          heads and its feed-forward layer by features, and train the numbers of one device.
Command:  shardlab train configs/foreign_linen.py
Cost:     24 s on 2 CPU cores (measured, other work beside it); needs scikit-learn, the extra `digits`
Result:   held-out loss 0.12 nats per example, 97.4 % of 270 images right (measured)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from experiments.config import Checkpoints, Devices, Evaluate, Experiment
from experiments.data.digits import Digits
from experiments.optimizers import AdamW
from sharding.axes import MeshShape
from sharding.partitioner import Auto
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.tensor import tensor

if TYPE_CHECKING:
    from sharding.foreign import Foreign

NAMES = {
    "*.attention.out.kernel": "heads head_dim embed",
    "*.attention.*.kernel": "embed heads head_dim",
    "*.up.kernel": "embed mlp",
    "*.up.bias": "mlp",
    "*.down.kernel": "mlp embed",
    "enter.kernel": "features embed",
    "leave.kernel": "embed classes",
}
"""What the dims of Linen's arrays mean; the others (scales, positions, the other biases) are split by their place."""


@dataclass(frozen=True)
class RowsConfig:
    """Sizes of the Linen transformer."""

    rows: int = 8
    """Rows of an image, and pixels of a row."""
    embed: int = 64
    """Width of the residual stream."""
    heads: int = 4
    """Heads of attention."""
    mlp: int = 128
    """Hidden features of a feed-forward layer."""
    layers: int = 2
    """Blocks."""
    classes: int = 10
    """Classes to tell apart."""

    def build(self) -> Foreign:
        """The model, without arrays."""
        from models.linen_rows import Rows, start, sums
        from sharding.foreign import Foreign
        from sharding.params import Entry

        net = Rows(self.rows, self.embed, self.heads, self.mlp, self.layers, self.classes)
        inputs = {
            "features": Entry("batch features", (self.rows**2,), "float32"),
            "labels": Entry("batch", (), "int32"),
            "weights": Entry("batch", (), "float32"),
        }
        return Foreign(partial(start, net), partial(sums, net), inputs, NAMES)


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="foreign-linen",
        model=RowsConfig(rows=8, embed=64, heads=4, mlp=128, layers=2, classes=10),
        data=Digits(),
        rules=data() | fsdp() | tensor(),
        mesh=MeshShape(data=2, fsdp=2, tensor=2),
        partitioner=Auto(),
        devices=Devices("pretend", 8),
        optimizer=AdamW(peak=3e-3, warmup=20),
        batch=64,
        steps=300,
        log_every=20,
        evaluate=Evaluate(every=100, batches=5),
        checkpoints=Checkpoints(every=100, keep=2),
    )
