"""A sweep of plans as one frozen value: an experiment, the pods it is modelled on, and the ways of splitting it. No jax here.

`experiments.plan_sweep_run` prices it; `configs/plan_scaling.py` is one. Nothing is run: see `experiments.sweep` for what is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from experiments.config import Experiment
from experiments.require import require
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.price.target import Target, parse_target
from sharding.rule import Rules

Mode = Literal["strong", "weak"]
"""As `experiments.sweep.Point.mode`."""


@dataclass(frozen=True)
class Line:
    """One line of the figure: a way of splitting, the same on pods of every size."""

    split: str
    """What the figure calls it."""
    rules: Rules
    """How arrays are split."""
    mesh: MeshShape
    """Mesh of every pod: the axis that is -1 grows with it."""


@dataclass(frozen=True)
class PlanPoint:
    """One line on one pod in one mode."""

    mode: Mode
    line: Line
    target: Target
    batch: int
    """Global rows of a step."""
    accumulate: int
    """Micro-batches of a step."""

    def __str__(self) -> str:
        return f"{self.mode} {self.line.split} on {self.target.text}"


@dataclass(frozen=True)
class PlanSweep:
    """Plans of one experiment on pods of many sizes. Immutable and free of jax."""

    name: str
    """Names the sweep's folder, runs/NAME/TIME-HASH/."""
    base: Experiment
    """Model, optimizer and seed; rules, mesh, batch and accumulate come from the points, devices from the targets."""
    targets: tuple[str, ...]
    """The pods, as `shardlab plan --target` takes them; of each machine every size once."""
    lines: tuple[Line, ...]
    """What is compared."""
    batch: int
    """Global rows of a step on every pod: strong scaling, a fixed amount of work."""
    rows: int
    """Rows that a device works on at once. Weak scaling has so many on each; strong scaling at most so many: a larger share
    of the batch is accumulated over micro-batches."""
    modes: tuple[Mode, ...] = get_args(Mode)
    """Which kinds of scaling are modelled."""

    def __post_init__(self) -> None:
        require("sweep.", "batch", self.batch, 1, "the global rows of a step at every size")
        require("sweep.", "rows", self.rows, 1, "the rows that a device works on at once")
        for what, several in (("targets", self.targets), ("lines", self.lines), ("modes", self.modes)):
            if not several:
                raise InputError(f"The sweep {self.name!r} has no {what}. Give it at least one.")
        named = [line.split for line in self.lines]
        twice = [n for n in named if named.count(n) > 1]
        if twice:
            raise InputError(
                f"The sweep {self.name!r} has two lines called {twice[0]!r}. Give one of them another split."
            )
        known: dict[tuple[str, int], Target] = {}
        for target in self.pods():
            _check(target)
            other = known.setdefault((target.machine.name, target.devices), target)
            if other is not target:
                raise InputError(
                    f"The sweep {self.name!r} has two pods of {target.devices} {target.machine.device_kind} devices, "
                    f"{other.text} and {target.text}; a curve has one point at each size. Leave one of them out."
                )

    def pods(self) -> tuple[Target, ...]:
        """The targets, parsed, in the order given."""
        return tuple(parse_target(text) for text in self.targets)

    def points(self) -> Iterator[PlanPoint]:
        """Every line on every pod in every mode."""
        for mode in self.modes:
            for line in self.lines:
                for target in self.pods():
                    weak = mode == "weak"
                    batch = self.rows * target.devices if weak else self.batch
                    yield PlanPoint(mode, line, target, batch, 1 if weak else self._accumulate(target))

    def _accumulate(self, target: Target) -> int:
        """The fewest equal micro-batches of the batch with at most `rows` rows for each device."""
        least = -(-self.batch // (self.rows * target.devices))
        return next(n for n in range(least, self.batch + 1) if self.batch % n == 0)

    def experiment(self, point: PlanPoint) -> Experiment:
        """The experiment that a point prices."""
        return replace(
            self.base,
            name=self.name,
            rules=point.line.rules,
            mesh=point.line.mesh,
            batch=point.batch,
            accumulate=point.accumulate,
        )


def _check(target: Target) -> None:
    machine = target.machine
    if not machine.flops or machine.memory_bandwidth is None:
        raise InputError(
            f"The target {target.text} has no public rates of arithmetic and memory, so no time can be modelled from them. "
            f"Give TPU or GPU targets, such as tpu:v5p:4x4x4; on pretend devices a Sweep measures."
        )
