"""Sequence parallelism by all-to-all, DeepSpeed Ulysses (Jacobs et al. 2023, arXiv:2309.14509)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from sharding.errors import InputError
from sharding.rule import Ask, Rule, Split, also, rule


@rule
def ulysses(axis: str = "context", kv_heads: Literal["split", "whole"] = "split") -> Rule:
    """Split the length over `axis`; inside attention the heads instead, so that each device attends over whole sequences
    with its own heads: one all-to-all for q, k, v and the result each. kv_heads "whole" gathers keys and values, for fewer
    key heads than devices. To be chained after `tensor` and `context`, whose splits of heads and length it goes on from.
    """
    if kv_heads not in ("split", "whole"):
        raise InputError(f"ulysses(kv_heads={kv_heads!r}): it is 'split' or 'whole'. Change it.")

    def place(ask: Ask) -> Mapping[str, Split]:
        if "queries" in ask.names:
            return {"heads": also(axis)}
        if "keys" in ask.names:
            split = replace(also(axis), otherwise="give ulysses kv_heads='whole'")
            return {"kv_heads": split} if kv_heads == "split" else {}
        return {n: also(axis) for n in ("length", "slots") if n in ask.names}

    return Rule(activation=place)
