"""Candidates held to the compiler: memory and collectives of the compiled module, a step modelled from them, and regret.

The step is *modelled from compiled*: the collectives and what the compiled schedule hides of them are the module's, the ops
are those of the trace. It is no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.compilers.ask import Tell, compile_for
from experiments.plans.estimate import estimate, on_target
from experiments.run_config import Origin
from experiments.search.found import CompiledFigure, Regret, Row
from sharding.errors import InputError
from sharding.price.target import Target

if TYPE_CHECKING:
    from sharding.ledger import Collective
    from sharding.module.compiled import Emitted


def compiled_figure(path: Path, words: Sequence[str], target: Target, tell: Tell) -> CompiledFigure:
    """What the target's compiler makes of the config `path` with the overrides `words`."""
    try:
        made = compile_for(path, words, target, "manual", tell)
    except InputError as error:  # a limit of the compiler: the others are still of use
        return CompiledFigure(None, None, str(error))
    if made.refused:
        return CompiledFigure(made.refused.used, None, made.refused.message)
    from sharding.module.compiled import NOWHERE
    from sharding.price.standins import grid
    from sharding.price.timing import modelled

    experiment = Origin(path, tuple(words)).experiment()
    works = estimate(experiment, target).predicted.work
    step = None
    if all(c.axes != NOWHERE for c in made.collectives):  # whose links nobody knows
        lies = grid(on_target(experiment, target).mesh, target)
        step = modelled(
            works, together(made.collectives), target, lies, overlap=hidden(made.collectives)
        ).step
    return CompiledFigure(made.memory.total if made.memory else None, step, "")


def together(found: Sequence[Emitted]) -> list[Collective]:
    """One collective for each instruction of a compiled module: arrays that are moved together start once."""
    groups: dict[tuple[str, str, tuple[str, ...], int], list[Emitted]] = {}
    for c in found:
        groups.setdefault((c.instruction, c.kind, c.axes, c.times), []).append(c)
    return [
        replace(
            cs[0],
            dtype="uint8",
            shape=(sum(c.payload for c in cs) // cs[0].times,),
            bytes=sum(c.bytes for c in cs),
        )
        for cs in groups.values()
    ]


def hidden(found: Iterable[Emitted]) -> Mapping[tuple[tuple[str, ...], str], float]:
    """(axes, kind) -> the share of their bytes that the compiled schedule moves while other work runs."""
    whole: dict[tuple[tuple[str, ...], str], int] = {}
    beside: dict[tuple[tuple[str, ...], str], int] = {}
    for c in found:
        key = (c.axes, c.kind)
        whole[key] = whole.get(key, 0) + c.bytes
        beside[key] = beside.get(key, 0) + c.bytes * c.overlapped
    return {key: beside[key] / total for key, total in whole.items() if total}


def regret(rows: Sequence[Row], capacity: int | None) -> Regret | None:
    """What is lost by the first of the ranking, and by the best of the first few compiled, against the best of all: rows
    that were all compiled. None where none of them fits or has a step.
    """
    steps = {
        r.rank: r.compiled.step
        for r in rows
        if r.compiled and r.compiled.step is not None and r.compiled.fits(capacity)
    }
    if not steps:
        return None
    best = min(steps, key=lambda rank: (steps[rank], rank))
    first = min((r.rank for r in rows), default=0)
    lost: dict[int, float | None] = {}
    for few in (1, 2, 3, 5):
        tried = [steps[r.rank] for r in rows[:few] if r.rank in steps]
        lost[few] = min(tried, default=math.inf) / steps[best] - 1 if tried else None
    return Regret(
        compiled=sum(r.compiled is not None for r in rows),
        fit=len(steps),
        best=best,
        best_step=steps[best],
        predicted=steps[first] / steps[best] - 1 if first in steps else None,
        checked=lost,
    )
