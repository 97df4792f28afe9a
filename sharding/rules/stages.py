"""Pipeline stages: each device has some of the layers (Huang et al. 2019, arXiv:1811.06965), and a part of the vocabulary."""

from __future__ import annotations

from typing import Literal

from sharding.errors import InputError
from sharding.rule import Ask, Rule, Split, first_dim, rule

WHOLE = "give stages vocab='whole'"


@rule
def stages(
    axis: str = "stage",
    vocab: Literal["split", "whole"] = "split",
    order: Literal["contiguous", "spread"] = "contiguous",
) -> Rule:
    """Split the layers over `axis`, and the vocabulary, which else every stage would multiply for nothing (Yeung et al. 2024,
    arXiv:2411.05288). order "spread": a stage's layers are not neighbours (virtual stages), or not as many on each stage; at
    rest the stages then split another dim, and each step brings the layers to their stages by an all-to-all, and back.
    """
    if vocab not in ("split", "whole"):
        raise InputError(f"stages(vocab={vocab!r}): it is 'split' or 'whole'. Change it.")
    if order not in ("contiguous", "spread"):
        raise InputError(f"stages(order={order!r}): it is 'contiguous' or 'spread'. Change it.")
    words = {"vocab": Split(axis, "also", WHOLE)} if vocab == "split" else {}
    if order == "contiguous":
        return Rule(compute={"layers": axis, **words}, activation=words)
    elsewhere = first_dim(axis)

    def at_rest(ask: Ask) -> dict[str, Split]:
        free = "layers" in ask.names and axis not in (a for dim in ask.dims for a in dim)
        return dict(elsewhere(ask)) if free else {}

    return Rule(compute=words, param=at_rest, activation=words)
