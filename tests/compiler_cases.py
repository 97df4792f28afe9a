"""The cases on which predicted is held to compiled, as experiments: every rule and many compositions, on any number of devices.

The models are small but have the shape of real ones, since a compiler treats arrays of a few bytes in its own way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.config import Devices, Experiment
from experiments.data.stdlib import Stdlib
from experiments.optimizers import AdamW
from models.convnet_config import ConvNetConfig
from models.local_config import LocalConfig
from models.mlp_config import MLPConfig
from models.moe_config import MoEConfig
from models.transformer_config import TransformerConfig
from models.vit_config import ViTConfig
from sharding.axes import AXES, MeshShape
from sharding.partitioner import Manual, Partitioner
from sharding.pipeline.grid import Schedule
from sharding.rule import Rules
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.expert import expert
from sharding.rules.fsdp import fsdp
from sharding.rules.hsdp import hsdp
from sharding.rules.replicated import replicated
from sharding.rules.sequence import sequence
from sharding.rules.spatial import spatial
from sharding.rules.tensor import tensor
from sharding.rules.tensor2d import tensor2d
from sharding.rules.ulysses import ulysses
from sharding.rules.zero1 import zero1
from sharding.rules.zero2 import zero2
from sharding.schedules.interleaved import Interleaved
from sharding.schedules.one_f_one_b import OneFOneB
from sharding.schedules.zero_bubble import ZeroBubble

SIZES: dict[str, Any] = {
    "vocab": 2048, "layers": 2, "embed": 256, "heads": 16, "kv_heads": 16, "head_dim": 32, "mlp": 1024, "length": 256,
}  # fmt: skip
WORDS = TransformerConfig(**SIZES)
SCANNED = dataclasses.replace(WORDS, loop="scan", layers=3, remat="full")
KEPT = dataclasses.replace(SCANNED, remat="none")
EXPERTS = MoEConfig(**SIZES, experts=16)
IMAGES: dict[str, Any] = {"height": 64, "width": 64, "channels": 4, "classes": 64}
ROWS = 64

CASES: dict[str, tuple[Any, Rules, dict[str, int]]] = {
    "replicated": (WORDS, replicated(), {"data": 8}),
    "data": (WORDS, data(), {"data": 8}),
    "zero1": (WORDS, zero1() | tensor(), {"data": 4, "tensor": 2}),
    "zero2": (WORDS, zero2(), {"data": 8}),
    "fsdp": (WORDS, fsdp(), {"fsdp": 8}),
    "hsdp": (WORDS, hsdp("replica"), {"replica": 2, "fsdp": 4}),
    "scanned hsdp": (SCANNED, hsdp("replica"), {"replica": 2, "fsdp": 4}),
    "scanned fsdp tensor sequence": (
        SCANNED,
        data() | fsdp() | tensor() | sequence(),
        {"data": 2, "fsdp": 2, "tensor": 2},
    ),
    "tensor": (WORDS, data() | tensor(), {"data": 4, "tensor": 2}),
    "tensor2d": (WORDS, data() | tensor2d(), {"data": 2, "fsdp": 2, "tensor": 2}),
    "ring": (KEPT, data() | context(), {"data": 2, "context": 4}),
    "ring computed again": (SCANNED, data() | context(), {"data": 2, "context": 4}),
    "all-to-all": (WORDS, data() | ulysses(), {"data": 2, "context": 4}),
    "expert": (EXPERTS, data() | expert(), {"data": 2, "expert": 4}),
    "perceptron": (
        MLPConfig(features=256, embed=512, mlp=1024, layers=3, classes=64),
        data() | fsdp() | tensor(),
        {"data": 2, "fsdp": 2, "tensor": 2},
    ),
    "spatial": (
        ConvNetConfig(**IMAGES, embed=64, mlp=128, kernel=3, layers=2, stages=2),
        data() | spatial(),
        {"data": 2, "context": 4},
    ),
    "pipeline": (
        dataclasses.replace(SCANNED, layers=4),
        fsdp() | tensor(),
        {"stage": 2, "fsdp": 2, "tensor": 2},
    ),
    "zero bubble": (dataclasses.replace(KEPT, layers=8), data(), {"stage": 4, "data": 2}),
    "interleaved": (dataclasses.replace(WORDS, layers=8), data(), {"stage": 2, "data": 4}),
    "local": (
        LocalConfig(**IMAGES, embed=64, mlp=128, kernel=3, layers=2),
        data() | spatial(),
        {"data": 2, "context": 4},
    ),
    "vision": (
        ViTConfig(**IMAGES, patch=4, layers=2, embed=256, heads=16, kv_heads=16, head_dim=32, mlp=1024),
        data() | fsdp() | tensor(),
        {"data": 2, "fsdp": 2, "tensor": 2},
    ),
}
"""Name -> model, rules, and the mesh on eight devices."""
SCHEDULES: dict[str, Schedule] = {
    "pipeline": OneFOneB(4),
    "zero bubble": ZeroBubble(4),
    "interleaved": Interleaved(4, 2),
}
"""Those of them that are pipelines."""


def case(
    name: str,
    devices: int = 8,
    dtype: str = "float32",
    partitioner: Partitioner = Manual(),  # noqa: B008 (a frozen value)
    accumulate: int = 1,
) -> Experiment:
    """The experiment of a case on so many devices; models without a dtype stay in their own."""
    model, rules, sizes = CASES[name]
    if hasattr(model, "dtype"):
        model = dataclasses.replace(model, dtype=dtype)
    return Experiment(
        name=name.replace(" ", "-"),
        model=model,
        data=Stdlib(length=256),
        rules=rules,
        mesh=scaled(sizes, devices),
        partitioner=partitioner,
        devices=Devices("pretend", devices),
        optimizer=AdamW(),
        batch=ROWS,
        steps=10,
        accumulate=accumulate,
        pipeline=SCHEDULES.get(name),
    )


def scaled(sizes: dict[str, int], devices: int) -> MeshShape:
    """The mesh for another number of devices: axes are doubled in turn, the smallest first, or halved, the largest first."""
    now = dict(sizes)
    while (count := MeshShape(**now).devices) != devices:
        order = sorted(now, key=lambda a: (now[a], AXES.index(a)))
        axis = order[0] if count < devices else order[-1]
        now[axis] = now[axis] * 2 if count < devices else now[axis] // 2
    return MeshShape(**now)
