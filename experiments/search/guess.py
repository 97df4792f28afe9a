"""Which candidates to trace where there are too many: those that a regression over the traced ones expects to be good.

The logarithms of the modelled step and of the predicted memory are fitted by a quadratic in the logarithms of the mesh's
axes and of the micro-batches, with a constant for each rule and each remat policy (ridge regression). The guess only decides
what is traced next: every figure that is shown comes from a trace. The same candidates give the same choice everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from experiments.search.found import Figure
from experiments.search.space import Candidate
from sharding.axes import AXES

GOLDEN = (math.sqrt(5) - 1) / 2
RIDGE = 1e-3
FOCUS = 2.0
"""How much less a candidate counts in the fit that is slower: by its step, relative to the best, to so high a power."""
MARGIN = 1.05
"""Of the capacity: what is guessed to be a little above may fit."""


def spread(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """`count` candidates to begin with: every chain of one axis with the fewest micro-batches, where the best so often lies,
    under each remat policy; then in turn from those of two axes and from the whole list, evenly.
    """
    least = min((c.accumulate for c in candidates), default=1)
    simple = [c for c in candidates if len(c.mesh) <= 2 and c.accumulate == least and "(" not in c.rules]
    chosen = dict.fromkeys(c for c in simple if len(c.mesh) <= 1)
    rest = (_evenly(part) for part in (simple, candidates) if part)
    for c in itertools.chain.from_iterable(zip(*rest, strict=True)):
        if len(chosen) >= min(count, len(candidates)):
            break
        chosen[c] = None
    return list(chosen)[:count]


def _evenly(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Candidates from all over the list, for ever; after a while each of them."""
    for i in itertools.count(1):
        yield candidates[int(i * GOLDEN % 1 * len(candidates))]


def likely(
    candidates: Sequence[Candidate],
    known: Mapping[Candidate, Figure | None],
    count: int,
    capacity: int | None,
) -> list[Candidate]:
    """The `count` candidates not yet known (None: refused) that are expected to fit and to have the shortest step."""
    left = [c for c in candidates if c not in known]
    seen = {c: f for c, f in known.items() if f is not None}
    if len(seen) < 2:
        return left[:count]
    words = sorted({w for c in candidates for w in _words(c)})
    x = np.array([_features(c, words) for c in seen])
    y = np.array([(math.log(f.step or 1.0), math.log(max(f.memory, 1))) for f in seen.values()])
    middle = y.mean(axis=0)
    near = np.exp(FOCUS * (y[:, :1].min() - y[:, :1]))  # what is slow anyway need not be told apart
    told = x.T @ (near * x) + RIDGE * near.sum() * np.eye(x.shape[1])
    weights = np.linalg.solve(told, x.T @ (near * (y - middle)))
    step, memory = (np.array([_features(c, words) for c in left]) @ weights + middle).T
    over = np.maximum(memory - math.log(capacity * MARGIN), 0.0) if capacity else np.zeros(len(left))
    order = sorted(range(len(left)), key=lambda i: (over[i] > 0, over[i] if over[i] > 0 else step[i], i))
    return [left[i] for i in order[:count]]


def _words(candidate: Candidate) -> list[str]:
    rules = candidate.rules.split(" | ") if candidate.rules else ["(the config's own)"]
    return [*rules, f"remat {candidate.remat}"]


def _features(candidate: Candidate, words: Sequence[str]) -> list[float]:
    sizes = dict(candidate.mesh)
    logs = [math.log2(sizes.get(a, 1)) for a in AXES] + [math.log2(candidate.accumulate)]
    scaled = [x / 4 for x in logs]
    mine = set(_words(candidate))
    squares = [a * b for a, b in itertools.combinations_with_replacement(scaled, 2)]
    return [1.0, *scaled, *squares, *(float(w in mine) for w in words)]
