"""A vision transformer learns 8x8 digits: rows of pixels, then rows of patches, split over two devices.

Claim:    one chain splits an image by rows and the sequence of its patches alike, so that no pixel moves between them.
Command:  shardlab train configs/vit_digits.py
Cost:     29 s on 2 CPU cores of which one was busy (measured); needs scikit-learn, the extra `digits`
Result:   held-out loss 0.21 nats per example, 94.1 % of 270 images right (measured)
"""

from __future__ import annotations

from experiments.config import Checkpoints, Devices, Evaluate, Experiment
from experiments.data.digits import Digits
from experiments.optimizers import AdamW
from models.vit_config import ViTConfig
from sharding.axes import MeshShape
from sharding.partitioner import Manual
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.spatial import spatial
from sharding.rules.tensor import tensor


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="vit-digits",
        model=ViTConfig(
            height=8,
            width=8,
            channels=1,
            patch=2,
            layers=2,
            embed=64,
            heads=4,
            kv_heads=4,
            head_dim=16,
            mlp=128,
        ),
        data=Digits(form="images"),
        rules=data() | tensor() | context(order="contiguous") | spatial(),
        mesh=MeshShape(data=2, context=2, tensor=2),
        partitioner=Manual(),
        devices=Devices("pretend", 8),
        optimizer=AdamW(peak=2e-3, warmup=10, weight_decay=0.3),
        batch=64,
        steps=300,
        log_every=30,
        evaluate=Evaluate(every=150, batches=5),
        checkpoints=Checkpoints(every=150, keep=2),
    )
