"""Expert parallelism: tokens go to their experts by all-to-all, GShard (Lepikhin et al. 2020, arXiv:2006.16668)."""

from __future__ import annotations

from sharding.rule import Rule, also, rule


@rule
def expert(axis: str = "expert") -> Rule:
    """Split experts over `axis`, and the batch where an array has none: chain it after other rules that split the batch."""
    rows = {"batch": also(axis)}
    at = lambda n: {"expert": axis} if "expert" in n else rows if "batch" in n else {}
    return Rule(compute={"expert": axis}, activation=lambda ask: at(ask.names))
