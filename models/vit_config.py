"""The vision transformer's configuration. No jax here, so that a config file parses at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharding.errors import InputError
from sharding.remat import parse_remat

if TYPE_CHECKING:
    from models.vit import ViT


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer: patches of an image as tokens that all see each other."""

    height: int = 8
    """Rows of an image."""
    width: int = 8
    """Columns of an image."""
    channels: int = 1
    """Planes of an image: 1 for grey, 3 for colour."""
    patch: int = 2
    """Rows and columns of a patch; divides height and width."""
    layers: int = 2
    """Blocks."""
    embed: int = 64
    """Width of the residual stream."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 4
    """Key and value heads; divides `heads`."""
    head_dim: int = 16
    """Features of a head."""
    mlp: int = 128
    """Hidden features of the feed-forward layer."""
    classes: int = 10
    """Classes to tell apart."""
    remat: str = "none"
    """What the backward pass finds kept: none, dots, full, or by name, as "save:attention,mlp offload:project" (the results of
    these ops or with these dims, on the devices or in host memory), see `sharding.remat`."""

    def __post_init__(self) -> None:
        parse_remat(self.remat)
        sizes = "height width channels patch layers embed heads kv_heads head_dim mlp classes"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise InputError(
                    f"The vision transformer has {name}={getattr(self, name)}, but every size must be at least 1. "
                    f"Set model.{name} to 1 or more."
                )
        if self.height % self.patch or self.width % self.patch:
            raise InputError(
                f"The vision transformer cuts images of {self.height} x {self.width} into patches of {self.patch} x "
                f"{self.patch}, which does not go evenly. Make model.height and model.width multiples of model.patch."
            )
        if self.heads % self.kv_heads:
            raise InputError(
                f"The vision transformer has heads={self.heads} and kv_heads={self.kv_heads}: kv_heads must divide heads. "
                f"Change one of them."
            )

    def build(self) -> ViT:
        """The model, without arrays."""
        from models.vit import ViT

        return ViT(self)
