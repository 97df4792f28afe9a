"""Axes by pattern of path, for parameters without names (what EasyLM and t5x did with regular expressions, here loud)."""

from __future__ import annotations

from collections.abc import Mapping

from sharding.paths import placings
from sharding.rule import Rule, rule


@rule
def by_path(**roles: Mapping[str, str]) -> Rule:
    """`by_path(compute={"layers.*down": "- tensor -"})`: a role, a pattern (`sharding.paths`), one axis a dim or `-`."""
    return Rule(**placings(roles))
