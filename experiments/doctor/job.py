"""What a process of the doctor is told to do, and what it says back: JSON. Standard library only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where checks run. `pretend` 0 takes the devices present, with `spare` pretend ones where there is only a CPU."""

    pretend: int = 0
    """CPU devices in all, split evenly over the processes."""
    spare: int = 8
    processes: int = 1
    gloo: bool = False
    """Start jax.distributed even for one process; always so for several."""
    local: int = 0
    """Accelerators of each process where several share the machine's; 0 takes all."""


@dataclass(frozen=True)
class Check:
    """One thing to run: a case of a collective, as its fields, a probe's file, or neither: then starting is all."""

    name: str
    limit: float
    """Seconds after which it counts as stuck."""
    case: dict[str, Any] = field(default_factory=dict)
    probe: str = ""
    devices: int = 1
    """Devices without which a probe is not applicable."""


@dataclass(frozen=True)
class Job:
    """All that one process gets: its place among the others, and what to run, in this order."""

    place: Place
    index: int
    coordinator: str
    """host:port of process 0, where there are several."""
    deadline: float
    """Seconds that processes have to find each other."""
    checks: tuple[Check, ...]

    def to_json(self) -> str:
        """As a JSON document."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        """What `to_json` wrote."""
        told = json.loads(text)
        checks = tuple(Check(**c) for c in told.pop("checks"))
        return Job(place=Place(**told.pop("place")), checks=checks, **told)
