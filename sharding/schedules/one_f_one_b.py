"""1F1B with flush: a backward pass as soon as there can be one, so that few micro-batches are under way.

Narayanan et al. 2021, arXiv:2006.09503 (PipeDream-Flush), in ticks of one forward and one backward slot: the lockstep
of one SPMD program then costs (M + S - 1)(F + B), as independent stages do. Stage s stashes min(2(S - s) - 1, M)
micro-batches, where independent stages would do with S - s: each hop, there and back, takes a tick of both slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sharding.pipeline.grid import Grid, looped, placed, positive


@dataclass(frozen=True)
class OneFOneB:
    """F of micro-batch m on stage s in tick m + s, its B in tick m + 2(S - 1) - s."""

    NAME: ClassVar[str] = "1f1b"

    microbatches: int = 8
    """Micro-batches in one step."""

    def __post_init__(self) -> None:
        positive(self)

    def grid(self, stages: int) -> Grid:
        """The grid on so many stages."""
        path, last, many = looped(stages), stages - 1, range(self.microbatches)
        tasks = {("F", m, s): m + s for m in many for s in range(stages)}
        tasks |= {("B", m, s): m + 2 * last - s for m in many for s in range(stages)}
        return placed(tasks, path, self.microbatches)
