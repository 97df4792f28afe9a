"""Findings: what a split wastes, each with the array or op, the rule that caused it, numbers, and what mends it. No jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sharding.errors import InputError

Kind = Literal["replicated array", "wasteful move", "repeated work", "idle axis"]
Severity = Literal["warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that is right in its numbers but not as the rules meant it, or costs more than it must.

    `error`: devices that do nothing new at all. `warning`: everything less.
    """

    kind: Kind
    severity: Severity
    path: str
    """A parameter's path; for a move or a product `file:line op`."""
    axes: tuple[str, ...]
    rules: tuple[str, ...]
    """Calls of the rules that it is due to."""
    sources: tuple[str, ...]
    """file:line of these rules."""
    has: int
    """What each device holds, sends in one step, or computes in one step: bytes, or FLOPs where the unit says so."""
    needs: int
    """What would do."""
    unit: Literal["bytes", "FLOPs"]
    says: str
    """What was found, with its numbers: one or two sentences that begin with the path."""
    change: str
    """What mends it, one sentence."""

    def text(self) -> str:
        """All of it in one paragraph."""
        return f"{self.says} {self.change}"


@dataclass(frozen=True)
class Limits:
    """From what size on something is a finding."""

    bytes: int = 2**20
    """Bytes on each device: held for nothing at rest, or sent for nothing in one step."""
    traffic: float = 0.01
    """Part of the bytes that a device sends in one step; what is sent for nothing must reach both."""
    work: float = 0.05
    """Part of a device's FLOPs in one step that repeat another device's."""

    def __post_init__(self) -> None:
        for name, value in (("bytes", self.bytes), ("traffic", self.traffic), ("work", self.work)):
            if not value >= 0:
                raise InputError(
                    f"The limit {name} is {value}, but waste is told from some size on, which is 0 or more. Change {name}."
                )


def human(n: float, unit: str = "B", base: int = 1024) -> str:
    """A number with a prefix: `3.1 MiB` for bytes, `3.28 M` for counts and `3.1 GFLOP` for work (base 1000)."""
    prefixes = ["", "Ki", "Mi", "Gi", "Ti"] if base == 1024 else ["", "k", "M", "G", "T", "P"]
    at = 0
    while n >= base and at < len(prefixes) - 1:
        n, at = n / base, at + 1
    digits = f"{n:.0f}" if n >= 100 or (at == 0 and n == int(n)) else f"{n:.3g}"
    return f"{digits} {prefixes[at]}{unit}".rstrip()
