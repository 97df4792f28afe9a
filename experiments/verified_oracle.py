"""What every case of a verification is held against: the same training on one device, and the budget that it gives."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import jax
import numpy as np

from experiments.assemble import one_device
from experiments.config import Experiment
from sharding.errors import InputError
from sharding.proof.budget import MOST, Budget, largest
from sharding.proof.double import doubled
from sharding.proof.trial import Leaves, Ready
from sharding.proof.updates import One, own_casts
from sharding.proof.witness import Seen, witness


def in_double(experiment: Experiment) -> Experiment:
    """The experiment whose model computes in double, where it has a dtype to set."""
    model: Any = experiment.model
    has = any(f.name == "dtype" for f in fields(model))
    return replace(experiment, model=replace(model, dtype="float64")) if has else experiment


class Oracle:
    """One device, trained on some whole batches in the working precision, in double and, where the step casts by itself, in
    double without these casts (`ready`: the steps, which stay compiled; `one`: their trials).

    `within` is the narrower type whose rounding moves arrays of a kind (`own_casts`), `rounding` the parameters whose gradients
    are nothing but rounding. `casts_unmeasured` tells why the last of the three could not run ("" where it did, or where
    nothing is cast): own casts then have no room, as in a model that has none. Raises InputError where no budget can be made.
    """

    def __init__(
        self, experiment: Experiment, batches: Sequence[Mapping[str, np.ndarray]], rows: int, x64: bool
    ):
        self.experiment, self._batch = experiment, batches[0]
        double = in_double(experiment)
        with jax.enable_x64(True):
            step = one_device(double, doubled(double.model.build()))
        exact = Ready(step, rows, True)
        ready = Ready(one_device(experiment), rows)
        single = ready.run(experiment.seed, batches)
        # The same start: a foreign model may draw other numbers in double.
        made = exact.run(experiment.seed, batches, single.initial)
        without, self.casts_unmeasured = (exact, made), ""
        if exact.casts:
            try:
                wide = Ready(step, rows, True, wide=True)
                without = wide, wide.run(experiment.seed, batches, single.initial)
            except Exception as error:  # of any kind: its author's code at types that it was not written for
                self.casts_unmeasured = _why(error, exact.casts)
        self.ready, self.one = One(ready, exact, without[0]), One(single, made, without[1])
        self.budget = Budget(batches[0]["weights"].size, x64, () if self.casts_unmeasured else exact.casts)
        self._check_finite()
        self.within = own_casts(self.budget, self.one)
        self.rounding = self.budget.arbitrary(single.gradients, self.one.wide.gradients)
        self._check_rounding()

    @property
    def initial(self) -> Leaves:
        """The parameters that every training begins with."""
        return self.one.single.initial

    def _check_finite(self) -> None:
        """Refuse a training that leaves the numbers: after that every split agrees with anything."""
        bad = next((bad for trial in self.one if (bad := trial.broken())), "")
        updates = len(self.one.single.metrics)
        if bad:
            raise InputError(
                f"{bad} of one device is not finite within {updates} updates, so there is nothing to compare "
                f"with. Give a smaller --optimizer.peak, fewer --steps or another --seed."
            )

    def _check_rounding(self) -> None:
        """Refuse a model that computes something else in double: the difference would be taken for rounding."""
        own = self.within.get("gradient") or str(getattr(self.experiment.model, "dtype", ""))
        most = MOST["float32" if own in ("", "float32", "float64") else "bfloat16"]
        got, want = self.one.single.gradients, self.one.exact.gradients
        overall = max(largest(g) for g in want.values())
        for path, exact in want.items():
            if path in self.rounding:
                continue
            off = largest(got[path].astype(np.float64) - exact) / max(largest(exact), 1e-3 * overall, 1e-300)
            if not off <= most:
                raise InputError(
                    f"One device in the model's own precision and in double differ by {off:.1e} in the gradient of {path}, "
                    f"where rounding would make at most {most:.0e}: the model computes something else in double, so no "
                    f"error budget can be derived. Draw random bits as integers (jax.random.bits), since floating "
                    f"draws depend on the precision, or give verify a tamer start (another --seed, a smaller scale)."
                    + (f" {self.casts_unmeasured}" if self.casts_unmeasured else "")
                )

    @functools.cached_property
    def witnessed(self) -> tuple[list[Seen], list[Seen], list[Seen]]:
        """What the named ops of one device made, in the working precision, in double, and there without own casts."""
        first, batch, (one, two, wide) = self.initial, self._batch, self.ready
        exact = witness(two.step, first, batch, True)
        without = exact if wide is two else witness(two.step, first, batch, True, wide=True)
        return witness(one.step, first, batch), exact, without


def _why(error: Exception, casts: Collection[str]) -> str:
    """One sentence: the run without own casts failed, and what follows from that."""
    return (
        f"The step casts to {', '.join(sorted(casts))} by itself, but one device in double could not run without these casts: "
        f"nothing is allowed for what they round, so that what departs may be their rounding alone "
        f"({type(error).__name__}: {' '.join(str(error).split())[:300]})."
    )
