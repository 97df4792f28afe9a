"""Who partitions the step: shardlab's named ops in one manual region, or XLA. Values for a config; no jax here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sharding.errors import InputError


@dataclass(frozen=True)
class Manual:
    """Every collective is derived by the named ops inside one `jax.shard_map` over all axes (`check_vma` on).

    What is traced is what runs: the jaxpr lists every collective with its axis, bytes and source line.
    """

    gathered: Literal["regather", "keep"] = "regather"
    """What becomes of a parameter gathered for its use in the forward pass: "regather" drops it and gathers again in
    the backward pass (ZeRO-3's 3P of traffic, least memory), "keep" holds it until then (2P, memory of the whole
    gathered parameters). Layers unrolled on CPU always keep: XLA:CPU merges the two gathers."""
    overlap: Literal["none", "ring"] = "none"
    """How an activation's gather before a product, and a reduce-scatter after one, are done: "none" as one collective,
    "ring" as a ring of partial products (`sharding.overlap`), which a compiler can hide behind each other."""

    def __post_init__(self) -> None:
        if self.overlap not in ("none", "ring"):
            raise InputError(f"Manual(overlap={self.overlap!r}): it is 'none' or 'ring'. Change it.")
        if self.gathered not in ("regather", "keep"):
            raise InputError(f"Manual(gathered={self.gathered!r}): it is 'regather' or 'keep'. Change it.")


@dataclass(frozen=True)
class Auto:
    """XLA's partitioner: the same layouts as sharding constraints on global arrays under plain `jax.jit`."""


Partitioner = Manual | Auto
