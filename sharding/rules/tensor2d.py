"""Two-dimensional tensor parallelism (Xu et al. 2021, arXiv:2105.04663, 5.1; Pope et al. 2022, arXiv:2211.05102, 3.2.2)."""

from __future__ import annotations

from typing import Literal

from sharding.errors import InputError
from sharding.rule import Rule, Split, also, rule


@rule
def tensor2d(
    rows: str = "fsdp", columns: str = "tensor", kv_heads: Literal["split", "whole"] = "split"
) -> Rule:
    """Split matrices in use both ways: `embed` over `rows`, features, heads and vocabulary over `columns`. They stay where
    they are and activations move: the residual stream goes from its part of the batch to its part of `embed` by an
    all-to-all, products are reduce-scattered back. `fsdp(rows) | tensor(columns)` gathers the same matrices instead.
    kv_heads as for `tensor`.
    """
    if kv_heads not in ("split", "whole"):
        raise InputError(f"tensor2d(kv_heads={kv_heads!r}): it is 'split' or 'whole'. Change it.")
    across: dict[str, str | Split] = {"mlp": columns, "heads": columns, "vocab": columns}
    if kv_heads == "split":
        across["kv_heads"] = Split(columns, otherwise="give tensor2d kv_heads='whole'")
    return Rule(compute={"embed": rows, **across}, activation={"batch": also(rows), **across})
