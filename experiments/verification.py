"""Verification: the same training on one device and on every mesh that a config's rules can use, compared leaf by leaf.

config -> one device in the working precision and in double (the budget) -> every mesh x partitioner (a trial each)
-> compared -> where the first departing split parts from one device.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from experiments.assemble import lays_stages, train_step
from experiments.config import Experiment
from experiments.data.contract import Dataset
from experiments.verified import KINDS, Case, Outcome, Verified
from experiments.verified_oracle import Oracle, in_double
from experiments.verified_rows import batches, documents_of, fewest_rows, indices_of
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.foreign import Foreign
from sharding.params import declare
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.proof.bisect import Departure, bisect
from sharding.proof.double import doubled
from sharding.proof.meshes import axes_of, shapes
from sharding.proof.trial import Going, Leaves, Ready, Untraced
from sharding.proof.untraced import at_trace
from sharding.proof.updates import One, compared, departing_update
from sharding.proof.witness import witness
from sharding.rules.stages import stages
from sharding.step import TrainStep

AHEAD = 2
"""Programs that are compiled before their turn comes: running one leaves a core idle now and then."""


def cases(
    experiment: Experiment,
    devices: int,
    meshes: Sequence[MeshShape] = (),
    partitioners: Sequence[Partitioner] = (),
) -> list[Case]:
    """The cases of a config: its own mesh first, then every mesh of up to `devices` devices, under both partitioners."""
    model = experiment.model.build()
    inputs = [tuple(entry.names.split()) for entry in model.inputs.values()]
    added = experiment.pipeline is not None and not lays_stages(experiment.rules)
    rules = experiment.rules | stages() if added else experiment.rules
    legal = list(meshes) or shapes(axes_of(rules, declare(model), inputs), devices)
    own = [] if meshes else [m for m in legal if m.sizes() == experiment.mesh.sizes()]
    ordered = [*own, *(m for m in legal if m not in own)]
    by = list(partitioners) or ([Auto()] if isinstance(model, Foreign) else [_manual(experiment), Auto()])
    for p in by:
        if isinstance(p, Manual) and p.products != "none":
            raise InputError(
                f"verify holds a split to the rounding of its types, but {p!r} rounds operands on purpose: where float noise "
                f"tips one of them, a whole step of {p.products} is between two right answers. Verify the same rules and "
                f"meshes with --partitioner manual; that scales do not depend on the mesh is tested (docs/memory.md)."
            )
    return [Case(mesh, p) for mesh in ordered for p in by]


def verify(
    experiment: Experiment,
    dataset: Dataset,
    found: Sequence[Any],
    asked: Sequence[Case],
    steps: int,
    x64: bool = False,
    told: Callable[[Outcome, int, int], None] = lambda *_: None,
) -> Verified:
    """Run every case against one device on the devices `found` and find where the departing ones part from it.

    steps: updates compared. x64: the splits compute in double as well. told: called with each outcome as it comes, its
    number and how many there are. Raises InputError when no mesh is legal.
    """
    work = _Work(experiment, dataset, found, steps, x64)
    legal, outcomes = work.legal(asked)
    if not asked:
        raise InputError(
            f"There is no mesh to verify: on {len(found)} device(s) no axis that the rules {experiment.rules!r} speak "
            f"of can have more than one. Give more devices (--devices 8), or rules that split something."
        )
    if not legal:
        raise InputError(f"None of the {len(asked)} meshes can be laid out. The first: {outcomes[0].refused}")
    _own_stands(experiment, outcomes)
    work.rows = fewest_rows(experiment, [step for _, step in legal])
    with _compiling(legal, work) as compiled:
        work.judge()  # while the first cases compile
        for at, (case, ready) in enumerate(compiled):
            outcomes.append(work.outcome(case, ready))
            told(outcomes[-1], at + 1, len(legal))
    if all(o.refused for o in outcomes):
        raise InputError(f"None of the {len(asked)} meshes can be used. The first: {outcomes[0].refused}")
    _own_stands(experiment, outcomes)
    outcomes = work.explained(outcomes)
    outcomes.sort(key=lambda o: asked.index(o.case))
    oracle, rounding = work.oracle, tuple(sorted(work.oracle.rounding))
    terms, leaves = oracle.budget.terms, len(oracle.one.single.gradients)
    precision = "float64" if x64 else str(getattr(experiment.model, "dtype", "float32"))
    held = terms, leaves, precision, oracle.within, rounding, oracle.casts_unmeasured
    clipping = oracle.types_fixed, experiment.optimizer.largest_norm(), oracle.clips, oracle.clipped
    return Verified(tuple(outcomes), steps, work.rows, *held, *clipping)


class _Work:
    """What the cases of one verification share: data, one device's trials, the budget."""

    def __init__(self, experiment: Experiment, dataset: Dataset, found: Sequence[Any], steps: int, x64: bool):
        self.experiment, self.dataset, self.found = experiment, dataset, found
        self.steps, self.x64 = steps, x64
        self.rows = experiment.batch
        self.drawn: dict[MeshShape, Leaves] = {}
        self.departing: dict[Partitioner, tuple[Case, Ready]] = {}
        """The smallest departing case of each partitioner."""

    def step(self, case: Case) -> TrainStep:
        """The case's step on the first devices."""
        wide = in_double(self.experiment) if self.x64 else self.experiment
        e = replace(wide, mesh=case.mesh, partitioner=case.partitioner)
        with jax.enable_x64(self.x64):
            model = doubled(e.model.build()) if self.x64 else None
            return train_step(e, self.found[: case.mesh.devices], model)

    def legal(self, asked: Sequence[Case]) -> tuple[list[tuple[Case, TrainStep]], list[Outcome]]:
        """The cases that can be laid out, with their steps, and those that the rules refuse."""
        good: list[tuple[Case, TrainStep]] = []
        bad: list[Outcome] = []
        for case in asked:
            try:
                good.append((case, self.step(case)))
            except InputError as error:
                bad.append(Outcome(case, {}, "", (), refused=str(error)))
        return good, bad

    def judge(self) -> None:
        """Train on one device; what it ran stays compiled for what a departure asks."""
        model = self.experiment.model.build()
        drawn = indices_of(model), documents_of(model)
        self.batches = batches(self.experiment, self.dataset, self.rows, self.steps, *drawn)
        self.oracle = Oracle(self.experiment, self.batches, self.rows, self.x64)

    def outcome(self, case: Case, ready: Ready | BaseException) -> Outcome:
        """Run a compiled case and compare it."""
        if isinstance(ready, InputError):
            return Outcome(case, {}, "", (), refused=str(ready))
        if isinstance(ready, Untraced):
            departure = at_trace(self.step(case), self.rows, self.x64, ready)
            return Outcome(case, {}, "", (), departure=departure)
        try:
            if isinstance(ready, BaseException):
                raise ready
            # Both partitioners lay the parameters alike: what one of them drew on this mesh is what the other would.
            foreign = self.x64 and isinstance(ready.step.model, Foreign)
            start = self.oracle.initial if foreign else self.drawn.get(case.mesh)
            trial = ready.run(self.experiment.seed, self.batches, start, self.oracle.clips)
            self.drawn[case.mesh] = trial.initial
        except (TypeError, ValueError, RuntimeError, AssertionError, IndexError, KeyError) as error:
            return Outcome(
                case, {}, "", (), failed=f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            )
        found = compared(self.oracle.budget, trial, self.oracle.one)
        worst = {k: max(found[k], key=lambda c: (c.departs, c.share)) for k in KINDS if found[k]}
        drawn = {p: w.astype(np.float32) for p, w in trial.initial.items()}
        first = self.oracle.initial
        initial = next((p for p, w in first.items() if not np.array_equal(drawn[p], w)), "")
        made = Outcome(case, worst, initial, tuple(trial.uneven))
        old = self.departing.get(case.partitioner)
        if made.departs and (old is None or case.mesh.devices < old[0].mesh.devices):
            self.departing[case.partitioner] = case, ready
        return made

    def explained(self, outcomes: list[Outcome]) -> list[Outcome]:
        """The outcomes, with where it departs for the smallest departing mesh of each partitioner."""
        ready = dict(self.departing.values())
        return [
            replace(o, departure=self._placed(o, ready[o.case])) if o.case in ready else o for o in outcomes
        ]

    def _placed(self, o: Outcome, ready: Ready) -> Departure | None:
        try:
            return self._departure(o, ready)
        except Exception as error:  # of any kind, in its author's code: what was found must still be told
            why = f"could not be placed: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
            return Departure("unplaced", why, "", (), math.inf, 0.0, "")

    def _departure(self, o: Outcome, ready: Ready) -> Departure | None:
        step = ready.step
        if o.initial:
            return Departure(
                "initial", f"the initial values of {o.initial}", step.layouts[o.initial].param.text(), (), 1.0, 0.0,
                "another draw: initial values must be a function of seed and path alone",
            )  # fmt: skip
        first, oracle = self.oracle.initial, self.oracle
        seen = witness(step, first, self.batches[0], self.x64)
        gradients = "gradient" in o.worst and o.worst["gradient"].departs
        where = bisect(
            seen, oracle.witnessed, step.split.layouts.sizes, oracle.budget, gradients, ready.types
        )
        if where is not None:
            return where
        begun = {
            r: Going(r, self.experiment.seed, first, oracle.clips)
            for r in dict.fromkeys((ready, *oracle.ready))
        }
        one = One(*(begun[r] for r in oracle.ready))
        return departing_update(begun[ready], one, self.batches, oracle.budget)


