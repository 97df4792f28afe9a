"""The space of a search: every mesh with every chain of rules that lays the model's arrays on it. No step is traced for it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from experiments.config import Experiment
from experiments.expressions import parse_rules
from experiments.search.layouts import Arrays, Laid, Unfit, arrays_of, axes_used, count, lay, useful
from experiments.search.space import Candidate, Choices, covers, expressions, library, meshes, replicas
from sharding.axes import AXES
from sharding.errors import InputError
from sharding.finding import human
from sharding.price.target import Target
from sharding.rule import Rules

SAME = "the same split as another chain of rules"
TOO_LARGE = "parameters and optimizer alone are larger than a device's memory"


@dataclass(frozen=True)
class Split:
    """A mesh and a chain of rules that lays the model's arrays on it."""

    mesh: tuple[tuple[str, int], ...]
    rules: str
    rows: int
    """Parts that the batch is split into."""


@dataclass(frozen=True)
class Space:
    """Everything that may be traced."""

    considered: int
    fallen: Mapping[str, int]
    candidates: tuple[Candidate, ...]


def space(experiment: Experiment, target: Target, choices: Choices) -> Space:
    """Every candidate whose arrays can be laid out, the config's own chain before those of the library."""
    arrays = arrays_of(experiment)
    fallen: list[str] = []
    splits: list[Split] = []
    least = 0
    for mesh, chains in _considered(experiment, target, choices, arrays):
        seen: set[tuple[object, ...]] = set()
        for made in chains:
            laid = _first(made, mesh, experiment, arrays)
            if isinstance(laid, str):
                fallen.append(laid)
            elif laid[1].dims in seen:
                fallen.append(SAME)
            elif target.machine.memory is not None and laid[1].state > target.machine.memory:
                fallen.append(TOO_LARGE)
                least = min(least or laid[1].state, laid[1].state)
            else:
                seen.add(laid[1].dims)
                splits.append(Split(tuple((a, n) for a, n in mesh.items() if n > 1), laid[0], laid[1].rows))
    candidates = tuple(
        Candidate(s.mesh, s.rules, remat, times)
        for s in splits
        for remat in choices.remats
        for times in choices.accumulates
        if experiment.batch % (s.rows * times) == 0
    )
    if not candidates:
        most = "; ".join(f"{reason} ({n})" for reason, n in list(count(fallen).items())[:3])
        most += f": {human(least)} at least, of {human(target.machine.memory or 0)}" if least else ""
        raise InputError(
            f"No split of {experiment.name} over {target.describe()} can be laid out with the axes "
            f"{', '.join(choices.axes)}: {most or 'no rule uses any of these axes'}. Name other --axes, change the batch or "
            f"the model's sizes, or take a target of another size."
        )
    return Space(len(splits) + len(fallen), count(fallen), candidates)


def _considered(
    experiment: Experiment, target: Target, choices: Choices, arrays: Arrays
) -> Iterator[tuple[dict[str, int], list[list[str]]]]:
    """Each mesh with the chains that cover it, a chain as the expressions to be tried in turn."""
    known = [r for r in library() if set(r.axes) <= set(choices.axes) and useful(r.rules, arrays)]
    known += [r for r in replicas(target.islands, known) if "replica" in choices.axes]
    own = set() if choices.chains == "library" else axes_used(experiment.rules, arrays) & set(choices.axes)
    known = [] if choices.chains == "own" else known
    kept = " | ".join(r.call for r in experiment.rules.chain if r.replicated)
    axes = [a for a in AXES if a in own or any(a in r.axes for r in known)]
    for mesh in meshes(target.devices, axes):
        used = [a for a in axes if mesh[a] > 1]
        chains = [[""]] if set(used) <= own else []
        if mesh.get("replica", 1) in (1, target.islands):
            chains += [_chain(cover, kept) for cover in covers(used, known) if _once(cover)]
        if chains:
            yield mesh, chains


def _once(cover: Sequence[Sequence[str]]) -> bool:
    """Whether whole copies lie on one axis: on two they are those of one larger axis."""
    return not {"data", "data(axis='replica')"} <= {calls[0] for calls in cover}


def _chain(cover: Sequence[Sequence[str]], kept: str) -> list[str]:
    return [" | ".join(filter(None, (chain, kept))) or repr(Rules()) for chain in expressions(cover)]


def _first(
    chains: Sequence[str], mesh: Mapping[str, int], experiment: Experiment, arrays: Arrays
) -> tuple[str, Laid] | str:
    """The first of these chains that lays the arrays on the mesh, or why the first of them does not."""
    why = ""
    for chain in chains:
        try:
            return chain, lay(_parsed(chain) if chain else experiment.rules, mesh, arrays)
        except Unfit as error:
            why = why or str(error)
    return why


@functools.cache
def _parsed(chain: str) -> Rules:
    return parse_rules(chain)
