"""What a verification finds, as values: the cases, each one's outcome, the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from experiments.expressions import show_partitioner
from sharding.axes import MeshShape
from sharding.partitioner import Partitioner
from sharding.proof.bisect import Departure
from sharding.proof.budget import Compared

KINDS = ("loss", "gradient", "parameter", "optimizer")


@dataclass(frozen=True)
class Case:
    """One mesh under one partitioner."""

    mesh: MeshShape
    partitioner: Partitioner

    @property
    def title(self) -> str:
        """`data=2 fsdp=4, manual`."""
        return f"{self.mesh.describe()}, {show_partitioner(self.partitioner)}"


@dataclass(frozen=True)
class Outcome:
    """What a case gave: its worst array of each kind, or why it was refused or failed."""

    case: Case
    worst: dict[str, Compared]
    initial: str
    """The first parameter whose initial values are not those of one device to the bit, "" when all are."""
    uneven: tuple[str, ...]
    refused: str = ""
    """Why this mesh is not legal for the rules: no fault."""
    failed: str = ""
    """What was raised while it was traced, compiled or run: a fault."""
    departure: Departure | None = None
    """Where it parts from one device, for the smallest departing mesh of each partitioner and for what cannot be traced."""

    @property
    def departs(self) -> bool:
        """Whether it is not what one device computes."""
        wrong = any(c.departs for c in self.worst.values())
        untraced = self.departure is not None and self.departure.phase == "trace"
        return bool(self.failed or self.initial or self.uneven or wrong or untraced)

    @property
    def coarse(self) -> bool:
        """Whether rounding is too coarse to judge: a gradient is off by more than half, and rounding may have made that."""
        return not self.departs and any(c.coarse for c in self.worst.values())

    @property
    def verdict(self) -> str:
        """What is told of it: "refused", "departs", "too coarse" or "agrees"."""
        if self.refused:
            return "refused"
        return "departs" if self.departs else "too coarse" if self.coarse else "agrees"


@dataclass(frozen=True)
class Verified:
    """The outcome of every case, and what they were held against."""

    outcomes: tuple[Outcome, ...]
    steps: int
    rows: int
    terms: int
    leaves: int
    precision: str
    """Type in which the model computes."""
    within: Mapping[str, str]
    """Kind of array -> a narrower dtype that the step itself casts to and that moves arrays of it; none: no entry."""
    rounding: tuple[str, ...] = ()
    """Parameters whose gradients are nothing but rounding: what the updates make of them is hardly judged."""
    casts_unmeasured: str = ""
    """Why one device could not run in double without the step's own casts, which then have no room; "" where it did, or where
    it casts nothing."""
    types_fixed: str = ""
    """Why one device in double ran the program of the model's own types, widened; "" where the model computes in double."""
    clip: float = math.inf
    """The norm at which the config clips gradients; inf: it does not."""
    clips: tuple[float, ...] = ()
    """The norms at which gradients were clipped instead, an update each, on one device and in every case: the config's own
    would not have shown whether a split clips. Empty where its own was used."""
    clipped: tuple[int, ...] = ()
    """The updates, from 1, whose gradients one device clipped."""

    @property
    def checked(self) -> tuple[Outcome, ...]:
        """Those that were not refused."""
        return tuple(o for o in self.outcomes if not o.refused)

    @property
    def departed(self) -> tuple[Outcome, ...]:
        """Those that are not what one device computes."""
        return tuple(o for o in self.outcomes if o.departs)

    @property
    def coarse(self) -> tuple[Outcome, ...]:
        """Those of which rounding is too coarse to judge."""
        return tuple(o for o in self.outcomes if o.coarse)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; every figure is measured."""

        def one(o: Outcome) -> dict[str, Any]:
            return {
                "mesh": {a: n for a, n in o.case.mesh.sizes().items() if n > 1},
                "partitioner": show_partitioner(o.case.partitioner),
                "verdict": o.verdict,
                "worst": {k: _finite({**asdict(c), "share_of_budget": c.share}) for k, c in o.worst.items()},
                "initial_parameters_differ": o.initial,
                "uneven": list(o.uneven),
                "refused": o.refused,
                "failed": o.failed,
                "departure": _finite(asdict(o.departure)) if o.departure else None,
            }

        head = _finite({f.name: getattr(self, f.name) for f in fields(self) if f.name != "outcomes"})
        return {"provenance": "measured", **head, "cases": [one(o) for o in self.outcomes]}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Floats that JSON has no number for as "NaN", "Infinity" or "-Infinity", as in records."""
    name = lambda x: "NaN" if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"
    return {k: name(x) if isinstance(x, float) and not math.isfinite(x) else x for k, x in values.items()}
