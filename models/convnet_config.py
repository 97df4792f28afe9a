"""The residual convolutional network's configuration. No jax here, so that a config file parses at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharding.errors import InputError

if TYPE_CHECKING:
    from models.convnet import ConvNet


@dataclass(frozen=True)
class ConvNetConfig:
    """Sizes of a residual convolutional network that classifies images."""

    height: int = 8
    """Rows of an image."""
    width: int = 8
    """Columns of an image."""
    channels: int = 1
    """Planes of an image: 1 for grey, 3 for colour."""
    embed: int = 32
    """Width of the residual stream at every position."""
    mlp: int = 64
    """Features that a block's convolution makes at every position."""
    kernel: int = 3
    """Rows and columns of a window."""
    layers: int = 2
    """Blocks of a stage."""
    stages: int = 2
    """Stages; between two of them windows of 2 x 2 positions are averaged."""
    classes: int = 10
    """Classes to tell apart."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "channels", "embed", "mlp", "kernel", "layers", "stages", "classes"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"The convolutional network has {name}={getattr(self, name)}, but every size must be at least 1. "
                    f"Set model.{name} to 1 or more."
                )
        tile = 2 ** (self.stages - 1)
        if self.height % tile or self.width % tile:
            raise InputError(
                f"The convolutional network halves images of {self.height} x {self.width} between {self.stages} stages, but "
                f"{tile} does not divide both. Make model.height and model.width multiples of {tile}, or take fewer stages."
            )

    def build(self) -> ConvNet:
        """The model, without arrays."""
        from models.convnet import ConvNet

        return ConvNet(self)
