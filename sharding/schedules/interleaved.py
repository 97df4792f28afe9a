"""Interleaved 1F1B: each stage has several chunks of layers, so that filling the pipeline takes parts of a stage's time.

Narayanan et al. 2021, arXiv:2104.04473, section 2.2: the bubble is 1/v of 1F1B's and there are v times as many
messages. The order is depth first: S micro-batches go through all chunks before the next S begin. Stage s stashes
min(S(v + 1) - 2s - 1, Mv) chunks' activations (each 1/v of a stage's), which is Megatron-LM's number of warm-up
micro-batches and one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sharding.errors import InputError
from sharding.pipeline.grid import Grid, looped, placed, positive


@dataclass(frozen=True)
class Interleaved:
    """F of micro-batch m in part p in tick t(m) + p, its B in tick t(m) + 2(vS - 1) - p, where t(m) = m + (m // S)(v - 1)S.

    A stage's k-th F is of group k // vS of S micro-batches, chunk (k // S) % v, and its k-th B the same with the
    chunks in the opposite order: 1F1B on vS stages, of which S are done by the same device in turn.
    """

    NAME: ClassVar[str] = "interleaved"

    microbatches: int = 8
    """Micro-batches in one step; a multiple of the stages."""
    chunks: int = 2
    """Chunks of layers on a stage."""

    def __post_init__(self) -> None:
        positive(self)

    def grid(self, stages: int) -> Grid:
        """The grid on so many stages. InputError where the micro-batches are not a multiple of them."""
        path = looped(stages, self.chunks)
        if self.microbatches % stages:
            raise InputError(
                f"Interleaved sends micro-batches through its chunks in groups of as many as there are stages, but "
                f"{self.microbatches} micro-batches are no multiple of {stages} stages. Take "
                f"{-(-self.microbatches // stages) * stages} micro-batches, or OneFOneB or BreadthFirst, which take any "
                f"number."
            )
        starts = {m: m + m // stages * (self.chunks - 1) * stages for m in range(self.microbatches)}
        parts = range(len(path))
        tasks = {("F", m, p): start + p for m, start in starts.items() for p in parts}
        tasks |= {("B", m, p): start + 2 * (len(path) - 1) - p for m, start in starts.items() for p in parts}
        return placed(tasks, path, self.microbatches)
