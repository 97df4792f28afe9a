"""Searching for a split: prune by layouts, estimate what is left on all cores, compile the best few, pick.

Data flows config -> space -> figures -> ranked rows -> compiled figures -> pick. Nothing runs, and no device is needed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from experiments.config import Experiment
from experiments.run_config import Origin
from experiments.search.compiled import compiled_figure, regret
from experiments.search.found import CompiledFigure, Figure, Found, Row
from experiments.search.guess import likely, spread
from experiments.search.layouts import count, short
from experiments.search.pool import Pool, Said, cores, measured
from experiments.search.pruning import Space, space
from experiments.search.ranking import picked, ranked, said
from experiments.search.space import Candidate, Choices, words
from sharding.errors import InputError
from sharding.price.target import Target

Tell = Callable[[str], None]

ROUND = 32
"""Candidates that are traced before the next are chosen: of a fixed number, so that the choice is the same on any machine."""
SEEDS = 3
"""One part in so many of the candidates traced is chosen before anything is known of any."""
LESS = 1.25
"""Of the capacity: up to where a predicted memory may turn out to fit when it is compiled."""
EXHAUSTIVE = 64
"""Candidates that an exhaustive compilation takes on."""


@dataclass(frozen=True)
class Wanted:
    """How thorough a search is."""

    most: int = 200
    """Candidates that are traced; where there are more, those that are likely to be good."""
    compile: int = 3
    """Of the best, how many are compiled."""
    exhaustive: bool = False
    """Whether every candidate is compiled, to see what the search loses."""
    jobs: int = 0
    """Processes that trace; 0: one for each core."""


def search(
    origin: Origin,
    experiment: Experiment,
    target: Target,
    choices: Choices,
    wanted: Wanted = Wanted(),
    tell: Tell = lambda text: None,
) -> Found:
    """Search for the split of a config (`origin`, whose value is `experiment`) with the shortest modelled step that fits.

    Raises InputError where nothing can be laid out at all, and where more would be compiled than EXHAUSTIVE.
    """
    began, took = time.monotonic(), {}
    if target.platform == "cpu" and target.machine.memory_bandwidth is None:
        tell(f"measuring what {target.describe()} do on this machine")
        target = measured(target)
        took["measure"] = time.monotonic() - began
    began = time.monotonic()
    found = space(experiment, target, choices)
    took["lay out"] = time.monotonic() - began
    jobs = wanted.jobs or cores()
    tell(
        f"{found.considered} meshes with rules, {sum(found.fallen.values())} fell; {len(found.candidates)} candidates"
    )
    if wanted.exhaustive and len(found.candidates) > EXHAUSTIVE:
        raise InputError(
            f"--exhaustive would compile {len(found.candidates)} candidates, but it takes on {EXHAUSTIVE} at most. Narrow the "
            f"search with --axes, --remat, --microbatches or --chains, or take a smaller target."
        )
    began = time.monotonic()
    making = functools.partial(_words, experiment=experiment, given=origin.overrides, target=target)
    known = _estimated(found, origin, target, wanted, jobs, making, tell)
    took["estimate"] = time.monotonic() - began
    rows = ranked(known, making, experiment, target)
    began = time.monotonic()
    rows, lacks = _compiled(rows, origin, target, wanted, tell)
    took["compile"] = time.monotonic() - began
    pick, says = picked(rows, target)
    refused = count(short(s) for s in known.values() if isinstance(s, str))
    if not rows:
        says = f"No candidate could be traced: {next(iter(refused), '')}."
    return Found(
        config=str(origin.path),
        target=target.text,
        devices=target.describe(),
        capacity=target.machine.memory,
        splits=found.considered,
        fallen=found.fallen,
        candidates=len(found.candidates),
        estimated=len(known),
        refused=refused,
        rows=rows,
        pick=pick,
        says=says,
        seconds=took,
        jobs=jobs,
        missing=tuple(lacks),
        regret=regret(rows, target.machine.memory) if wanted.exhaustive else None,
    )


def _words(
    candidate: Candidate, experiment: Experiment, given: Sequence[str], target: Target
) -> tuple[str, ...]:
    """A candidate's overrides, those for the target's devices among them."""
    devices = experiment.devices
    more: list[str] = []
    if target.platform == "tpu" and experiment.mesh.slices != target.islands:
        more += ["--mesh.slices", str(target.islands)]
    kind = "pretend" if target.platform == "cpu" else "present"
    if devices.kind != kind or devices.count not in (-1, target.devices):
        more += ["--devices.kind", kind, "--devices.count", str(target.devices)]
    return words(candidate, experiment, given, more)


def _estimated(
    found: Space,
    origin: Origin,
    target: Target,
    wanted: Wanted,
    jobs: int,
    making: Callable[[Candidate], tuple[str, ...]],
    tell: Tell,
) -> dict[Candidate, Said]:
    """Figures of all candidates, or of the `most` that are likely to be good, round by round."""
    every, capacity = found.candidates, target.machine.memory
    whole = len(every) <= wanted.most
    known: dict[Candidate, Said] = {}
    turn = list(every) if whole else spread(every, max(wanted.most // SEEDS, 1))
    with Pool(origin.path, target, min(jobs, len(turn))) as pool:
        while turn:
            for at in range(0, len(turn), ROUND):
                part = turn[at : at + ROUND]
                known.update(zip(part, pool.figures([making(c) for c in part]), strict=True))
                tell(_so_far(known, min(wanted.most, len(every)), capacity))
            left = min(wanted.most, len(every)) - len(known)
            seen = {c: s if isinstance(s, Figure) else None for c, s in known.items()}
            turn = likely(every, seen, min(ROUND, left), capacity) if left > 0 else []
    return known


def _so_far(known: Mapping[Candidate, Said], of: int, capacity: int | None) -> str:
    fit = [f for f in known.values() if isinstance(f, Figure) and (capacity is None or f.memory <= capacity)]
    best = min((f.step for f in fit if f.step is not None), default=None)
    told = f", best modelled step {best:.4g} s" if best is not None else ""
    return f"estimated {len(known)} of {of}: {len(fit)} fit{told}"


def _compiled(
    rows: tuple[Row, ...], origin: Origin, target: Target, wanted: Wanted, tell: Tell
) -> tuple[tuple[Row, ...], list[str]]:
    """The rows with compiled figures of the best: `compile` of them, and up to as many again while none of them fits."""
    from experiments.compilers.ask import missing

    limit, capacity = len(rows) if wanted.exhaustive else wanted.compile, target.machine.memory
    lacks = missing(target) if limit else ""
    if lacks:
        return rows, [f"compiled figures: {lacks}"]
    made: dict[int, CompiledFigure] = {}
    while len(made) < (limit if any(f.fits(capacity) for f in made.values()) else 2 * limit):
        row = following(rows, made, None if wanted.exhaustive else capacity)
        if row is None:
            break
        tell(f"compiling candidate {row.rank}: {said(row)}")
        made[row.rank] = compiled_figure(origin.path, row.words, target, tell)
    return tuple(replace(row, compiled=made.get(row.rank)) for row in rows), []


def following(rows: Sequence[Row], made: Mapping[int, CompiledFigure], capacity: int | None) -> Row | None:
    """The next row to compile: the best that is expected to fit `capacity` if the compiler takes as much more than predicted as
    it did for the worst of those `made` (rank -> figure); where none is, the next that fits if the compiler takes less. None
    where there is nothing left that could fit.
    """
    left = [row for row in rows if row.rank not in made]
    over = [
        f.memory / row.figure.memory
        for row in rows
        if (f := made.get(row.rank)) is not None and f.memory is not None
    ]
    more = max([1.0, *over])
    fit = (row for row in left if capacity is None or row.figure.memory * more <= capacity)
    near = (row for row in left if capacity is None or row.figure.memory <= capacity * LESS)
    return next(fit, next(near, None))
