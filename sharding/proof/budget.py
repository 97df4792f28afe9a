"""How far a split may be from one device before it is wrong: a budget for each array, derived from measured rounding.

A split adds the same numbers in another order, so it rounds differently: no two orders agree to the last bit, and none is
the right one. What is right is the result in double precision. The distance of *one device* in the working precision from
one device in double, array by array, is a sample of the rounding that the computation makes of itself: it holds the length
of every sum, the depth of the model, and what the optimizer makes of a gradient near zero. A split may be

    max(MARGIN x that distance, MARGIN x the median distance of the arrays of its kind, unit x (FEW + sqrt(n)))

from one device, in the same norm. The median and the last term stand in where one device happened to round to the exact
result, as a single number often does. `unit` is the unit roundoff and n the elements a sum runs over: the error of a sum of n
terms grows as unit x sqrt(n) with probability near one (Higham and Mary 2019, A new approach to probabilistic rounding
error analysis, theorem 2.4); FEW roundings follow it. In double precision there is nothing better to compare with, and
rounding scales with the unit roundoff: distances are those of the working precision times the ratio of the two units.

A model or an optimizer that casts to a narrower type by itself does so in double as well: that distance does not show this
rounding. So one device runs in double once more with these casts left out (`double.widely`), and what lies between the two,
array by array, is what the casts round. An array that they move may be off by FEW times that, and by MARGIN x the narrower
type's unit where that is more, since a single number is often moved by less than others of its kind. Of a parameter that unit
is a part of what the updates made of it, not of its own size, or one that is never updated would pass. What they do not move
has no room for them, whatever scan or jit they stand in.

No gradient may be off by more than HALF of its scale: zeros in its place are off by all of it, a factor of two as well. No
parameter may be off by more than PLAIN of what the updates made of it, for then it was not updated; but where one device
itself is off by more than HALF of that, the updates are nothing but rounding and nothing is said of them. A gradient that
own casts move by more than HALF of it is nothing but their rounding: an error that they may make is too coarse to judge.

A gradient that is nothing in exact arithmetic (of a number that is added to all that a softmax sees) is rounding, and so of
any size and sign from one order of summing to the next: it may be off by FEW times the rounding of a sum as large as the
largest gradient. What an optimizer makes of it is arbitrary, and may be off by FEW times what the updates made of any
parameter. Double without own casts tells such a gradient. Where they move it, an error of it that the narrower type's rounding
of such a sum may make is too coarse to judge, and so is what the updates make of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from sharding.proof.double import unit

MARGIN = 16.0
"""Times the rounding of one device that a split may differ by: two roundings, each a few deviations from its mean."""
FEW = 4.0
"""Roundings of a number besides those of its longest sum."""
UNITS = {"float32": 2.0**-24, "float64": 2.0**-53}
"""Unit roundoff of the precision that sums are taken in."""
REACH = 2.0**10
"""Times that a type's rounding of an array may be smaller than its unit (sums average it): a step that casts to several types
moves by less only what comes after the finer ones."""
RATIO = UNITS["float64"] / UNITS["float32"]
HALF = 0.5
"""What a gradient may be off by at most. A budget of measured rounding that is larger cannot tell right from wrong up to
PLAIN: such an error is too coarse to judge."""
PLAIN = 0.9
"""An error of a gradient, or of an update, from which on it is wrong whatever the rounding: zeros, a factor of two, another
sign."""
MOST = {"float32": 1e-2, "bfloat16": 0.5}
"""Rounding of one device, relative to an array's scale, above which it is no rounding: a budget made of it would pass
anything."""


@dataclass(frozen=True)
class Compared:
    """One array of a split against one device. `error` and `allowed` are relative to `scale`."""

    kind: str
    """"loss", "gradient", "parameter" or "optimizer"."""
    path: str
    error: float
    allowed: float
    scale: float
    """What `error` is relative to, in the array's own units: its largest entry, or its root mean square."""
    coarse: bool = False
    """Whether `error` is more than is allowed, but no more than measured rounding may make: neither right nor wrong."""
    casts: str = ""
    """A narrower dtype to which the step itself casts and whose rounding moves this array; "" for none."""

    @property
    def departs(self) -> bool:
        """Whether it is not what one device computes."""
        return self.share > 1 and not self.coarse

    @property
    def share(self) -> float:
        """The part of its budget that the error takes; above 1 the split departs from one device."""
        if math.isnan(self.error):
            return math.inf
        if not math.isfinite(self.allowed):
            return math.inf
        return self.error / self.allowed if self.allowed else (0.0 if self.error == 0 else math.inf)


def largest(x: np.ndarray) -> float:
    """The largest magnitude: one wrong entry shows."""
    return float(np.max(np.abs(x), initial=0.0))


