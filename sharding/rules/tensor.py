"""Megatron tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053), the vocabulary included (their section 3)."""

from __future__ import annotations

from sharding.rule import Rule, rule


@rule
def tensor(axis: str = "tensor") -> Rule:
    """Split feed-forward features, heads and vocabulary over `axis`: two all-reduces a layer forward, two backward."""
    split = {"mlp": axis, "heads": axis, "kv_heads": axis, "vocab": axis}
    return Rule(compute=split, activation=split)
