"""What kind of error it looks like: two whole arrays, one right and one wrong, and how the wrong one was laid out.

Each kind is tried in turn, from the most to the least specific; the first that explains the difference to a hundredth
of its size is named. NumPy only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from sharding.layout import Layout

EXPLAINED = 1e-2
"""A kind explains an error when what it leaves is below this part of the error."""

PRECISIONS = {"float64": 1e-9, "float32": 5e-5, "float16": 5e-4, "bfloat16": 2e-2}
"""Floating dtypes, finest first, and the relative error up to which it is the size of their rounding."""


@dataclass(frozen=True)
class Error:
    """A wrong array. `found` and `want` are whole and of equal shape; `replicas` as in `witness.Seen`."""

    found: np.ndarray
    want: np.ndarray
    layout: Layout
    sizes: Mapping[str, int]
    allowed: float
    """Difference, relative to the largest entry of `want`, that rounding may make."""
    replicas: tuple[str, ...] = ()
    places: Mapping[str, np.ndarray] = field(default_factory=dict)
    """As in `witness.Seen`."""
    types: Collection[str] = tuple(PRECISIONS)
    """Floating dtypes that occur in the run: no other can have rounded it."""

    def shard(self, at: int) -> np.ndarray:
        """The shard of a split dim that each of its positions lies in."""
        n = self.want.shape[at]
        parts = math.prod(self.sizes[a] for a in self.layout.dims[at])
        return self.places.get(self.layout.names[at], np.arange(n)) * parts // n

    @property
    def size(self) -> float:
        """Norm of the difference."""
        return float(np.linalg.norm(self.found - self.want))

    def explains(self, guess: np.ndarray) -> bool:
        """Whether the found array is this one, up to rounding or a small part of the error."""
        left = float(np.linalg.norm(self.found - guess))
        noise = self.allowed * float(np.max(np.abs(guess), initial=0.0)) * math.sqrt(guess.size)
        return left <= max(EXPLAINED * self.size, min(noise, 0.1 * self.size))


def diagnose(error: Error) -> str:
    """What the error looks like, in one sentence."""
    if error.found.shape[len(error.replicas) :] != error.want.shape:
        return f"its shape is {error.found.shape}, where one device has {error.want.shape}"
    if not np.isfinite(error.found).all():
        bad = int(np.size(error.found) - np.isfinite(error.found).sum())
        return f"{bad} of its {error.found.size} entries are not finite"
    wide = replace(error, found=error.found.astype(np.float64), want=error.want.astype(np.float64))
    if error.replicas:
        told = _replicas(wide)
        if told:
            return told
        first = wide.found.reshape(-1, *wide.want.shape)[0]
        wide = replace(wide, found=first, replicas=())
    kinds: tuple[Callable[[Error], str], ...] = (_factor, _rows, _blocks, _place, _mask, _rounding)
    for kind in kinds:
        if told := kind(wide):
            return told
    return (
        f"no simple structure: {_off(wide)} off, correlation {_correlation(wide):.3f} with the right values"
    )


def _replicas(e: Error) -> str:
    """Devices that should hold the same hold different values: parts of a sum, or numbers of their own."""
    counts = [e.sizes[a] for a in e.replicas]
    copies = e.found.reshape(*counts, *e.want.shape)
    spread = float(np.max(np.abs(copies - copies.reshape(-1, *e.want.shape)[0])))
    if spread <= e.allowed * max(float(np.max(np.abs(e.want), initial=0.0)), 1e-300):
        return ""
    for n in range(1, len(counts) + 1):
        for over in itertools.combinations(range(len(counts)), n):
            total = copies.sum(axis=over, keepdims=True)
            if np.linalg.norm(total - e.want) <= EXPLAINED * np.linalg.norm(copies - e.want):
                axes = " x ".join(e.replicas[i] for i in over)
                return (
                    f"a missing reduction over {axes}: each device holds its own part, and their sum is right"
                )
    axes = " x ".join(a for i, a in enumerate(e.replicas) if np.ptp(copies, axis=i).max() > 0)
    return (
        f"devices along {axes} hold different values where they should hold the same, and their sum is not right "
        f"either: as with random numbers that differ by device, or a reduction over another axis"
    )


def _factor(e: Error) -> str:
    """One number times the right values."""
    ratio = ratio_of(e.found, e.want)
    if ratio is None or abs(ratio - 1) < min(10 * e.allowed, 0.1) or not e.explains(ratio * e.want):
        return ""
    if ratio == 0:
        return "all zeros"
    over = axes_of(ratio, e.sizes)
    if over and ratio > 1:
        return f"{ratio:.4g} times too large, the size of {over}: reduced once too often over it"
    if over:
        return (
            f"{1 / ratio:.4g} times too small, the size of {over}: a missing reduction over it, or a mean where a sum "
            f"is meant"
        )
    return f"{ratio:.6g} times the right values, which is no product of axis sizes"


def axes_of(ratio: float, sizes: Mapping[str, int]) -> str:
    """The axes whose size, or product of sizes, is the ratio or its inverse; "" when there are none."""
    used = [a for a, n in sizes.items() if n > 1]
    for n in range(1, len(used) + 1):
        fits = [
            " x ".join(axes)
            for axes in itertools.combinations(used, n)
            if abs(max(ratio, 1 / ratio) / math.prod(sizes[a] for a in axes) - 1) < EXPLAINED
        ]
        if fits and ratio > 0:
            return " or ".join(fits)
    return ""


def _rows(e: Error) -> str:
    """Whole rows of some dim that stand in another place, once each or not."""
    draw = np.random.default_rng(0)
    for at, name in enumerate(e.layout.names):
        n = e.want.shape[at]
        want, found = (np.moveaxis(x, at, 0).reshape(n, -1) for x in (e.want, e.found))
        if n < 2 or n > 65536:
            continue
        marks = draw.normal(size=(want.shape[1], 2))
        a, b = want @ marks, found @ marks
        order = np.argsort(a[:, 0])
        near = np.clip(np.searchsorted(a[order, 0], b[:, 0]), 0, n - 1)
        sides = np.stack([order[np.clip(near + d, 0, n - 1)] for d in (-1, 0)])
        best = np.argmin(np.linalg.norm(a[sides] - b, axis=-1), axis=0)
        source = sides[best, np.arange(n)]
        same = np.isclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max()).all(axis=1)
        source = np.where(same, np.arange(n), source)
        rest = tuple(k for d, k in enumerate(e.want.shape) if d != at)
        if (source == np.arange(n)).all() or not e.explains(
            np.moveaxis(want[source].reshape(n, *rest), 0, at)
        ):
            continue
        moved = np.flatnonzero(source != np.arange(n))
        what = (
            "a permutation"
            if len(set(source)) == n
            else "rows taken from another place, some twice and some never"
        )
        first = f"{name} {moved[0]} holds what belongs to {name} {source[moved[0]]}"
        return f"{what} along {name}: {len(moved)} of {n} stand wrong ({first}){_shard(e, at, moved)}"
    return ""


def _blocks(e: Error) -> str:
    """Each shard of one dim off by a factor of its own: a mean over shards that do not weigh the same."""
    for at, axes in enumerate(e.layout.dims):
        parts = math.prod(e.sizes[a] for a in axes)
        if parts < 2 or e.want.shape[at] % parts:
            continue
        shard = e.shard(at)
        found, want = ([np.compress(shard == k, x, axis=at) for k in range(parts)] for x in (e.found, e.want))
        ratios = [ratio_of(f, w) for f, w in zip(found, want, strict=True)]
        known = np.array([1.0 if r is None else r for r in ratios])
        if len({round(r, 6) for r in known}) < 2:
            continue
        along = tuple(-1 if d == at else 1 for d in range(e.want.ndim))
        if e.explains(known[shard].reshape(along) * e.want):
            each = ", ".join(f"{r:.4g}" for r in known)
            if any(r == 0 for r in known) and all(r in (0, 1) or abs(r - 1) < 1e-3 for r in known):
                return _dropped(e, at, np.flatnonzero(known[shard] == 0))
            return (
                f"each of the {parts} shards of {e.layout.names[at]} ({'/'.join(axes)}) is off by a factor of its own "
                f"({each}): a mean over shards that do not weigh the same"
            )
    return ""


def _place(e: Error) -> str:
    """Wrong in one block of a dim alone: dropped where it holds zeros."""
    scale = float(np.max(np.abs(e.want), initial=0.0))
    wrong = np.abs(e.found - e.want) > e.allowed * scale
    best: tuple[float, int, np.ndarray] | None = None
    for at in range(e.want.ndim):
        rows = np.flatnonzero(wrong.any(axis=tuple(d for d in range(e.want.ndim) if d != at)))
        part = len(rows) / e.want.shape[at]
        if len(rows) and part <= 0.75 and (best is None or part < best[0]):
            best = (part, at, rows)
    if best is None:
        return ""
    _, at, rows = best
    if not np.take(e.found, rows, axis=at).any():
        return _dropped(e, at, rows)
    return f"wrong only in {e.layout.names[at]} {_span(rows)} of {e.want.shape[at]}{_shard(e, at, rows)}, {_off(e)} off"


def _dropped(e: Error, at: int, rows: np.ndarray) -> str:
    return f"a dropped block: {e.layout.names[at]} {_span(rows)} of {e.want.shape[at]} holds zeros{_shard(e, at, rows)}"


def _mask(e: Error) -> str:
    """Zeros in other places, and agreement where neither has one: a random mask drawn anew."""
    both = (e.found != 0) & (e.want != 0)
    zeros = (e.found == 0) != (e.want == 0)
    scale = float(np.max(np.abs(e.want), initial=0.0))
    agree = np.abs(e.found - e.want)[both] <= e.allowed * scale
    if not zeros.any() or not both.any() or agree.mean() < 0.99 or zeros.mean() < 1e-3:
        return ""
    return (
        f"zeros in other places ({zeros.mean():.0%} of the entries) and equal elsewhere: a random mask that depends on the "
        f"device, as dropout does when its key or its shape is a shard's"
    )


def _rounding(e: Error) -> str:
    """Dense, small and without a sign: a lower precision, or one more order of sums than was allowed for."""
    off = float(np.linalg.norm(e.found - e.want) / max(np.linalg.norm(e.want), 1e-300))
    if off >= PRECISIONS["bfloat16"]:
        return ""
    told = f"no structure, {off:.1e} off everywhere"
    held = [name for name in PRECISIONS if name in e.types]
    fits = [name for name in held if off <= PRECISIONS[name]]
    if fits:
        return f"{told}: the size of {fits[0]}'s rounding"
    return f"{told}: more than the rounding of {held[-1]}, the coarsest type of this run" if held else told


def _shard(e: Error, at: int, rows: np.ndarray) -> str:
    """Which shards of a split dim the rows lie in, where they do not lie in all."""
    axes = e.layout.dims[at]
    parts = math.prod(e.sizes[a] for a in axes)
    if parts < 2:
        return ""
    shard = e.shard(at)
    hit = sorted({int(k) for k in shard[rows]})
    first = len(rows) == len(hit) and all(shard[r] != shard[r - 1] for r in rows if r)
    where = (
        f"; in the first of each shard: {hit}"
        if first
        else f"; these are shards {hit}"
        if len(hit) < parts
        else ""
    )
    return f"{where} of the {parts} over {' x '.join(axes)}" if where else ""


def _span(rows: np.ndarray) -> str:
    ends = f"{rows[0]} to {rows[-1]}" if len(rows) > 1 else f"{rows[0]}"
    return (
        ends
        if len(rows) == rows[-1] - rows[0] + 1
        else f"{', '.join(map(str, rows[:4]))} ... ({len(rows)} places)"
    )


def ratio_of(found: np.ndarray, want: np.ndarray) -> float | None:
    """The number r for which r x want is nearest to found, arrays of equal shape; None when want is zero."""
    square = float(np.vdot(want, want))
    return None if square == 0 else float(np.vdot(found, want)) / square


def _off(e: Error) -> str:
    return f"{float(np.max(np.abs(e.found - e.want))) / max(float(np.max(np.abs(e.want))), 1e-300):.1e}"


def _correlation(e: Error) -> float:
    norm = float(np.linalg.norm(e.found) * np.linalg.norm(e.want))
    return float(np.vdot(e.found, e.want)) / norm if norm else 0.0
