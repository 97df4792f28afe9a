"""The locally connected network's configuration. No jax here, so that a config file parses at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharding.errors import InputError

if TYPE_CHECKING:
    from models.local import Local


@dataclass(frozen=True)
class LocalConfig:
    """Sizes of a locally connected network that classifies images: like a convolutional one whose positions share nothing."""

    height: int = 8
    """Rows of an image."""
    width: int = 8
    """Columns of an image."""
    channels: int = 1
    """Planes of an image: 1 for grey, 3 for colour."""
    embed: int = 16
    """Width of the residual stream at every position."""
    mlp: int = 32
    """Hidden features of a layer at every position."""
    kernel: int = 3
    """Rows and columns of a window."""
    layers: int = 1
    """Residual layers."""
    classes: int = 10
    """Classes to tell apart."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "channels", "embed", "mlp", "kernel", "layers", "classes"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"The locally connected network has {name}={getattr(self, name)}, but every size must be at least 1. "
                    f"Set model.{name} to 1 or more."
                )

    def build(self) -> Local:
        """The model, without arrays."""
        from models.local import Local

        return Local(self)
