"""Every collective that XLA really emits, read from a compiled module: what the trace's list (`sharding.ledger`) is held to.

Under XLA's partitioner, and for models that know no names, this list is the only one.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sharding.hlo import Computation, Groups, Instruction, Module, Shape
from sharding.ledger import Collective, asked_from, sent_bytes

KINDS = {
    "all-reduce": "all-reduce",
    "all-reduce-start": "all-reduce",
    "all-gather": "all-gather",
    "all-gather-start": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "permute",
    "collective-permute-start": "permute",
    "collective-broadcast": "broadcast",
}
"""HLO opcode -> the collective it is. What ends an asynchronous one (`-done`) moves nothing."""

NOWHERE = ("?",)
"""Axes of groups that are no product of the mesh's axes."""


def compiled_collectives(module: Module, sizes: Mapping[str, int]) -> list[Collective]:
    """Every collective in a compiled module over more than one device, in the order of its computations; loops count their
    trips, and every branch of a conditional counts. `sizes`: the mesh's axes, outermost first; XLA numbers devices in
    this order. A loop whose trips the module does not tell counts once.
    """
    return list(_Reading(module, sizes).found(module.entry, 1))


@dataclass
class _Reading:
    """One pass over a module."""

    module: Module
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        self.seen: set[tuple[int, str]] = set()
        """Channel and kind of what stands in fusions: XLA repeats such a collective in each part of an asynchronous one."""

    def found(self, at: int, times: int, fused: str = "") -> Iterator[Collective]:
        computation = self.module.computations[at]
        for i in computation.instructions.values():
            if i.opcode in KINDS:
                yield from self._collective(computation, i, times, fused)
            elif i.opcode == "while":
                again = times * trips(self.module, computation, i)
                for inner in i.calls:
                    yield from self.found(inner, again, fused)
            elif not i.opcode.endswith(("-done", "-update")):
                name = i.name if i.opcode == "fusion" else fused
                for inner in i.calls:
                    yield from self.found(inner, times, name)

    def _collective(
        self, computation: Computation, i: Instruction, times: int, fused: str
    ) -> Iterator[Collective]:
        kind = KINDS[i.opcode]
        if fused and kind == "all-reduce" and fused.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # TPU writes it as an all-reduce whose result is cut in the same fusion
        if fused and i.channel:
            if (i.channel, kind) in self.seen:
                return
            self.seen.add((i.channel, kind))
        groups = (
            _of_pairs(i.pairs) if i.pairs else i.groups or (tuple(range(math.prod(self.sizes.values()))),)
        )
        axes = axes_of(groups, self.sizes)
        n = len(groups[0])
        if n == 1:
            return
        devices = math.prod(self.sizes[a] for a in axes) if axes != NOWHERE else n
        source, op = asked_from(i.stack, i.op_name.rpartition("/")[2] or i.opcode)
        given = [x for k in i.operands for x in computation.instructions[k].shape.leaves()]
        if kind == "all-to-all" and len(given) == n:  # one array, cut into a part for each device
            given = [Shape(given[0].dtype, (n, *given[0].dims))]
        for shape in given:
            sent = sent_bytes(kind, shape.bytes, devices) * times
            yield Collective(kind, axes, devices, shape.dtype, shape.dims, times, sent, source, op)


def axes_of(groups: Groups, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes over which the devices of each group differ, outermost first; `NOWHERE` when groups are none of these."""
    shape = tuple(sizes.values())
    places = np.arange(math.prod(shape)).reshape(shape)
    wanted = {frozenset(g) for g in groups}
    used = [d for d, n in enumerate(shape) if n > 1]
    for count in range(1, len(used) + 1):
        for dims in itertools.combinations(used, count):
            if math.prod(shape[d] for d in dims) != len(groups[0]):
                continue
            rest = [d for d in range(len(shape)) if d not in dims]
            rows = places.transpose(*rest, *dims).reshape(-1, len(groups[0]))
            if {frozenset(int(p) for p in row) for row in rows} == wanted:
                names = tuple(sizes)
                return tuple(names[d] for d in dims)
    return NOWHERE


def _of_pairs(pairs: Sequence[tuple[int, int]]) -> Groups:
    """The devices that a permutation joins, whichever way round."""
    joined: dict[int, set[int]] = {}
    for a, b in pairs:
        both = joined.get(a, {a}) | joined.get(b, {b})
        for device in both:
            joined[device] = both
    return tuple({tuple(sorted(group)) for group in joined.values()})


def trips(module: Module, computation: Computation, loop: Instruction) -> int:
    """How often a `while` runs: what the compiler notes, or else the constant that its counter is compared with; 1 where
    neither is there, as where it depends on data.
    """
    try:
        noted = json.loads(loop.config or b"{}").get("known_trip_count", {}).get("n")
    except ValueError:  # a backend's own bytes
        noted = None
    if noted is not None:
        return int(noted)
    condition = next(
        (
            c
            for c in (module.computations[k] for k in loop.calls)
            if c.instructions[c.root].shape.dtype == "bool"
        ),
        None,
    )
    return _counted(module, computation, loop, condition) if condition else 1


def _counted(module: Module, computation: Computation, loop: Instruction, condition: Computation) -> int:
    """From `counter < constant`, where the counter begins with a constant: lax.scan counts by one."""
    test = condition.instructions[condition.root]
    while (
        test.opcode in ("fusion", "call") and test.calls
    ):  # the comparison may stand in a fusion, with the same operands
        inner = module.computations[test.calls[0]]
        given = [condition.instructions[k] for k in test.operands]
        test = inner.instructions[inner.root]
        sides = [_outside(inner.instructions[k], given) for k in test.operands]
        return _until(computation, loop, test, sides)
    return _until(computation, loop, test, [condition.instructions[k] for k in test.operands])


def _outside(i: Instruction, given: Sequence[Instruction]) -> Instruction:
    return given[i.parameter] if i.opcode == "parameter" else i


def _until(
    computation: Computation, loop: Instruction, test: Instruction, sides: Sequence[Instruction]
) -> int:
    if test.opcode != "compare" or test.direction != "LT" or len(sides) != 2:
        return 1
    counter, end = sides
    if counter.opcode != "get-tuple-element" or end.number is None:
        return 1
    begun = computation.instructions[loop.operands[0]]
    first = computation.instructions[begun.operands[counter.element]] if begun.opcode == "tuple" else None
    while first is not None and first.opcode == "copy":
        first = computation.instructions[first.operands[0]]
    return max(end.number - (first.number or 0), 0) if first is not None else end.number


__all__ = ["KINDS", "NOWHERE", "axes_of", "compiled_collectives", "trips"]
