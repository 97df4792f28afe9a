"""ZeRO stage 2: gradients and optimizer state split over the data-parallel devices (arXiv:1910.02054, 5.2)."""

from __future__ import annotations

from sharding.rule import Rule, also, first_dim, rule


@rule
def zero2(axis: str = "data") -> Rule:
    """Split the batch, gradients and optimizer state over `axis`: gradients are reduce-scattered, updated parameters
    gathered, 2P(n-1)/n elements per device as in data parallelism.
    """
    return Rule(gradient=first_dim(axis), activation={"batch": also(axis)})
