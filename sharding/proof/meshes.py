"""Which meshes a chain of rules can use: every shape of up to so many devices whose axes some array can be split over."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

from sharding.axes import AXES, MeshShape
from sharding.params import ParamSpec
from sharding.rule import PARAM_ROLES, ROLES, Ask, Rules, Split


def axes_of(
    rules: Rules, tree: Mapping[str, ParamSpec], inputs: Iterable[tuple[str, ...]]
) -> tuple[str, ...]:
    """The mesh axes that the rules speak of, outermost first: those in their mappings, and those that their functions
    place on a parameter of `tree` or on an entry of a batch, whose names `inputs` gives.
    """
    found: set[str] = set()
    twos: dict[str, int] = dict.fromkeys(AXES, 2)
    asks = [
        Ask(path, role, spec.names, spec.shape, ((),) * len(spec.names), twos)
        for path, spec in tree.items()
        for role in PARAM_ROLES
    ]
    asks += [Ask("", "activation", names, None, ((),) * len(names), twos) for names in inputs]
    for rule in rules.chain:
        for role in ROLES:
            placing = getattr(rule, role)
            if isinstance(placing, Mapping):
                found |= {s.axis if isinstance(s, Split) else s for s in placing.values()}
        for ask in asks:
            found |= {split.axis for split in rule.place(ask).values()}
    return tuple(a for a in AXES if a in found)


def shapes(axes: tuple[str, ...], devices: int) -> list[MeshShape]:
    """Every mesh over `axes` of two to `devices` devices, the largest first."""
    sizes = itertools.product(range(1, devices + 1), repeat=len(axes))
    fits = sorted((s for s in sizes if 1 < math.prod(s) <= devices), key=lambda s: (-math.prod(s), s[::-1]))
    return [MeshShape.of(*zip(axes, s, strict=True)) for s in fits]
