"""Which candidates to trace where there are too many: those that a regression over the traced ones expects to be good.

The logarithms of the modelled step and of the predicted memory are fitted by a quadratic in the logarithms of the mesh's
axes and of the micro-batches, with a constant for each rule and each remat policy (ridge regression). The guess only decides
what is traced next: every figure that is shown comes from a trace. The same candidates give the same choice everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.search.found import Figure
from experiments.search.space import Candidate
from sharding.axes import AXES

GOLDEN = (math.sqrt(5) - 1) / 2
RIDGE = 1e-3
MARGIN = 1.05
"""Of the capacity: what is guessed to be a little above may fit."""


def spread(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """About `count` candidates from all over the list, with each chain of rules and each remat policy of it at least once."""
    seen: dict[tuple[str, str], list[Candidate]] = {}
    for c in candidates:
        seen.setdefault((c.rules, c.remat), []).append(c)
    firsts = [group[int(i * GOLDEN % 1 * len(group))] for i, group in enumerate(seen.values())]
    step = max(1, math.ceil(len(firsts) / count))
    places = (int(i * GOLDEN % 1 * len(candidates)) for i in itertools.count(1))
    chosen = dict.fromkeys(firsts[::step])
    while len(chosen) < min(count, len(candidates)):
        chosen[candidates[next(places)]] = None
    return list(chosen)


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
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ (y - middle))
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
