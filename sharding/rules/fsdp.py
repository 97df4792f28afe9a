"""Fully sharded data parallelism, ZeRO stage 3 (arXiv:1910.02054, 5.3; Zhao et al. 2023, arXiv:2304.11277)."""

from __future__ import annotations

from sharding.rule import Rule, also, first_dim, rule


@rule
def fsdp(axis: str = "fsdp") -> Rule:
    """Split batch, parameters, gradients and optimizer state over `axis`. A parameter is gathered for its use and its
    gradient reduce-scattered: 3P(n-1)/n elements per device when it is gathered again for the backward pass.
    """
    return Rule(param=first_dim(axis), activation={"batch": also(axis)})
