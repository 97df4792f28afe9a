"""What `search` chooses from: meshes, chains of rules, remat, micro-batches, each candidate with the words that make it.

Rules are found by their place: a file of sharding/rules/ whose arguments all have defaults goes onto the mesh axes that these
name, so a rule added there is searched with no further word. A mesh is covered by one rule for each axis of more than one
device (a rule may cover two); a rule that only fills what others leave free (`sequence`) may come on top. No jax here.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import sharding.rules
from experiments.config import Experiment
from experiments.overrides import groups, plain
from sharding.axes import AXES, MeshShape, nearest
from sharding.errors import InputError
from sharding.remat import WHOLE, parse_remat
from sharding.rule import ROLES, Rule, Rules

ORDER = ("replica", "data", "fsdp", "tensor", "context", "expert", "stage")
"""In which rules are chained: `ulysses` goes on from the heads that `tensor` splits, `expert` from the batch."""


@dataclass(frozen=True)
class Library:
    """A rule of sharding/rules/ as it can be searched."""

    name: str
    axes: tuple[str, ...]
    """The mesh axes that its arguments name by default."""
    calls: tuple[str, ...]
    """Expressions of it: as it is, then with each other value of an option, for where it does not divide."""
    fills: bool
    """Whether it only fills what other rules leave free, and so comes on top of them."""
    rules: Rules


@dataclass(frozen=True)
class Candidate:
    """One split of training, complete."""

    mesh: tuple[tuple[str, int], ...]
    """The axes of more than one device, outermost first."""
    rules: str
    """The chain as an expression; "" for the config's own."""
    remat: str
    """"" where the model has no such policy."""
    accumulate: int

    def shape(self) -> MeshShape:
        """Its mesh."""
        return MeshShape.of(*self.mesh)


@dataclass(frozen=True)
class Choices:
    """What is varied, each along its own line."""

    axes: tuple[str, ...]
    remats: tuple[str, ...]
    accumulates: tuple[int, ...]
    chains: Literal["all", "library", "own"]


def choices(
    experiment: Experiment,
    axes: Sequence[str] = (),
    remats: Sequence[str] = (),
    accumulates: Sequence[int] = (),
    chains: Literal["all", "library", "own"] = "all",
) -> Choices:
    """What a search of this experiment varies; what is not given is every axis that some rule uses, the three remat policies
    and the config's own, and 1 to 8 micro-batches and the config's own. InputError for what does not exist.
    """
    for axis in axes:
        if axis not in AXES:
            raise InputError(
                f"--axes names an axis {axis!r}, which does not exist{nearest(axis, AXES)}. The axes are {', '.join(AXES)}."
            )
    for count in accumulates:
        if count < 1 or experiment.batch % count:
            raise InputError(
                f"--microbatches {count}: a batch of {experiment.batch} rows does not divide into {count} micro-batches. Give "
                f"divisors of the batch, or change --batch."
            )
    own = getattr(experiment.model, "remat", "")
    if remats and not own:
        raise InputError(
            f"--remat is given, but {type(experiment.model).__name__} has no remat policy. Leave it out."
        )
    for policy in remats:
        parse_remat(policy)
    counts = accumulates or [n for n in (1, 2, 4, 8) if experiment.batch % n == 0]
    return Choices(
        tuple(dict.fromkeys(axes or AXES)),
        tuple(dict.fromkeys(remats or ((own, *WHOLE) if own else ("",)))),
        tuple(dict.fromkeys(counts if accumulates else [experiment.accumulate, *counts])),
        chains,
    )


def library() -> tuple[Library, ...]:
    """The rules of sharding/rules/ that stand alone and name axes by default; not a pipeline's, which its schedule brings."""
    found = (_library(m.name) for m in pkgutil.iter_modules(sharding.rules.__path__))
    return tuple(rule for rule in found if rule is not None)


