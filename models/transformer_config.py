"""The decoder transformer's configuration. No jax here, so that a config file parses at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sharding.errors import InputError
from sharding.remat import parse_remat

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
    remat: str = "none"
    """What the backward pass finds kept: none, dots, full, or by name, as "save:attention,mlp offload:project" (the results of
    these ops or with these dims, on the devices or in host memory), see `sharding.remat`."""
    loop: Literal["auto", "scan", "unroll"] = "auto"
    """How the layers are compiled, see `sharding.layers.layers`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products; parameters at rest are float32."""
    theta: float = 10000.0
    """Base of the rotary frequencies."""
    loss_chunk: int = 0
    """Positions of each row, of those that a device holds, whose logits exist at once, see `sharding.unembed`; 0: all, in
    the activations' type."""
    z_loss: float = 0.0
    """What is minimized is the loss plus so many times the squared log-partition of each token (Chowdhery et al. 2022,
    arXiv:2204.02311, section 5: 1e-4). `loss` stays the cross-entropy alone; `z_loss` and `objective` are told beside it."""
    documents: Literal["run on", "packed"] = "run on"
    """Whether a row is running text, or several documents ("packed", as its dataset says too) that do not see each other:
    the batch then has `segments` and `positions` as well."""

    def __post_init__(self) -> None:
        parse_remat(self.remat)
        if self.documents not in ("run on", "packed"):
            raise InputError(
                f"The transformer has documents={self.documents!r}, but they are 'run on' or 'packed'. Set model.documents."
            )
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
        if self.loss_chunk < 0:
            raise InputError(
                f"The transformer has loss_chunk={self.loss_chunk}, but it is how many positions are scored at once. Set "
                f"model.loss_chunk to 1 or more, or to 0 for all."
            )
        if not 0 <= self.z_loss < math.inf:
            raise InputError(
                f"The transformer has z_loss={self.z_loss}, but it is the factor of a penalty: a finite number, 0 or above. "
                f"Set model.z_loss to 1e-4, say, or to 0 for none."
            )

    def build(self) -> Transformer:
        """The model, without arrays. Raises InputError for sizes that do not fit together."""
        from models.transformer import Transformer

        return Transformer(self)
