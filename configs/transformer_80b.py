"""A dense transformer of 80 billion parameters in 80 layers, to be planned: no machine here could hold it.

Claim:    a pod of 1,024 TPU v5p chips holds it with each parameter over all chips, products over 8 and tokens over 128.
Command:  shardlab plan configs/transformer_80b.py --target tpu:v5p:8x8x16
Cost:     seconds for what is predicted; minutes and some gigabytes where the TPU compiler is installed (docs/plan.md)
Result:   what the plan says: it fits; never trained
"""

from __future__ import annotations

from experiments.config import Devices, Experiment
from experiments.data.stdlib import Stdlib
from experiments.optimizers import AdamW
from models.transformer_config import TransformerConfig
from sharding.axes import MeshShape
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="transformer-80b",
        model=TransformerConfig(
            vocab=131072,
            layers=80,
            embed=8192,
            heads=64,
            kv_heads=8,
            head_dim=128,
            mlp=33792,
            length=4096,
            remat="full",
            loss_chunk=512,
            dtype="bfloat16",
        ),
        data=Stdlib(length=4096),
        rules=data() | fsdp() | tensor() | sequence(),
        mesh=MeshShape(data=1, fsdp=-1, tensor=8),
        devices=Devices("present", -1),
        optimizer=AdamW(peak=1.5e-4, warmup=2000),
        batch=1024,
        steps=10000,
    )
