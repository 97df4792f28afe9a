"""Megatron sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198): to be chained after `tensor`."""

from __future__ import annotations

from sharding.rule import Rule, also_if_free, rule


@rule
def sequence(axis: str = "tensor") -> Rule:
    """Split the length over `axis` wherever the array leaves it free (norms, residuals): the tensor split's all-reduces
    become a reduce-scatter and an all-gather of the same bytes, and the residual stream takes 1/n of the memory.
    """
    return Rule(activation={"length": also_if_free(axis), "slots": also_if_free(axis)})
