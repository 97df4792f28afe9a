"""The multilayer perceptron's configuration. No jax here, so that a config file parses at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharding.errors import InputError

if TYPE_CHECKING:
    from models.mlp import MLP


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of a residual multilayer perceptron that classifies feature vectors."""

    features: int = 64
    """Features of one example."""
    embed: int = 128
    """Width of the residual stream."""
    mlp: int = 256
    """Hidden features of a layer."""
    layers: int = 2
    """Residual layers."""
    classes: int = 10
    """Classes to tell apart."""

    def __post_init__(self) -> None:
        for name in ("features", "embed", "mlp", "layers", "classes"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"The multilayer perceptron has {name}={getattr(self, name)}, but every size must be at least 1. "
                    f"Set model.{name} to 1 or more."
                )

    def build(self) -> MLP:
        """The model, without arrays."""
        from models.mlp import MLP

        return MLP(self)
