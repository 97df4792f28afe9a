"""A byte-level mixture of experts learns Python source on 8 pretend devices: 8 experts, 2 a token, over data 2 x expert 4.

Claim:    experts split over an axis of their own learn as on one device; no device holds more than a quarter of them.
Command:  shardlab train configs/moe_quick.py
Cost:     4 min on 2 CPU cores that others shared, 2.5 GiB of memory (measured)
Result:   2.65 bits per byte of held-out text, where the dense quickstart of the same active size has 2.68; load balance 1.08
          (1 is even), 4 % of choices dropped (measured)
"""

from __future__ import annotations

from experiments.config import Checkpoints, Devices, Evaluate, Experiment, Sample
from experiments.data.stdlib import Stdlib
from experiments.optimizers import AdamW
from models.moe_config import MoEConfig
from sharding.axes import MeshShape
from sharding.partitioner import Manual
from sharding.rules.data import data
from sharding.rules.expert import expert


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="moe-quick",
        model=MoEConfig(
            vocab=256, layers=4, embed=256, heads=8, kv_heads=4, head_dim=32, mlp=384, length=256,
            experts=8, top=2, capacity=1.25,
        ),
        data=Stdlib(length=256),
        rules=data() | expert(),
        mesh=MeshShape(data=2, expert=4),
        partitioner=Manual(),
        devices=Devices("pretend", 8),
        optimizer=AdamW(peak=3e-3, warmup=20),
        batch=16,
        steps=120,
        log_every=5,
        evaluate=Evaluate(every=40, batches=8),
        checkpoints=Checkpoints(every=40, keep=2),
        sample=Sample(prompt="def ", tokens=200, temperature=0.7),
    )  # fmt: skip
