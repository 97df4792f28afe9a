"""Zero bubble on a V: two chunks a stage, the second half of the layers going back over the stages.

Qi et al. 2024, arXiv:2405.15362 (placement and W as in ZB-V of arXiv:2401.10241): part p < S lies on stage p, part 2S
- 1 - p on the same stage. The first and the last layers lie on stage 0, nothing is sent where the path turns, and
every stage stashes about the same. In lockstep (M + S - 1)(F + B) + M W, as ZB-H1, and no V can do better: before the
first and after the last of the 2M ticks in which stage S - 1 does an F there are S - 1 others in which only other
stages do, and so it is with B. Independent stages with F = B = W would lose (S - 1)/2 in this order, and nothing in
the paper's, which is packed without slots in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sharding.pipeline.grid import Grid, Place, looped, placed, positive


@dataclass(frozen=True)
class ZBV:
    """F of micro-batch m in part p in tick 2m + p, its B in tick 2m + 2(2S - 1) - p, its W in one of the last 2M ticks.

    Two parts of a stage lie an odd number of ticks apart, and micro-batches an even number, so no two ever meet.
    """

    NAME: ClassVar[str] = "zb-v"

    microbatches: int = 8
    """Micro-batches in one step."""

    def __post_init__(self) -> None:
        positive(self)

    def grid(self, stages: int) -> Grid:
        """The grid on so many stages."""
        down = looped(stages)
        path = (*down, *(Place(place.stage, 1) for place in reversed(down)))
        last, works = 2 * stages - 1, [(m, p) for m in range(self.microbatches) for p in range(2 * stages)]
        tasks = {("F", m, p): 2 * m + p for m, p in works}
        tasks |= {("B", m, p): 2 * m + 2 * last - p for m, p in works}
        # W of the second half first: its B was first.
        tasks |= {("W", m, p): 2 * m + 2 * last - (p >= stages) for m, p in works}
        return placed(tasks, path, self.microbatches)
