"""ZB-H1: the gradients of the weights wait, and fill the time in which the pipeline empties.

Qi et al. 2023, arXiv:2401.10241, section 2: B makes the gradients of the inputs alone, which is all that the stage
before waits for; W, those of the weights, nobody waits for. In lockstep all stages do the W of a micro-batch in one
tick, which is in the last M: (M + S - 1)(F + B) + M W, where 1F1B takes (M + S - 1)(F + B + W). Stage s stashes
min(2S - 1 - s, M) micro-batches from F to W: at most what 1F1B does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sharding.pipeline.grid import Grid, looped, placed, positive


@dataclass(frozen=True)
class ZeroBubble:
    """F of micro-batch m on stage s in tick m + s, its B in tick m + 2(S - 1) - s, its W in tick m + 2(S - 1)."""

    NAME: ClassVar[str] = "zb-h1"

    microbatches: int = 8
    """Micro-batches in one step."""

    def __post_init__(self) -> None:
        positive(self)

    def grid(self, stages: int) -> Grid:
        """The grid on so many stages."""
        path, last, many = looped(stages), stages - 1, range(self.microbatches)
        tasks = {("F", m, s): m + s for m in many for s in range(stages)}
        tasks |= {("B", m, s): m + 2 * last - s for m in many for s in range(stages)}
        tasks |= {("W", m, s): m + 2 * last for m in many for s in range(stages)}
        return placed(tasks, path, self.microbatches)
