"""Who partitions the step: shardlab's named ops in one manual region, or XLA. Values for a config; no jax here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sharding.errors import InputError

PRODUCTS = ("none", "int8", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Manual:
    """Every collective is derived by the named ops inside one `jax.shard_map` over all axes (`check_vma` on).

    What is traced is what runs: the jaxpr lists every collective with its axis, bytes and source line.
    """

    gathered: Literal["auto", "regather", "keep"] = "auto"
    """What becomes of a parameter gathered for its use in the forward pass: "regather" drops it and gathers again in
    the backward pass (ZeRO-3's 3P of traffic, least memory), "keep" holds it until then (2P, memory of the whole
    gathered parameters). Layers unrolled on CPU always keep: XLA:CPU merges the two gathers. In a pipeline "keep" gathers
    once a step, before the first micro-batch, and reduces gradients once, after the last; "regather" does both for each
    micro-batch. "auto" is "keep" in a pipeline and "regather" elsewhere."""
    overlap: Literal["none", "ring"] = "none"
    """How an activation's gather before a product, and a reduce-scatter after one, are done: "none" as one collective,
    "ring" as a ring of partial products (`sharding.overlap`), which a compiler can hide behind each other."""

    products: Literal["none", "int8", "float8_e4m3fn", "float8_e5m2"] = "none"
    """Experiment: the type in which activations are multiplied with matrices in the forward pass, each row and column scaled
    by its largest entry (`sharding.scaled`); "none" is their own. The backward pass, attention's own products, convolutions
    and experts without capacity are in the activations' type."""

    def __post_init__(self) -> None:
        if self.products not in PRODUCTS:
            raise InputError(
                f"Manual(products={self.products!r}): it is one of {', '.join(PRODUCTS)}. Change it."
            )
        if self.products != "none" and self.overlap != "none":
            raise InputError(
                f"Manual(overlap={self.overlap!r}, products={self.products!r}): a ring multiplies blocks before the largest "
                f"entry of their rows is known. Take one of the two."
            )
        if self.overlap not in ("none", "ring"):
            raise InputError(f"Manual(overlap={self.overlap!r}): it is 'none' or 'ring'. Change it.")
        if self.gathered not in ("auto", "regather", "keep"):
            raise InputError(
                f"Manual(gathered={self.gathered!r}): it is 'auto', 'regather' or 'keep'. Change it."
            )


@dataclass(frozen=True)
class Auto:
    """XLA's partitioner: the same layouts as sharding constraints on global arrays under plain `jax.jit`."""


Partitioner = Manual | Auto


def called(by: Partitioner) -> Literal["manual", "auto"]:
    """The word for a partitioner in commands and figures."""
    return "manual" if isinstance(by, Manual) else "auto"
