"""What could be changed so that a step fits the memory of its devices: each change tried by prediction, cheapest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from experiments.config import Experiment
from experiments.plans.estimate import estimate
from experiments.plans.planned import Change
from experiments.run_config import Origin
from sharding.errors import InputError
from sharding.remat import WHOLE

if TYPE_CHECKING:
    from sharding.price.target import Target

MOST = 12
"""Changes tried, since each is traced."""


def changes(origin: Origin, here: Experiment, target: Target, capacity: int) -> tuple[Change, ...]:
    """Changes after which the predicted step fits `capacity` bytes, the least modelled step time first.

    Single ones; only where none is enough, pairs of those that took the most.
    """
    tried = [
        made for words in itertools.islice(_single(here), MOST) if (made := _tried(origin, words, target))
    ]
    fit = [c for c in tried if c.total <= capacity]
    if not fit:
        best = sorted(tried, key=lambda c: c.total)[:4]
        pairs = [(a.words, b.words) for a, b in itertools.combinations(best, 2) if a.words[0] != b.words[0]]
        both = (_tried(origin, (*a, *b), target) for a, b in pairs)
        fit = [c for c in both if c and c.total <= capacity]
    return tuple(sorted(fit, key=lambda c: (c.step is None, c.step or 0.0, c.total)))


def _tried(origin: Origin, words: tuple[str, ...], target: Target) -> Change | None:
    try:
        changed = Origin(origin.path, (*origin.overrides, *words)).experiment()
        made = estimate(changed, target)
    except InputError:  # it does not divide, or this config has no such thing
        return None
    return Change(words, made.predicted.memory.total, made.modelled.step)


def _single(here: Experiment) -> Iterator[tuple[str, ...]]:
    """Changes that spend time for memory, as overrides."""
    sizes = here.mesh.sizes()
    model: Any = here.model  # each kind has sizes of its own
    if hasattr(model, "remat"):
        for name in WHOLE[WHOLE.index(model.remat) + 1 :] if model.remat in WHOLE else WHOLE[1:]:
            yield ("--model.remat", name)
    for times in (2, 4, 8):
        yield ("--accumulate", str(here.accumulate * times))
    for source in ("replica", "data"):  # whole copies of the state become parts of it
        if sizes[source] > 1:
            yield (f"--mesh.{source}", "1", "--mesh.fsdp", str(sizes["fsdp"] * sizes[source]))
    if getattr(here.optimizer, "memory", "") == "device":
        yield ("--optimizer.memory", "host")
    if getattr(here.optimizer, "mean_dtype", "") == "float32":
        yield ("--optimizer.mean-dtype", "bfloat16")
    if getattr(model, "loss_chunk", None) == 0 and hasattr(model, "length"):
        yield ("--model.loss-chunk", str(max(model.length // 8, 1)))
