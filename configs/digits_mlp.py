"""A residual MLP learns 8x8 handwritten digits on 8 pretend devices: the smallest run, for trying a rule of one's own.

Claim:    the rules that split the transformer split another model unchanged, since both only carry names.
Command:  shardlab train configs/digits_mlp.py
Cost:     11 s on 2 CPU cores (measured); needs scikit-learn, the extra `digits`
Result:   held-out loss 0.065 nats per example, 98.5 % of 270 images right (measured)
"""

from __future__ import annotations

from experiments.config import Checkpoints, Devices, Evaluate, Experiment
from experiments.data.digits import Digits
from experiments.optimizers import AdamW
from models.mlp_config import MLPConfig
from sharding.axes import MeshShape
from sharding.partitioner import Manual
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.tensor import tensor


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="digits-mlp",
        model=MLPConfig(features=64, embed=128, mlp=256, layers=2, classes=10),
        data=Digits(),
        rules=data() | fsdp() | tensor(),
        mesh=MeshShape(data=2, fsdp=2, tensor=2),
        partitioner=Manual(),
        devices=Devices("pretend", 8),
        optimizer=AdamW(peak=3e-3, warmup=10),
        batch=64,
        steps=200,
        log_every=20,
        evaluate=Evaluate(every=100, batches=5),
        checkpoints=Checkpoints(every=100, keep=2),
    )
