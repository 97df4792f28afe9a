"""Megatron tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053), the vocabulary included (their section 3)."""

from __future__ import annotations

from typing import Literal

from sharding.errors import InputError
from sharding.rule import Rule, Split, rule


@rule
def tensor(axis: str = "tensor", kv_heads: Literal["split", "whole"] = "split") -> Rule:
    """Split feed-forward features, heads and vocabulary over `axis`: two all-reduces a layer forward, two backward.

    kv_heads "whole", for fewer key heads than devices: every device has all of the key and value projections and heads,
    and attends with those that its query heads read.
    """
    if kv_heads not in ("split", "whole"):
        raise InputError(f"tensor(kv_heads={kv_heads!r}): it is 'split' or 'whole'. Change it.")
    split: dict[str, str | Split] = {"mlp": axis, "heads": axis, "vocab": axis}
    if kv_heads == "split":
        split["kv_heads"] = Split(axis, otherwise="give tensor kv_heads='whole'")
    return Rule(compute=split, activation=split)
