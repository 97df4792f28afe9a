"""Names that stay whole on every device: the way to say that a model's own name is known and not split."""

from __future__ import annotations

from sharding.rule import Rule, rule


@rule
def replicated(*names: str) -> Rule:
    """Declare that dims with these names stay whole."""
    return Rule(replicated=names)
