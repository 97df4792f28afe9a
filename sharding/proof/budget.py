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

A model or an optimizer that computes in a narrower type of its own does so in double as well: no distance shows that
rounding, and the budget of the arrays that come after it is MARGIN x that type's unit at least. Of a parameter that is a
part of what the updates made of it, not of its own size, or one that is never updated would pass.

No gradient may be off by more than HALF of its scale: zeros in its place are off by all of it, a factor of two as well. No
parameter may be off by more than PLAIN of what the updates made of it, for then it was not updated; but where one device
itself is off by more than HALF of that, the updates are nothing but rounding and nothing is said of them.

A gradient that is nothing in exact arithmetic (of a number that is added to all that a softmax sees) is rounding, and so of
any size and sign from one order of summing to the next: it may be off by FEW times the rounding of a sum as large as the
largest gradient. What an optimizer makes of it is arbitrary, and may be off by FEW times what the updates made of any
parameter. A model that casts by itself casts in double too, which then does not tell such a gradient. Where it casts to
float32, the rounding of that is the bound; where to a narrower type, an error of a gradient that the type's rounding of such a
sum may make is too coarse to judge, and so is what the updates make of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

MARGIN = 16.0
"""Times the rounding of one device that a split may differ by: two roundings, each a few deviations from its mean."""
FEW = 4.0
"""Roundings of a number besides those of its longest sum."""
UNITS = {"float32": 2.0**-24, "float64": 2.0**-53}
"""Unit roundoff of the precision that sums are taken in."""
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


@dataclass(frozen=True)
class Budget:
    """What an array may be off by: built from one device in the working precision and in double."""

    terms: int
    """Elements that the longest sum runs over."""
    double: bool = False
    """Whether the split computes in double precision too."""
    within: Mapping[str, str] = field(default_factory=dict)
    """Kind -> a narrower dtype in which the step itself computes such arrays, whatever it is given; no entry for none."""

    def compare(
        self,
        kind: str,
        found: Mapping[str, np.ndarray],
        single: Mapping[str, np.ndarray],
        exact: Mapping[str, np.ndarray],
        moved: Mapping[str, float] | None = None,
        arbitrary: Collection[str] = (),
    ) -> list[Compared]:
        """Every array of `found` against one device: `single` in the working precision, `exact` in double. `moved`: the
        root mean square of what the updates made of each parameter, in its own units. `arbitrary`: arrays that rest on
        gradients that are nothing but rounding, and these gradients.
        """
        norm = NORMS[kind]
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
        small, narrow = (unit * (FEW + math.sqrt(self.terms)) * most for unit in (self._unit, self._narrow))
        made = []
        for p, want in exact.items():
            mine = found.get(p)
            if mine is None or mine.shape != want.shape:
                made.append(Compared(kind, p, math.inf, 0.0, 0.0))
                continue
            if p not in noise:
                made.append(Compared(kind, p, float(np.any(mine != want)), 0.0, 1.0))
                continue
            right = want if self.double else single[p]
            error = norm(_wide(mine) - _wide(right)) / scales[p] if np.isfinite(mine).all() else math.inf
            part = moved[p] / scales[p] if moved and kind == "parameter" else 1.0
            room = self.room(kind, max(noise[p], usual), part)
            allowed = room
            if p in arbitrary:
                over = max(small, usual * most) if kind == "gradient" else moves
                room = allowed = max(room, FEW * over / scales[p])
            elif kind == "gradient" and norm(want) <= small:
                room = allowed = max(room, FEW * small / scales[p])
            elif kind == "gradient":
                allowed = min(room, HALF)
                room = max(min(room, PLAIN), FEW * narrow / scales[p] if norm(want) <= narrow else 0.0)
            elif kind == "parameter" and moved and noise[p] <= HALF * part:
                room = allowed = min(room, PLAIN * part)
            made.append(Compared(kind, p, error, allowed, scales[p], allowed < error <= room))
        return made

    def arbitrary(self, single: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray]) -> frozenset[str]:
        """The gradients that are nothing but rounding: what an optimizer that divides by them or takes their sign makes of
        them is arbitrary. Zeros are not: where no gradient comes at all, none is rounded.
        """
        most = max((largest(g) for g in exact.values()), default=0.0)
        unit = max(MARGIN * UNITS["float64"], UNITS["float32"] if self._casts == "float32" else 0.0)
        least = unit * (FEW + math.sqrt(self.terms))
        return frozenset(
            p for p, g in exact.items() if largest(g) <= least * most and largest(g) + largest(single[p]) > 0
        )

    @property
    def _casts(self) -> str:
        """The narrower type in which the model itself computes, in double too; "" for none."""
        return self.within.get("gradient", "")

    @property
    def _unit(self) -> float:
        """Of the precision that sums are taken in, which a model's own float32 is in double as well."""
        return UNITS["float64" if self.double and not self._casts else "float32"]

    @property
    def _narrow(self) -> float:
        """Of a model's own type that is narrower than float32; 0 for none."""
        return float(jnp.finfo(self._casts).eps) / 2 if self._casts not in ("", "float32") else 0.0

    def room(self, kind: str, noise: float, part: float = 1.0) -> float:
        """What rounding may make of an array of a kind, relative to its scale, where one device is `noise` from double.
        `part`: the part of the array, relative to its scale, that was computed and can have been rounded to a narrower type.
        """
        if self.double:
            noise *= UNITS["float64"] / UNITS["float32"]
        own = self.within.get(kind)
        narrow = MARGIN * float(jnp.finfo(own).eps) / 2 if own else 0.0
        if kind == "parameter" and "gradient" in self.within:
            # AdamW divides a gradient by its own size: where that is nothing but rounding the update's sign is arbitrary.
            narrow = min(math.sqrt(narrow), HALF)
        narrow *= part
        return max(MARGIN * noise, self._unit * (FEW + math.sqrt(self.terms)), narrow)


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)
