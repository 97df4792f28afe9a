"""Strong and weak scaling of a 1.0 M byte-level transformer over 1, 2, 4 and 8 pretend devices.

Claim:    split by data, fsdp or tensor, one training step computes the same numbers; on devices that share the same
          cores it costs what the splitting costs, and nothing gets faster.
Command:  shardlab sweep configs/scaling_quick.py
Cost:     75 s on 2 CPU cores that had no other work, 44 of them compiling (measured)
Result:   losses of points with one batch agree to 4.6e-7 of their size at every update. In the committed records, medians
          of 3 rounds in which the steps had the cores to themselves, strong efficiency at 2, 4, 8 devices is 101, 104,
          92 % for data, 103, 103, 94 % for fsdp and 101, 91, 75 % for tensor (measured)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from configs.quickstart import config as quickstart
from experiments.data.stdlib import Stdlib
from experiments.sweep import Point, Sweep
from models.transformer_config import TransformerConfig
from sharding.axes import MeshShape
from sharding.rule import Rules
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.tensor import tensor

DEVICES = (2, 4, 8)

BATCH, ROWS = 16, 2
"""Rows of a strong point, and rows on each device of a weak one: both modes meet at 8 devices."""

# heads and kv_heads divide into 8, the most devices that tensor has.
SMALL = TransformerConfig(
    vocab=256, layers=2, embed=192, heads=8, kv_heads=8, head_dim=24, mlp=512, length=128
)


def strong(rule: Callable[[], Rules]) -> tuple[Point, ...]:
    """One rule over the axis of its own name, the same batch at every device count above 1."""
    name = rule.__name__
    return tuple(Point("strong", name, rule(), MeshShape.of((name, n)), n, BATCH) for n in DEVICES)


def weak(rule: Callable[[], Rules]) -> tuple[Point, ...]:
    """One rule over the axis of its own name, the same rows on each device at every count above 1."""
    name = rule.__name__
    return tuple(Point("weak", name, rule(), MeshShape.of((name, n)), n, ROWS * n) for n in DEVICES)


def config() -> Sweep:
    """The sweep. One device knows no split, so it is measured once for all of a mode."""
    return Sweep(
        name="scaling_quick",
        base=replace(quickstart(), name="scaling_quick", model=SMALL, data=Stdlib(length=SMALL.length)),
        points=(
            Point("strong", "data", data(), MeshShape(), 1, BATCH),
            *strong(data),
            *strong(fsdp),
            *strong(tensor),
            Point("weak", "data", data(), MeshShape(), 1, ROWS),
            *weak(data),
            *weak(fsdp),
        ),
        rounds=3,
        steps=5,
        warmup=1,
    )