def _library(name: str) -> Library | None:
    factory = getattr(importlib.import_module(f"sharding.rules.{name}"), name)
    given = inspect.signature(factory).parameters.values()
    axes = tuple(p.default for p in given if p.default in AXES)
    if (
        not axes
        or axes == ("stage",)
        or any(p.default is p.empty for p in given if p.kind is not p.VAR_KEYWORD)
    ):
        return None
    made: Rules = factory()
    if len(made.chain) != 1:  # its parts are rules of their own
        return None
    hints = get_type_hints(factory)
    options = [
        f"{name}({p.name}={value!r})"
        for p in given
        if get_origin(hints.get(p.name)) is Literal
        for value in get_args(hints[p.name])
        if value != p.default
    ]
    return Library(name, axes, (name, *options), _fills(made.chain[0]), made)


def _fills(rule: Rule) -> bool:
    """Whether every placement of a rule gives way to others."""
    tables = [table for role in ROLES if (table := getattr(rule, role))]
    splits = [s for t in tables if isinstance(t, Mapping) for s in t.values()]
    return bool(splits) and all(
        isinstance(t, Mapping)
        and all(getattr(s, "when_taken", "error").endswith("decline") for s in t.values())
        for t in tables
    )


def meshes(devices: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """Every way to write `devices` as a product of sizes of these axes, axis -> size."""
    if not axes:
        if devices == 1:
            yield {}
        return
    for size in range(1, devices + 1):
        if devices % size == 0:
            for rest in meshes(devices // size, axes[1:]):
                yield {axes[0]: size, **rest}


def covers(used: Sequence[str], known: Sequence[Library]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """Chains that cover exactly these axes, as the expressions of each rule: the first of each is tried before the others."""
    for mains in _mains(tuple(used), [r for r in known if not r.fills]):
        on_top = [r for r in known if r.fills and set(r.axes) <= set(used)]
        for count in range(len(on_top) + 1):
            for more in itertools.combinations(on_top, count):
                yield tuple(r.calls for r in (*sorted(mains, key=_place), *more))


def _mains(left: tuple[str, ...], known: Sequence[Library]) -> Iterator[tuple[Library, ...]]:
    if not left:
        yield ()
        return
    for rule in known:
        if left[0] in rule.axes and set(rule.axes) <= set(left):
            for rest in _mains(tuple(a for a in left if a not in rule.axes), known):
                yield (rule, *rest)


def _place(rule: Library) -> int:
    return max(ORDER.index(a) for a in rule.axes)


def expressions(cover: Sequence[Sequence[str]]) -> Iterator[str]:
    """The chains that a cover stands for, the rules as they are first."""
    yield from (" | ".join(calls) for calls in itertools.product(*cover))


def replicas(islands: int, known: Sequence[Library]) -> tuple[Library, ...]:
    """What goes onto `replica`, the axis across slices: `data` there."""
    own = [r for r in known if r.name == "data"] if islands > 1 else []
    return tuple(Library("data", ("replica",), ("data(axis='replica')",), False, r.rules) for r in own)


def words(
    candidate: Candidate, experiment: Experiment, given: Sequence[str], more: Sequence[str]
) -> tuple[str, ...]:
    """The overrides that make a candidate of the config whose value, with the overrides `given`, is `experiment`; `more`:
    what the target asks for besides. What they set anew is left out of `given`.
    """
    now, sizes = experiment.mesh.sizes(), candidate.shape().sizes()
    made = [(f"--mesh.{a}", str(n)) for a, n in sizes.items() if n != 1 or now[a] != 1]
    if candidate.rules:
        made.append(("--rules", candidate.rules))
    if candidate.remat and candidate.remat != getattr(experiment.model, "remat", ""):
        made.append(("--model.remat", candidate.remat))
    if candidate.accumulate != experiment.accumulate:
        made.append(("--accumulate", str(candidate.accumulate)))
    made += groups(more)
    anew = {plain(group[0]) for group in made}
    kept = [group for group in groups(given) if plain(group[0]) not in anew]
    return tuple(word for group in (*kept, *made) for word in group)


def devices_of(mesh: Sequence[tuple[str, int]]) -> int:
    """Devices of a candidate's mesh."""
    return math.prod(n for _, n in mesh)
