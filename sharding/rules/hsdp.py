"""Hybrid sharded data parallelism: fsdp inside (fast network), data outside (slow network) (arXiv:2304.11277, 3.2.2)."""

from __future__ import annotations

from sharding.rule import Rules
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp


def hsdp(outer: str = "data", inner: str = "fsdp") -> Rules:
    """Parameters split over `inner` and replicated over `outer`: gradients are reduce-scattered over `inner`, then only
    the shard is all-reduced over `outer`.
    """
    return data(outer) | fsdp(inner)
