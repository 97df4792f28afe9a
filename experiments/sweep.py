"""A scaling sweep as one frozen value: an experiment, and the device counts and splits it is timed at. No jax here.

`experiments.sweep_run` measures it; `configs/scaling_quick.py` is one. What a sweep's folder needs to run again is here, for
sweeps of plans too (`experiments.plan_sweep`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from experiments.config import Experiment, config_hash
from experiments.config_file import call, execute
from experiments.field_types import check_types
from experiments.plan_sweep import PlanSweep
from experiments.require import require
from experiments.run_config import Origin, check_recorded, keep
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.rule import Rules


@dataclass(frozen=True)
class Point:
    """One side of a sweep: a way of splitting on the first `devices` devices."""

    mode: Literal["strong", "weak"]
    """"strong": the global batch is the same at every device count. "weak": the batch of a device is."""
    split: str
    """What the figure calls the split; one line of it."""
    rules: Rules
    """How arrays are split."""
    mesh: MeshShape
    """Mesh over those devices."""
    devices: int
    """How many devices."""
    batch: int
    """Global rows of a step."""

    def __str__(self) -> str:
        return f"{self.mode} {self.split} on {self.devices} device{'s' if self.devices > 1 else ''}"


@dataclass(frozen=True)
class Sweep:
    """A scaling sweep: `base` with rules, mesh and batch of each point. Immutable and free of jax."""

    name: str
    """Names the sweep's folder, runs/NAME/TIME-HASH/."""
    base: Experiment
    """Model, data, optimizer, partitioner, seed and devices; the rest comes from the points."""
    points: tuple[Point, ...]
    """What is compared; each has its turn in every round."""
    rounds: int = 3
    """Turns of every point."""
    steps: int = 5
    """Timed updates in a turn; a round's figure is their median."""
    warmup: int = 1
    """Untimed updates before them, in every turn: the other points have used the caches since."""

    def __post_init__(self) -> None:
        require("sweep.", "rounds", self.rounds, 1, "the turns of every point")
        require("sweep.", "steps", self.steps, 1, "the timed updates of a turn")
        require("sweep.", "warmup", self.warmup, 0, "the untimed updates of a turn")
        if not self.points:
            raise InputError(f"The sweep {self.name!r} has no points. Give it at least one Point.")
        for point in self.points:
            self._check(point)
        named = [str(p) for p in self.points]
        twice = [n for n in named if named.count(n) > 1]
        if twice:
            raise InputError(f"The sweep {self.name!r} has {twice[0]} twice. Drop one of the two points.")
        for mode, meaning in (("strong", "one global batch"), ("weak", "one batch a device")):
            sizes = {p.batch / (p.devices if mode == "weak" else 1): p for p in self.points if p.mode == mode}
            if len(sizes) > 1:
                told = ", ".join(f"{p.batch} rows for {p}" for p in sizes.values())
                raise InputError(
                    f"{mode.capitalize()} scaling means {meaning} at every device count, but there are {told}. "
                    f"Change the points' batch."
                )

    def _check(self, point: Point) -> None:
        if point.mode not in ("strong", "weak"):
            raise InputError(f'A point has the mode {point.mode!r}; it is "strong" or "weak". Change it.')
        require(f"{point}: ", "devices", point.devices, 1, "the number of devices")
        require(f"{point}: ", "batch", point.batch, 1, "the global rows of a step")
        have = self.base.devices.count
        if -1 < have < point.devices:
            raise InputError(
                f"The point {point} asks for more devices than the {have} {self.base.devices.kind} ones of the sweep's "
                f"base. Set its devices.count to at least {point.devices}, or leave the point out."
            )
        with of(point):
            point.mesh.resolve(point.devices)

    def experiment(self, point: Point) -> Experiment:
        """The experiment that a point times: as long as all its turns together."""
        with of(point):
            return replace(
                self.base,
                name=self.name,
                rules=point.rules,
                mesh=point.mesh,
                batch=point.batch,
                steps=self.rounds * (self.steps + self.warmup),
            )


@contextlib.contextmanager
def of(point: object) -> Iterator[None]:
    """An `InputError` raised within says which point it speaks of."""
    try:
        yield
    except InputError as error:
        raise InputError(f"The point {point}: {error}") from error


@dataclass(frozen=True)
class Recorded:
    """What a sweep's config.py knows of its sweep."""

    rounds: int | None
    """As given on the command line, or else by the config; None for a sweep of plans, which has none."""
    config_hash: str

    def again(self, folder: Path) -> Sweep | PlanSweep:
        """The sweep, from source.py in `folder`; `InputError` with the fields that are not as recorded."""
        made, words = load_either(folder / "source.py"), ()
        if isinstance(made, Sweep) and self.rounds is not None:
            made, words = replace(made, rounds=self.rounds), ("--rounds", str(self.rounds))
        check_recorded(folder, "sweep", made, words, self.config_hash)
        return made


def write_sweep_config(folder: Path, origin: Origin, sweep: Sweep | PlanSweep) -> None:
    """Write source.py, config.json and config.py into the existing folder, and check that they run again: as for a run.

    `InputError` when the folder cannot be written, or when the copy does not give the same values.
    """
    path = origin.path
    if isinstance(getattr(execute(path), "RECORDED", None), Recorded):  # a sweep's config.py
        path = path.resolve().parent / "source.py"
    rounds = sweep.rounds if isinstance(sweep, Sweep) else None
    stub = STUB.format(
        name=repr(sweep.name),
        more="" if rounds is None else "--rounds may follow. ",
        rounds=rounds,
        digest=config_hash(cast("Experiment", sweep)),
    )
    keep(folder, path, "sweep", sweep, origin.overrides, stub, load_either)


STUB = '''"""The sweep {name} in this folder, with exactly its values.

Command:  shardlab sweep CONFIG, where CONFIG is this file
{more}Loading it fails when the values are no longer those recorded.
"""

from __future__ import annotations

from pathlib import Path

from experiments.sweep import Recorded

RECORDED = Recorded(rounds={rounds}, config_hash="{digest}")


def config():
    return RECORDED.again(Path(__file__).parent)
'''


def load(path: Path) -> Sweep:
    """The measured sweep that the `config()` of a file returns; `InputError`, one paragraph, for anything else."""
    value = load_either(path)
    if isinstance(value, Sweep):
        return value
    raise InputError(
        f"config() in {path} returns a PlanSweep, which is modelled, but a Sweep is needed here. Give another file."
    )


def load_either(path: Path) -> Sweep | PlanSweep:
    """The sweep, measured or of plans, that the `config()` of a file returns; `InputError` for anything else."""
    value = call(execute(path), "config", path, example="def config() -> Sweep")
    if isinstance(value, Sweep | PlanSweep):
        check_types(value, f"config() in {path}")
        return value
    hint = f" An Experiment is run by `shardlab train {path}`." if isinstance(value, Experiment) else ""
    raise InputError(
        f"config() in {path} returns a value of type {type(value).__name__}, but a sweep's config returns a Sweep "
        f"(`from experiments.sweep import Sweep`), as configs/scaling_quick.py does, or a PlanSweep, as "
        f"configs/plan_scaling.py does.{hint}"
    )
