"""Context parallelism: one sequence over several devices, keys and values in a ring (Liu et al. 2023, arXiv:2310.01889)."""

from __future__ import annotations

from typing import Literal

from sharding.errors import InputError
from sharding.order import ZigZag
from sharding.rule import Rule, also, rule


@rule
def context(axis: str = "context", order: Literal["zigzag", "contiguous"] = "zigzag") -> Rule:
    """Split the length over `axis`, inside attention too, where keys and values go round the axis: all activations and the
    work of attention take 1/n of a device. order: "zigzag" gives each device equal work under a causal mask; "contiguous"
    suits full attention, and a window, whose ring then ends where the window does. To be chained before `sequence`.
    """
    if order not in ("zigzag", "contiguous"):
        raise InputError(f"context(order={order!r}): it is 'zigzag' or 'contiguous'. Change it.")
    return Rule(
        activation={n: also(axis) for n in ("length", "queries", "keys", "slots")},
        order={"length": ZigZag(axis)} if order == "zigzag" else {},
    )
