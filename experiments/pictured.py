"""What a picture of a split needs beyond where arrays lie: the order of positions, and records that a figure reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.config import Experiment, config_hash
from experiments.records import Header, Records, installed_versions
from sharding.axes import nearest
from sharding.errors import InputError

if TYPE_CHECKING:
    from experiments.explanation import Explanation
    from sharding.step import TrainStep

FOLLOW = {"length": ("length", "queries", "keys")}
"""Names whose positions lie as those of another: attention calls a sequence's positions queries and keys."""


@dataclass(frozen=True)
class Ordered:
    """A dim whose positions do not lie in their natural order (`sharding.order`)."""

    names: tuple[str, ...]
    """What the dim is called."""
    size: int
    order: str
    axis: str
    """The axis whose devices the order is for."""
    runs: tuple[tuple[int, int, int], ...]
    """(where it lies, natural position, count) of each run of neighbours that lie as neighbours."""


def orders(step: TrainStep, dims: Iterable[tuple[str, int]]) -> tuple[Ordered, ...]:
    """Of dims (name, size), those that a rule of the step lays in an order of its own. Under XLA's partitioner none."""
    import numpy as np

    from sharding.partitioner import Manual

    made: list[Ordered] = []
    for name, size in dict.fromkeys(dims) if isinstance(step.split.partitioner, Manual) else ():
        order, parts = step.split.layouts.order(name)
        if order is None:
            continue
        at = np.asarray(order.position(np.arange(size), size, parts))
        starts = [0, *(np.flatnonzero(np.diff(at) != 1) + 1).tolist(), size]
        runs = tuple((a, int(at[a]), b - a) for a, b in itertools.pairwise(starts))
        made.append(Ordered(FOLLOW.get(name, (name,)), size, repr(order), order.axis, runs))
    return tuple(made)


def inside_attention(
    asked: Iterable[tuple[str, ...]], sizes: Mapping[str, int]
) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Names and global shape of the arrays that attention laid out by `queries` or `keys`, of all names `asked` for."""
    known = {**sizes, **{n: sizes[to] for to, names in FOLLOW.items() if to in sizes for n in names}}
    return [
        (names, tuple(known[n] for n in names))
        for names in asked
        if {"queries", "keys"} & set(names) and set(names) <= set(known)
    ]


def check_drawn(told: Explanation, draw: tuple[str, ...]) -> None:
    """InputError for a wanted array that there is not."""
    known = dict.fromkeys(x for line in told.lines for x in (line.path, " ".join(line.names)) if x)
    for wanted in draw:
        if wanted not in known:
            raise InputError(
                f"--draw {wanted!r}: there is no such array{nearest(wanted, [*known])}. Give the path of a parameter or of a "
                f"batch entry, or all names of an activation, as `shardlab explain` lists them."
            )


def write_records(
    path: Path | None, experiment: Experiment, told: Explanation, draw: tuple[str, ...], command: str
) -> None:
    """Append an explanation to a file of records: a header, and a record of kind `layout` for each array.

    `shardlab figures split` draws of it the arrays `draw`, by path or by names, or chooses. Provenance "modelled": rules and
    shapes say so, nothing ran. No path writes nothing.
    """
    if path is None:
        return
    digest = config_hash(experiment)
    header = Header(
        run=f"{told.name}-{digest[:8]}",
        config_hash=digest,
        seed=experiment.seed,
        versions=installed_versions(),
        device={"platform": "none", "kind": "traced", "count": math.prod(told.mesh.values()), "processes": 1},
        mesh=told.mesh,
        details={
            "name": told.name,
            "rules": told.rules,
            "partitioner": told.partitioner,
            "parameters": told.parameters,
            "bytes_per_device": told.bytes_per_device,
            "orders": [asdict(o) for o in told.orders],
            "draw": draw,
            "command": command,
        },
    )
    with Records(path, header) as records:
        for line in told.lines:
            records.write("layout", "modelled", asdict(line))