def typical(x: np.ndarray) -> float:
    """The root mean square: for what an optimizer has divided by its own noise, where single entries are arbitrary."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 0.0


NORMS = {"loss": largest, "gradient": largest, "parameter": typical, "optimizer": typical}


def norm_of(kind: str) -> str:
    """What an error of this kind of array is relative to, in words."""
    return "largest entry" if NORMS[kind] is largest else "root mean square"


@dataclass(frozen=True)
class Budget:
    """What an array may be off by: built from one device in the working precision and in double."""

    terms: int
    """Elements that the longest sum runs over."""
    double: bool = False
    """Whether the split computes in double precision too."""
    casts: Collection[str] = ()
    """Narrower dtypes to which the step itself casts, whatever it is given."""

    def compare(
        self,
        kind: str,
        found: Mapping[str, np.ndarray],
        single: Mapping[str, np.ndarray],
        exact: Mapping[str, np.ndarray],
        moved: Mapping[str, float] | None = None,
        arbitrary: Collection[str] = (),
        wide: Mapping[str, np.ndarray] | None = None,
        unsigned: Collection[str] = (),
    ) -> list[Compared]:
        """Every array of `found` against one device: `single` in the working precision, `exact` in double, `wide` in double
        without the step's own casts (none: it has none). `moved`: the root mean square of what the updates made of each
        parameter, in its own units. `arbitrary`: arrays that rest on gradients that are nothing but rounding, and these
        gradients. `unsigned`: parameters whose gradients own casts move, and with them the sign of an update.
        """
        norm, wide = NORMS[kind], exact if wide is None else wide
        floats = [p for p, x in exact.items() if np.issubdtype(x.dtype, np.floating)]
        most = max((norm(exact[p]) for p in floats), default=0.0)
        moves = max((moved or {}).values(), default=0.0)
        # An array that is nothing but rounding (the bias of a key, which a softmax does not see) has no scale of its own.
        least = {
            p: moves if p in arbitrary and kind != "gradient" else UNITS["float32"] * most for p in floats
        }
        scales = {p: max(norm(exact[p]), least[p], 1e-300) for p in floats}
        noise = {p: norm(_wide(single[p]) - _wide(exact[p])) / scales[p] for p in floats}
        told = [n for p, n in noise.items() if p not in arbitrary]
        usual = float(np.median(told)) if told else 0.0
        made = []
        for p, want in exact.items():
            mine = found.get(p)
            if mine is None or mine.shape != want.shape:
                made.append(Compared(kind, p, math.inf, 0.0, 0.0))
                continue
            if p not in noise:
                made.append(Compared(kind, p, float(np.any(mine != want)), 0.0, 1.0))
                continue
            right, scale = want if self.double else single[p], scales[p]
            error = norm(_wide(mine) - _wide(right)) / scale if np.isfinite(mine).all() else math.inf
            part = moved[p] / scale if moved and kind == "parameter" else 1.0
            apart = norm(_wide(want) - _wide(wide[p])) / scale
            own = self._own(apart, noise[p], part) if kind == "gradient" or p not in arbitrary else ""
            apart = apart if own else 0.0
            room = self._room(max(noise[p], usual), apart, own, part, p in unsigned)
            # Of a sum as large as the largest gradient, in the precision of sums and in the step's own type.
            small, narrow = (u * self._roundings * most / scale for u in (self._sums(own), _unit(own)))
            if p in arbitrary:
                over = max(small, usual * most / scale) if kind == "gradient" else moves / scale
                allowed = max(room, FEW * over)
                room = max(allowed, FEW * narrow)
            elif kind == "gradient" and norm(want) <= small * scale:
                allowed = room = max(room, FEW * small)
            else:
                updated = part if moved and max(noise[p], apart) <= HALF * part else math.inf
                allowed, room = _limits(kind, room, updated, FEW * narrow if apart >= HALF else 0.0)
            made.append(Compared(kind, p, error, allowed, scale, allowed < error <= room, own))
        return made

    def arbitrary(self, single: Mapping[str, np.ndarray], wide: Mapping[str, np.ndarray]) -> frozenset[str]:
        """The gradients that are nothing but rounding: what an optimizer that divides by them or takes their sign makes of
        them is arbitrary. Zeros are not: where no gradient comes at all, none is rounded.
        """
        most = max((largest(g) for g in wide.values()), default=0.0)
        least = MARGIN * UNITS["float64"] * self._roundings
        return frozenset(
            p for p, g in wide.items() if largest(g) <= least * most and largest(g) + largest(single[p]) > 0
        )

    @property
    def _roundings(self) -> float:
        """Those of the longest sum, in units."""
        return FEW + math.sqrt(self.terms)

    def _sums(self, own: str) -> float:
        """The unit of the precision that sums are taken in, no better than float32 where own casts move them."""
        return UNITS["float64" if self.double and not own else "float32"]

    def _own(self, apart: float, noise: float, part: float) -> str:
        """The step's own type that moves an array by `apart`; "" where that is no more than the rounding of double, which
        `noise`, that of one device in the working precision, tells.
        """
        of_double = max(MARGIN * noise * RATIO, UNITS["float64"] * self._roundings)
        if not self.casts or apart <= of_double:
            return ""
        within = [t for t in self.casts if unit(t) * part <= REACH * apart]
        return max(within, key=unit) if within else min(self.casts, key=unit)

    def _room(self, noise: float, apart: float, own: str, part: float, unsigned: bool) -> float:
        """What rounding may make of an array, relative to its scale, where one device is `noise` from double and its `own`
        casts move it by `apart`. `part`: the part of it that was computed and can have been rounded to a narrower type.
        """
        noise *= RATIO if self.double else 1.0
        narrow = MARGIN * _unit(own)
        if unsigned:
            # AdamW divides a gradient by its own size: where that is nothing but rounding the update's sign is arbitrary.
            narrow = min(math.sqrt(narrow), HALF)
        return max(MARGIN * noise, self._sums(own) * self._roundings, FEW * apart, narrow * part)


def _limits(kind: str, room: float, updated: float, cast: float) -> tuple[float, float]:
    """What an array that is more than rounding may be off by, and up to what it is too coarse to judge: one rule a kind.

    All relative to its scale. `room`: of its rounding. `updated`: of a parameter the part that updates made, infinite where
    they are nothing but rounding. `cast`: of a gradient that is nothing but rounding of own casts, what these may make of it.
    """
    if kind == "gradient":
        return min(room, HALF), max(room, cast) if cast else min(room, PLAIN)
    allowed = min(room, PLAIN * updated) if kind == "parameter" else room
    return allowed, allowed


def _unit(own: str) -> float:
    return unit(own) if own else 0.0


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)