@contextmanager
def _compiling(
    legal: Sequence[tuple[Case, TrainStep]], work: _Work
) -> Iterator[Iterator[tuple[Case, Ready | BaseException]]]:
    """Every case compiled, in order, the next ones already while their predecessor runs. Only the caller's thread runs
    programs: two programs over the same devices may wait for each other.
    """

    def make(step: TrainStep) -> Ready | BaseException:
        try:
            ready = Ready(step, work.rows, work.x64)
            step.split.layouts.check_used()
            return ready
        except Exception as error:  # jax and XLA fail in many kinds: this case's outcome, the others go on
            return error

    pool = ThreadPoolExecutor(1)
    left = iter(legal)
    waiting: deque[tuple[Case, Future[Ready | BaseException]]] = deque()

    def ahead() -> None:
        while len(waiting) < AHEAD and (following := next(left, None)) is not None:
            waiting.append((following[0], pool.submit(make, following[1])))

    def each() -> Iterator[tuple[Case, Ready | BaseException]]:
        while waiting:
            case, future = waiting.popleft()
            ready = future.result()
            ahead()
            yield case, ready

    try:
        ahead()
        yield each()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _own_stands(experiment: Experiment, outcomes: Sequence[Outcome]) -> None:
    """Refuse a config whose own mesh and partitioner, the ones it trains with, were refused: others prove nothing of it."""
    own = (experiment.mesh.sizes(), experiment.partitioner)
    for o in outcomes:
        if o.refused and (o.case.mesh.sizes(), o.case.partitioner) == own:
            raise InputError(f"The config's own split ({o.case.title}) is refused. {o.refused}")


def _manual(experiment: Experiment) -> Manual:
    return experiment.partitioner if isinstance(experiment.partitioner, Manual) else Manual()
