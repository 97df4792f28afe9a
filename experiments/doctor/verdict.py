"""What a check says: ok, wrong with numbers, not applicable, or could not run and why. NumPy only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Outcome = Literal["ok", "wrong", "not applicable", "could not run"]
WORST_FIRST: tuple[Outcome, ...] = ("wrong", "could not run", "ok", "not applicable")


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check or probe. `error` is the largest departure of an element, absolute, in the array's own
    unit; `bound` is what rounding explains there (0: the numbers must be equal). `detail` says more in a few words.
    """

    outcome: Outcome
    detail: str = ""
    error: float = 0.0
    bound: float = 0.0

    @property
    def unwell(self) -> bool:
        """Whether the machine may not be relied upon for this."""
        return self.outcome in ("wrong", "could not run")

    def to_json(self) -> dict[str, Any]:
        """As JSON; an error that is no number is written as null, as JSON has no infinity."""
        finite = {k: v if np.isfinite(v) else None for k, v in (("error", self.error), ("bound", self.bound))}
        return {**asdict(self), **finite}

    @staticmethod
    def from_json(said: dict[str, Any]) -> Verdict:
        """What `to_json` wrote."""
        numbers = {k: np.inf if said[k] is None else said[k] for k in ("error", "bound")}
        return Verdict(said["outcome"], said["detail"], **numbers)


def not_applicable(why: str) -> Verdict:
    """The check says nothing about this machine."""
    return Verdict("not applicable", why)


def could_not_run(why: str) -> Verdict:
    """The check gave no numbers: what it asks is not proven."""
    return Verdict("could not run", why)


def compare(found: Any, expected: Any, bound: Any = 0.0, what: str = "") -> Verdict:
    """Hold an array against what it must be: equal, or within `bound` (absolute; a number, or one for each element).

    Anything not finite where `expected` is finite is wrong. `what` names the array in the detail.
    """
    a, b = np.asarray(found), np.asarray(expected)
    named = f"{what}: " if what else ""
    if a.shape != b.shape or a.dtype != b.dtype:
        return Verdict("wrong", f"{named}{a.dtype}{[*a.shape]} instead of {b.dtype}{[*b.shape]}", np.inf)
    floats = a.dtype.kind not in "biu"
    same = (a == b) | (np.isnan(a) & np.isnan(b)) if floats else a == b
    wide = np.longdouble if a.dtype.itemsize == 8 else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.where(same, 0, np.abs(a.astype(wide) - b.astype(wide)))
        bad = ~same & ~(apart <= np.asarray(bound))  # so written that a value that is not a number is bad too
    error = float(np.max(apart, initial=0.0)) if np.isfinite(apart).all() else np.inf
    if not bad.any():
        return Verdict("ok", error=error, bound=float(np.max(bound, initial=0.0)))
    where = np.unravel_index(int(np.argmax(np.where(bad, np.nan_to_num(apart, nan=np.inf), -1))), a.shape)
    limit = float(np.broadcast_to(np.asarray(bound, float), a.shape)[where])
    at = ", ".join(str(int(i)) for i in where)
    detail = f"{named}{int(bad.sum())} of {a.size} elements wrong, worst at [{at}]: {a[where]} instead of {b[where]}"
    return Verdict("wrong", detail + _looks_like(a, b), error, limit)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict for several: the worst outcome; among equals the one that used most of its bound."""
    told = list(verdicts)
    if not told:
        return not_applicable("nothing was checked")

    def key(v: Verdict) -> tuple[int, float]:
        return WORST_FIRST.index(v.outcome), -(v.error / v.bound if v.bound else v.error)

    return min(told, key=key)


def _looks_like(found: np.ndarray, expected: np.ndarray) -> str:
    """What kind of error it looks like, where that is plain."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(a).all():
        return ""
    if not a.any():
        return " (all zero)"
    some = np.abs(b) > 0
    if some.any():
        factor = float(np.median(a[some] / b[some]))
        if np.allclose(a, factor * b, rtol=1e-3) and abs(factor - 1) > 0.01:
            return f" (all off by a factor of {factor:.4g})"
    if np.array_equal(np.sort(a, axis=None), np.sort(b, axis=None)):
        return " (the right values in the wrong places)"
    return ""
