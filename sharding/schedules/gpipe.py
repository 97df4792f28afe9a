"""GPipe: all forward passes, then all backward passes in the opposite order.

Huang et al. 2019, arXiv:1811.06965, section 2.3: bubble (S - 1)/(M + S - 1) of the step. Every stage stashes all M
micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sharding.pipeline.grid import Grid, looped, placed, positive


@dataclass(frozen=True)
class GPipe:
    """F of micro-batch m on stage s in tick m + s; after the M + S - 1 ticks of F its B, last micro-batch and stage
    first.
    """

    NAME: ClassVar[str] = "gpipe"

    microbatches: int = 8
    """Micro-batches in one step."""

    def __post_init__(self) -> None:
        positive(self)

    def grid(self, stages: int) -> Grid:
        """The grid on so many stages."""
        path, ticks = looped(stages), self.microbatches + stages - 1
        forward = {(m, s): m + s for m in range(self.microbatches) for s in range(stages)}
        tasks = {("F", *work): tick for work, tick in forward.items()}
        tasks |= {("B", *work): 2 * ticks - 1 - tick for work, tick in forward.items()}
        return placed(tasks, path, self.microbatches)
