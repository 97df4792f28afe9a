"""What a plan is: one value with everything that `plan` knows of a config on a target, and its JSON.

Predicted figures are read from our own trace, compiled ones from the module that the target's compiler made, modelled ones
are seconds from closed forms. They stand in different fields here and in different columns wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from experiments.explanation import Explanation

if TYPE_CHECKING:
    from experiments.compilers.ask import Memory, Refusal
    from sharding.ledger import Collective
    from sharding.module.differences import Difference
    from sharding.price.prediction import Footprint
    from sharding.price.timing import Modelled


@dataclass(frozen=True)
class Moved:
    """Predicted: collectives of one kind over the same axes that one op asks for in one place of the step."""

    axes: tuple[str, ...]
    kind: str
    op: str
    """The named op, or what the step does by itself: `gradient`, `norm`, `updated`."""
    names: str
    """The op's text: an einsum's names, an activation's dims, the path of the parameter whose gradient it is."""
    phase: str
    """"forward", "backward" or "update"."""
    layers: int
    """How many layers do it, where it stands in the model's layers; else 0."""
    source: str
    rules: tuple[str, ...]
    """Call and file:line of the rules that split arrays over these axes."""
    dtypes: tuple[str, ...]
    times: int
    payload: int
    """Bytes of its operands on a device in one step."""
    sent: int
    """Bytes that each device sends in one step."""


@dataclass(frozen=True)
class Total:
    """All collectives of one kind over the same axes."""

    axes: tuple[str, ...]
    kind: str
    times: int
    sent: int
    """Bytes that each device sends in one step."""


@dataclass(frozen=True)
class Made:
    """Compiled: what the target's compiler made of the step under one partitioner."""

    partitioner: str
    """"manual" or "auto"."""
    totals: tuple[Total, ...]
    differences: tuple[Difference, ...]
    """Where it departs from what was predicted, each with its name; under "auto" every collective, with its line."""
    memory: Memory | None
    """None where the compiler refused."""
    refused: Refusal | None
    seconds: Mapping[str, float]
    """What tracing and compiling took here."""
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Change:
    """What could be changed so that the step fits, and what it would then be."""

    words: tuple[str, ...]
    """Overrides of the config, as a command line has them."""
    total: int
    """Predicted bytes on a device."""
    step: float | None
    """Modelled seconds of a step."""


@dataclass(frozen=True)
class Verdict:
    """Whether the step fits the memory of a device."""

    needs: int | None
    """Bytes of a device; None where nobody knows: XLA's partitioner, and no compiler."""
    by: str
    """"compiled" where the compiler laid it out or refused to, else "predicted"."""
    capacity: int | None
    """Bytes that the machine has; None for pretend devices."""
    fits: bool | None
    says: str
    changes: tuple[Change, ...]
    """What would make it fit, the least modelled step time first; empty where it fits."""


@dataclass(frozen=True)
class Plan:
    """Everything that `plan` knows."""

    config: str
    target: str
    devices: str
    """The target in words."""
    islands: int
    """TPU slices or GPU hosts, between which the network is slow."""
    lies: tuple[int, ...]
    """Which device stands at each place of the mesh, outermost axis first: its number in the target's order."""
    explanation: Explanation
    """Every array with its layout and the rule that placed it."""
    moved: tuple[Moved, ...]
    """Predicted, the most bytes first; empty where nothing can be: XLA partitions a model that knows no names."""
    memory: Footprint | None
    """Predicted."""
    modelled: Modelled | None
    made: tuple[Made, ...]
    """Compiled; empty where no compiler was asked."""
    verdict: Verdict
    over_budget: tuple[str, ...]
    """Where collectives exceed the config's own budget (`experiments.budget`)."""
    missing: tuple[str, ...]
    """What could not be said, and what would be needed for it."""

    @property
    def totals(self) -> tuple[Total, ...]:
        """Predicted, summed by axes and kind."""
        return summed(self.moved)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, with the sums that the properties give."""
        told = asdict(self)
        told["totals"] = [asdict(t) for t in self.totals]
        for made, row in zip(self.made, told["made"], strict=True):
            if made.memory:
                row["memory"]["total"] = made.memory.total
        if self.memory:
            told["memory"] |= {"arguments": self.memory.arguments, "total": self.memory.total}
        return told


def summed(rows: Iterable[Moved]) -> tuple[Total, ...]:
    """Rows by axes and kind, the most bytes first."""
    found: dict[tuple[tuple[str, ...], str], tuple[int, int]] = {}
    for row in rows:
        times, sent = found.get((row.axes, row.kind), (0, 0))
        found[row.axes, row.kind] = (times + row.times, sent + row.sent)
    return _sorted(found)


def totals_of(found: Iterable[Collective]) -> tuple[Total, ...]:
    """The same of collectives."""
    from sharding.ledger import per_axis

    return _sorted(
        {(axes, kind): x for axes, kinds in per_axis(list(found)).items() for kind, x in kinds.items()}
    )


def _sorted(found: Mapping[tuple[tuple[str, ...], str], tuple[int, int]]) -> tuple[Total, ...]:
    rows = (Total(axes, kind, times, sent) for (axes, kind), (times, sent) in found.items())
    return tuple(sorted(rows, key=lambda t: (-t.sent, t.axes, t.kind)))
