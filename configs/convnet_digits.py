"""A residual convolutional network learns 8x8 digits, each image cut into an upper and a lower half on two devices.

Claim:    a rule splits the rows of images; convolutions send the rows of their halo and nothing else, and learn the same.
Command:  shardlab train configs/convnet_digits.py
Cost:     36 s on 2 CPU cores of which one was busy (measured); needs scikit-learn, the extra `digits`
Result:   held-out loss 0.037 nats per example, 99.3 % of 270 images right (measured)
"""

from __future__ import annotations

from experiments.config import Checkpoints, Devices, Evaluate, Experiment
from experiments.data.digits import Digits
from experiments.optimizers import AdamW
from models.convnet_config import ConvNetConfig
from sharding.axes import MeshShape
from sharding.partitioner import Manual
from sharding.rules.data import data
from sharding.rules.spatial import spatial


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="convnet-digits",
        model=ConvNetConfig(height=8, width=8, channels=1, embed=32, mlp=64, layers=2, stages=2, classes=10),
        data=Digits(form="images"),
        rules=data() | spatial(),
        mesh=MeshShape(data=4, context=2),
        partitioner=Manual(),
        devices=Devices("pretend", 8),
        optimizer=AdamW(peak=3e-3, warmup=10),
        batch=64,
        steps=150,
        log_every=15,
        evaluate=Evaluate(every=75, batches=5),
        checkpoints=Checkpoints(every=75, keep=2),
    )
