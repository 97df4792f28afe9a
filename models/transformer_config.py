"""The decoder transformer's configuration. No jax here, so that a config file parses at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sharding.errors import InputError

if TYPE_CHECKING:
    from models.transformer import Transformer


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a decoder transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU (the Llama block)."""

    vocab: int = 256
    """Tokens of the vocabulary."""
    layers: int = 4
    """Blocks."""
    embed: int = 256
    """Width of the residual stream."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 4
    """Key and value heads; divides `heads`."""
    head_dim: int = 32
    """Features of a head; even."""
    mlp: int = 704
    """Hidden features of the feed-forward layer."""
    length: int = 256
    """Tokens of one example."""
    unembed: Literal["untied", "tied"] = "untied"
    """Whether the output projection has weights of its own or is the token table ("tied")."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass finds kept, see `sharding.layers.layers`."""
    loop: Literal["auto", "scan", "unroll"] = "auto"
    """How the layers are compiled, see `sharding.layers.layers`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products; parameters at rest are float32."""
    theta: float = 10000.0
    """Base of the rotary frequencies."""

    def __post_init__(self) -> None:
        for name in ("vocab", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "length"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"The transformer has {name}={getattr(self, name)}, but every size must be at least 1. "
                    f"Set model.{name} to 1 or more."
                )
        if not 0 < self.theta < math.inf:  # nor NaN
            raise InputError(
                f"The transformer has theta={self.theta}, but the base of rotary frequencies must be a finite number "
                f"above 0. Set model.theta to 10000, say."
            )

    def build(self) -> Transformer:
        """The model, without arrays. Raises InputError for sizes that do not fit together."""
        from models.transformer import Transformer

        return Transformer(self)
