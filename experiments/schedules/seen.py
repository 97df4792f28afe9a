"""A schedule as it is shown: its grid with both clocks, what each stage keeps and what is sent; as JSON too. No jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.schedules.named import grid_of, short, written
from sharding.pipeline.check import require_sound
from sharding.pipeline.clocks import Clock, Costs, Messages, independent, lockstep, messages, stash
from sharding.pipeline.grid import Grid, Schedule


@dataclass(frozen=True)
class Seen:
    """Everything that is known of a schedule before it runs."""

    name: str
    """Its short name."""
    expression: str
    """As the config has it."""
    grid: Grid
    costs: Costs
    message: float
    """Time of a message, by the clock of independent stages."""
    lockstep: Clock
    independent: Clock
    stash: tuple[int, ...]
    """[stage], see `sharding.pipeline.clocks.stash`."""
    messages: Messages

    @property
    def clocks(self) -> tuple[tuple[str, Clock], ...]:
        """Both clocks with their names."""
        return (("lockstep", self.lockstep), ("independent stages", self.independent))

    def to_json(self) -> dict[str, Any]:
        """One JSON document."""
        grid = self.grid
        return {
            "schedule": self.name,
            "expression": self.expression,
            "stages": grid.stages,
            "microbatches": grid.microbatches,
            "chunks": grid.chunks,
            "ticks": grid.ticks,
            "path": [{"stage": place.stage, "chunk": place.chunk} for place in grid.path],
            "grid": [[[str(task) for task in cell] for cell in row] for row in grid.cells],
            "slots": ["".join(kinds) for kinds in grid.slots],
            "costs": {"F": self.costs.forward, "B": self.costs.inputs, "W": self.costs.weights},
            "message": self.message,
            "lockstep": _clock(self.lockstep),
            "independent": _clock(self.independent),
            "stash": list(self.stash),
            "messages": {"forward": self.messages.forward, "backward": self.messages.backward},
        }


def _clock(clock: Clock) -> dict[str, Any]:
    return {
        "makespan": clock.makespan,
        "work": clock.work,
        "bubble": clock.bubble,
        "tasks": [
            {"stage": span.stage, "task": str(span.task), "start": span.start, "end": span.end}
            for span in clock.spans
        ],
    }


def see(schedule: Schedule, stages: int, costs: Costs, message: float = 0.0) -> Seen:
    """The schedule on so many stages. InputError where it has no grid for them, or one that cannot run."""
    grid = grid_of(schedule, stages)
    expression = written(schedule)
    require_sound(grid, f"{expression} on {stages} stages", stages)
    return Seen(
        short(type(schedule)),
        expression,
        grid,
        costs,
        message,
        lockstep(grid, costs),
        independent(grid, costs, message),
        stash(grid),
        messages(grid),
    )


def percent(share: float) -> str:
    """`27.3 %`."""
    return f"{share * 100:.1f} %"


def kept(seen: Seen) -> str:
    """What one of a stash is, in words."""
    chunks = seen.grid.chunks
    return (
        "micro-batches" if chunks == 1 else f"micro-batches' chunks, each 1/{chunks} of a stage's activations"
    )


def backward(seen: Seen) -> str:
    """What B does in this grid."""
    return "backward, of inputs" if seen.grid.splits else "backward, of inputs and weights"
