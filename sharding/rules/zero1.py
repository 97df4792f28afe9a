"""ZeRO stage 1: optimizer state split over the data-parallel devices (Rajbhandari et al. 2020, arXiv:1910.02054, 5.1)."""

from __future__ import annotations

from sharding.rule import Rule, also, first_dim, rule


@rule
def zero1(axis: str = "data") -> Rule:
    """Split the batch and the optimizer's state over `axis`: whole gradients, each device updates its part, parameters
    are gathered after the update.
    """
    return Rule(optimizer=first_dim(axis), activation={"batch": also(axis)})
