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

    def __post_init__(self) -> None:
        if self.gathered not in ("regather", "keep"):
            raise InputError(f"Manual(gathered={self.gathered!r}): it is 'regather' or 'keep'. Change it.")


@dataclass(frozen=True)
class Auto:
    """XLA's partitioner: the same layouts as sharding constraints on global arrays under plain `jax.jit`."""


Partitioner = Manual | Auto
