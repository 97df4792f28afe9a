"""A byte-level transformer of 85 M parameters (GPT-2 small's shape as a Llama block) on the accelerators at hand.

Claim:    the size of a first real GPU run: bf16 products with fp32 masters, batch split over all devices, parameters
          and optimizer state at rest split over them too (ZeRO-3).
Command:  shardlab train configs/transformer_85m.py
Cost:     1.4 GB for parameters, gradients and AdamW state in fp32, over all devices, and activations per row;
          time not measured: no accelerator has run it yet; `python benchmarks/compare.py --present` measures it
Result:   not measured: no accelerator has run it yet; `python benchmarks/compare.py --present` measures it
"""

from __future__ import annotations

from experiments.config import Checkpoints, Devices, Evaluate, Experiment, Sample
from experiments.data.stdlib import Stdlib
from experiments.optimizers import AdamW
from models.transformer_config import TransformerConfig
from sharding.axes import MeshShape
from sharding.partitioner import Manual
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="transformer-85m",
        model=TransformerConfig(
            vocab=256,
            layers=12,
            embed=768,
            heads=12,
            kv_heads=12,
            head_dim=64,
            mlp=2048,
            length=1024,
            dtype="bfloat16",
        ),
        data=Stdlib(length=1024, tests="include"),
        rules=data() | fsdp(),
        mesh=MeshShape(data=1, fsdp=-1),
        partitioner=Manual(),
        devices=Devices("present", -1),
        optimizer=AdamW(peak=6e-4, warmup=100),
        batch=32,
        steps=2000,
        log_every=10,
        evaluate=Evaluate(every=200, batches=16),
        checkpoints=Checkpoints(every=500, keep=2),
        sample=Sample(prompt="def ", tokens=400, temperature=0.8),
    )
