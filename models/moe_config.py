"""The mixture-of-experts transformer's configuration. No jax here, so that a config file parses at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from models.transformer_config import TransformerConfig
from sharding.errors import InputError

if TYPE_CHECKING:
    from models.moe import MoE


@dataclass(frozen=True)
class MoEConfig(TransformerConfig):
    """Sizes of a decoder transformer whose feed-forward layers are mixtures of experts; `mlp` is the width of one expert."""

    experts: int = 8
    """Experts of a layer that tokens choose from."""
    top: int = 2
    """Experts that a token chooses."""
    shared: int = 0
    """Experts that every token goes through besides, without a gate (Dai et al. 2024, arXiv:2401.06066)."""
    capacity: float = field(default=1.25, metadata={"infinite": "dropless: no choice is ever dropped"})
    """Slots of an expert for one row, as a multiple of its equal share of the row's choices; inf drops none."""
    gates: Literal["chosen", "all"] = "chosen"
    """What weighs the experts: the softmax of the scores of those a token has chosen, or of all experts."""
    balance: float = 0.01
    """Factor of the auxiliary loss that balances the experts' load (Fedus et al. 2021, arXiv:2101.03961, eq. 4)."""
    balance_over: Literal["row", "batch"] = "row"
    """What the auxiliary loss balances: each row by itself, or all rows of the batch (of a micro-batch) together."""
    bias_rate: float = 0.0
    """Step of the bias that balances the load without a loss (Wang et al. 2024, arXiv:2408.15664); 0 for no bias."""
    router_z: float = 0.0
    """Factor of the squared log of the scores' partition function (Zoph et al. 2022, arXiv:2202.08906, eq. 5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top <= self.experts or self.shared < 0:
            raise InputError(
                f"The mixture of experts has experts={self.experts}, top={self.top} and shared={self.shared}: a token "
                f"chooses at least 1 and at most all experts, and shared is 0 or more. Change one of them."
            )
        if not self.capacity > 0:
            raise InputError(
                f"The mixture of experts has capacity={self.capacity}, but it is a multiple of an expert's equal share and "
                f"must be above 0. Set model.capacity to 1.25, say, or to inf for no bound."
            )
        for name in ("balance", "bias_rate", "router_z"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"The mixture of experts has {name}={getattr(self, name)}, but it must be a finite number of at least "
                    f"0. Set model.{name} to 0 to do without."
                )

    def build(self) -> MoE:
        """The model, without arrays. Raises InputError for sizes that do not fit together."""
        from models.moe import MoE

        return MoE(self)
