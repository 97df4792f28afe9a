"""Breadth first: several chunks of layers a stage, and all micro-batches go through one chunk before the next chunk begins.

Lamy-Poirier 2022, arXiv:2211.05953: the small bubble of interleaved 1F1B for any number of micro-batches, and a
chunk's weights are used in one go, once forward and once backward, so that weights that are split over data are
gathered once. The price is GPipe's stash: all micro-batches of all chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sharding.pipeline.grid import Grid, looped, placed, positive


@dataclass(frozen=True)
class BreadthFirst:
    """F of micro-batch m in chunk c of stage s in tick cR + m + s, R = max(M, S); after all F its B, last chunk and
    stage first.
    """

    NAME: ClassVar[str] = "breadth-first"

    microbatches: int = 8
    """Micro-batches in one step; fewer than stages leave them idle between chunks."""
    chunks: int = 2
    """Chunks of layers on a stage."""

    def __post_init__(self) -> None:
        positive(self)

    def grid(self, stages: int) -> Grid:
        """The grid on so many stages."""
        path, many, turn = looped(stages, self.chunks), self.microbatches, max(self.microbatches, stages)
        forward = {
            (m, p): place.chunk * turn + m + place.stage for m in range(many) for p, place in enumerate(path)
        }
        ticks = 1 + max(forward.values())
        tasks = {("F", *work): tick for work, tick in forward.items()}
        # The parts in the opposite order, the micro-batches in theirs.
        tasks |= {("B", m, len(path) - 1 - p): ticks + tick for (m, p), tick in forward.items()}
        return placed(tasks, path, many)
