"""What every case of a verification is held against: the same training on one device, and the budget that it gives."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import jax
import numpy as np

from experiments.assemble import near, one_device
from experiments.config import Experiment
from sharding.errors import InputError
from sharding.proof.budget import MOST, Budget, largest
from sharding.proof.double import doubled, unit
from sharding.proof.trial import Leaves, Ready, Trial
from sharding.proof.untraced import line_of
from sharding.proof.updates import One, own_casts
from sharding.proof.witness import Seen, witness


def in_double(experiment: Experiment) -> Experiment:
    """The experiment whose model computes in double, where it has a dtype to set."""
    model: Any = experiment.model
    has = any(f.name == "dtype" for f in fields(model))
    return replace(experiment, model=replace(model, dtype="float64")) if has else experiment


APART = 2.5
"""Times that a clip set anew is below or above the norm of a gradient: no product of axis sizes, so that a factor that clipping
misses is not taken for a reduction that is missing."""


def clips_for(clip: float, norms: Sequence[float]) -> tuple[float, ...]:
    """The norms at which the gradients of each update are to be clipped, given those that they have under the config's own
    `clip`; none where that shows whether a split clips: it halves the first update's, which are compared one by one, and leaves
    another's as they are.

    Elsewhere it may never bind: rows whose labels are drawn evenly give norms of their own. Set anew, it is below the norm and
    above it in turn, and never above the config's own where it is to bind. A config that does not clip (inf) is left as it is.
    """
    if not (math.isfinite(clip) and all(map(math.isfinite, norms)) and norms[0] > 0):
        return ()
    if norms[0] >= 2 * clip and min(norms) <= clip:
        return ()
    return tuple(n * APART if at % 2 else min(clip, n / APART) for at, n in enumerate(norms))


class Oracle:
    """One device, trained on some whole batches in the working precision, in double and, where the step casts by itself, in
    double without these casts (`ready`: the steps, which stay compiled; `one`: their trials).

    `clips` are the norms at which gradients are clipped, on one device and in every case, where they are not the config's own
    (`clips_for`), `clipped` the updates, from 1, in which one device then does so. `types_fixed` tells why double is the
    program of the model's own types, widened, where the model cannot compute in double by itself ("" where it can).
    `within` is the narrower type whose rounding moves arrays of a kind (`own_casts`), `rounding` the parameters whose gradients
    are nothing but rounding. `casts_unmeasured` tells why the last of the three could not run ("" where it did, or where
    nothing is cast): own casts then have no room, as in a model that has none. Raises InputError where no budget can be made.
    """

    def __init__(
        self, experiment: Experiment, batches: Sequence[Mapping[str, np.ndarray]], rows: int, x64: bool
    ):
        self.experiment, self._batch = experiment, batches[0]
        exact, self.types_fixed = _in_double(experiment, rows, x64)
        ready = Ready(one_device(experiment), rows)
        single = ready.run(experiment.seed, batches)
        self.clips = clips_for(ready.step.clip, _norms(single))
        if self.clips and not (anew := ready.run(experiment.seed, batches, None, self.clips)).broken():
            single = anew
        else:  # what is always clipped may not stay finite where it is not
            self.clips = ()
        limits = self.clips or (ready.step.clip,) * len(batches)
        self.clipped = tuple(at for at, n in enumerate(_norms(single), 1) if n > limits[at - 1])
        run = lambda ready: ready.run(experiment.seed, batches, single.initial, self.clips)
        # The same start: a foreign model may draw other numbers in double.
        made = run(exact)
        without, self.casts_unmeasured = (exact, made), ""
        if exact.casts:
            try:
                wide = Ready(exact.step, rows, True, wide=True)
                without = wide, run(wide)
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
        if self.types_fixed:  # then its own casts are among what is measured as rounding
            own = max(self.ready.single.casts, key=unit, default=own)
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
        exact = witness(two.step, first, batch, True, wide=two.wide)
        without = exact if wide is two else witness(wide.step, first, batch, True, wide=True)
        return witness(one.step, first, batch), exact, without


def _norms(trial: Trial) -> tuple[float, ...]:
    """The norm of the gradient before it is clipped, an update each."""
    return tuple(seen["grad_norm"] for seen in trial.metrics)


def _in_double(experiment: Experiment, rows: int, x64: bool) -> tuple[Ready, str]:
    """One device in double, compiled. Where the model's own code does not fit double, since it fixes a type (the carry of a
    recurrent layer), the program of its own types with every type widened, and why.

    Raises InputError where that fails as well, and where every case has to compute in double (`x64`).
    """
    double = in_double(experiment)
    try:
        with jax.enable_x64(True):
            step = one_device(double, doubled(double.model.build()))
        return Ready(step, rows, True), ""
    except InputError:
        raise
    except Exception as error:  # of any kind: its author's code at types that it was not written for
        told = (
            f"The model cannot compute in double, since a type is fixed in it ({_place(error)}"
            f"{type(error).__name__}: {textwrap.shorten(str(error), 240, placeholder=' ...')})"
        )
        if x64:
            raise InputError(
                f"{told}, and with --x64 every case has to. Give what is fixed there the type of what it meets (x.dtype), or "
                f"leave --x64 out: one device then runs the program of the model's own types, with every type widened."
            ) from error
    try:
        made = Ready(one_device(experiment), rows, True, wide=True)
    except Exception as error:  # of any kind: what jax makes of a program whose types are others
        raise InputError(
            f"{told}, and its program cannot be widened either ({_place(error)}{type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}): no error budget can be derived. Give what is fixed there the type of what "
            f"it meets (x.dtype)."
        ) from error
    return made, f"{told}: in its place one device ran the program of its own types, with every type widened."


def _place(error: Exception) -> str:
    """`FILE:LINE: ` of the model, "" where no line of it is to blame."""
    line = line_of(error)
    return f"{near(line)}: " if line else ""


def _why(error: Exception, casts: Collection[str]) -> str:
    """One sentence: the run without own casts failed, and what follows from that."""
    return (
        f"The step casts to {', '.join(sorted(casts))} by itself, but one device in double could not run without these casts: "
        f"nothing is allowed for what they round, so that what departs may be their rounding alone "
        f"({type(error).__name__}: {' '.join(str(error).split())[:300]})."
    )
