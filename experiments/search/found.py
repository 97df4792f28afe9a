"""What a search found, as one value and its JSON. Predicted, modelled and compiled figures stand in fields of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from experiments.search.space import Candidate


@dataclass(frozen=True)
class Figure:
    """Of one candidate, from its trace."""

    memory: int
    """Predicted bytes on each device."""
    step: float | None
    """Modelled seconds of one step; None where a figure of the machine is missing."""
    mfu: float | None
    """The bound on model FLOPs utilization in the model."""
    bottleneck: str


@dataclass(frozen=True)
class CompiledFigure:
    """Of one candidate, from the module that the target's compiler made."""

    memory: int | None
    """Bytes on each device; None where the compiler refused without a number."""
    step: float | None
    """Modelled seconds of one step with the compiled module's collectives and its overlap; the ops are those of the trace."""
    refused: str
    """Why the compiler made no program, in its words; "" where it made one."""

    def fits(self, capacity: int | None) -> bool:
        """Whether a device holds the program."""
        return not self.refused and (capacity is None or self.memory is None or self.memory <= capacity)


@dataclass(frozen=True)
class Row:
    """One candidate that could be traced."""

    rank: int
    """By prediction: what fits first, then the modelled step, then memory. From 1."""
    candidate: Candidate
    rules: str
    """The chain, written out for the config's own too."""
    words: tuple[str, ...]
    """Overrides with which `shardlab train CONFIG ...` runs it."""
    figure: Figure
    fits: bool | None
    """Whether the predicted memory is there; None for pretend devices, which have none of their own."""
    front: bool
    """On the Pareto front of predicted memory against the modelled step: no other is better in both."""
    given: bool
    """Whether it is the config as it is."""
    compiled: CompiledFigure | None = None


@dataclass(frozen=True)
class Regret:
    """What the search loses against compiling every candidate; modelled from compiled modules, not measured."""

    compiled: int
    """Candidates that were compiled."""
    fit: int
    """Of them, those that fit by the compiler's word."""
    best: int
    """Rank of the best of them."""
    best_step: float
    predicted: float | None
    """(step of the first by prediction) / (step of the best) - 1; None where it does not fit after all."""
    checked: Mapping[int, float | None]
    """The same of the best of the first 1, 2, 3 ... that are compiled, by how many."""


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    config: str
    target: str
    devices: str
    """The target in words."""
    capacity: int | None
    """Bytes of a device."""
    splits: int
    """Meshes with a chain of rules that were considered."""
    fallen: Mapping[str, int]
    """Why some fell before any trace -> how many."""
    candidates: int
    """What was left, with every remat policy and number of micro-batches."""
    estimated: int
    """Candidates that were traced, or refused on the way."""
    refused: Mapping[str, int]
    """Why some were refused while traced -> how many."""
    rows: tuple[Row, ...]
    """By rank."""
    pick: int | None
    """Rank of the pick; None where nothing fits."""
    says: str
    """The pick, or what lacks, in a sentence."""
    seconds: Mapping[str, float]
    jobs: int
    """Processes that traced."""
    missing: tuple[str, ...] = ()
    regret: Regret | None = None

    @property
    def picked(self) -> Row | None:
        """The row of the pick."""
        return next((row for row in self.rows if row.rank == self.pick), None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def front(figures: Sequence[Figure]) -> list[bool]:
    """Of each, whether no other takes both less memory and less time (or one less and the other equal)."""
    order = sorted(
        (i for i, f in enumerate(figures) if f.step is not None),
        key=lambda i: (figures[i].memory, figures[i].step or 0.0),
    )
    on, best = [False] * len(figures), float("inf")
    for i in order:
        step = figures[i].step
        if step is not None and step < best:
            on[i], best = True, step
    return on
