"""Modelled scaling of a 7.2 B transformer over pods of 8 to 4096 chips that are not there: TPU v5p slices and H100 hosts.

Claim:    what limits a step changes with the pod: products on small ones, then the collectives of one mesh axis on one network.
Command:  shardlab sweep configs/plan_scaling.py
Cost:     90 s of CPU time on a core of a busy machine (measured); nothing is compiled or run
Result:   modelled: in weak scaling on v5p fsdp keeps 64 to 67 % of the products' peak at every size; on H100 it falls from 48 %
          on one host to 6 % on 512, where it waits for the latency of rings between hosts, and hsdp within hosts keeps 34 %
"""

from __future__ import annotations

from experiments.config import Devices, Experiment
from experiments.data.stdlib import Stdlib
from experiments.optimizers import AdamW
from experiments.plan_sweep import Line, PlanSweep
from models.transformer_config import TransformerConfig
from sharding.axes import MeshShape
from sharding.rules.fsdp import fsdp
from sharding.rules.hsdp import hsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor

SLICES = "2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16".split()
HOSTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

MODEL = TransformerConfig(
    vocab=32768,
    layers=32,
    embed=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp=14336,
    length=2048,
    loop="scan",
    dtype="bfloat16",
    loss_chunk=512,
)


def config() -> PlanSweep:
    """The sweep: 4.2 M tokens a step on every pod (strong), 8192 tokens on every chip (weak)."""
    return PlanSweep(
        name="plan_scaling",
        base=Experiment(
            name="plan_scaling",
            model=MODEL,
            data=Stdlib(length=MODEL.length),
            rules=fsdp(),
            mesh=MeshShape(fsdp=-1),
            devices=Devices("present", -1),
            optimizer=AdamW(peak=3e-4, warmup=2000),
            batch=2048,
            steps=10000,
        ),
        targets=(*(f"tpu:v5p:{s}" for s in SLICES), *(f"gpu:h100:{n}x8" for n in HOSTS)),
        lines=(
            Line("fsdp", fsdp(), MeshShape(fsdp=-1)),
            Line("hsdp, 8 fsdp", hsdp(), MeshShape(data=-1, fsdp=8)),
            Line("fsdp × 8 tensor", fsdp() | tensor() | sequence(), MeshShape(fsdp=-1, tensor=8)),
        ),
        batch=2048,
        rows=4,
    )
