"""Spatial parallelism: an image's rows split over an axis (Dean et al. 2012, section 3; Dryden et al. 2019)."""

from __future__ import annotations

from sharding.rule import Rule, rule


@rule
def spatial(axis: str = "context") -> Rule:
    """Split `height` over `axis` in activations and in kernels that each position has of its own: a convolution sends the
    rows of its halo, B*W*C*(k-1) elements forward and as many backward, however high the image.
    """
    return Rule(compute={"height": axis}, activation={"height": axis})
