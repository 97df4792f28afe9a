"""Data parallelism: examples split over an axis, parameters whole (Dean et al. 2012; Goyal et al. 2017)."""

from __future__ import annotations

from sharding.rule import Rule, also, rule


@rule
def data(axis: str = "data") -> Rule:
    """Split the batch over `axis`. Gradients are all-reduced over it once a step: 2P(n-1)/n elements per device."""
    return Rule(activation={"batch": also(axis)})
