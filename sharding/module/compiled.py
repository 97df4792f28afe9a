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

from sharding.ledger import Collective, asked_from, sent_bytes
from sharding.module.hlo import Computation, Groups, Instruction, Module, Shape
from sharding.scope import scope_of

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

WORK = (
    "fusion",
    "dot",
    "convolution",
    "custom-call",
    "while",
    "call",
    "conditional",
    "sort",
    "scatter",
    "reduce",
)
"""Opcodes of instructions that compute for a while, behind which a collective can be hidden."""

BETWEEN_SLICES = "_xla_megascale_transfer_type"
"""Attribute of a `send` to another TPU slice: the collective that it is part of."""

CUT = "all-reduce-scatter"
"""How a TPU's compiler calls a fusion, or the computation that it calls, in which a reduce-scatter is written as an all-reduce
whose result is cut; it sends what a reduce-scatter does."""

NOWHERE = ("?",)
"""Axes of groups that are no product of the mesh's axes."""


Place = tuple[Computation, int]
"""An instruction: its computation and its id."""


@dataclass(frozen=True)
class Emitted(Collective):
    """A collective of a compiled module, or one array of several that it moves together."""

    instruction: str = ""
    """Its name in the module: arrays that are moved together have one."""
    overlapped: bool = False
    """Whether the compiled schedule has other work between its start and its end."""


def compiled_collectives(module: Module, sizes: Mapping[str, int]) -> list[Emitted]:
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
        islands = math.prod(self.sizes.values()) // (self.module.partitions or math.prod(self.sizes.values()))
        across = across_islands(self.sizes, islands)
        self.across = {a: n for a, n in across.items() if n > 1}
        self.within = {a: n // across[a] for a, n in self.sizes.items()}
        self.seen: set[tuple[str, str]] = set()
        """Chain and kind of what stands in fusions: a TPU's asynchronous one repeats its collective in each of its parts."""

    def found(
        self, at: int, times: int, fused: str = "", hidden: bool = False, given: Sequence[Place] = ()
    ) -> Iterator[Emitted]:
        """Those of one computation that runs so many times, and of what it calls; `given`: its arguments, where known."""
        computation = self.module.computations[at]
        behind = set(_hidden(computation, self.module.schedule.get(at, ())))
        for i in computation.instructions.values():
            if i.opcode in KINDS:
                moved = [x for k in i.operands for x in self._parts(KINDS[i.opcode], computation, k, given)]
                yield from self._collective(i, moved, times, fused, hidden or i.id in behind)
            elif i.opcode == "send" and BETWEEN_SLICES in i.attributes:
                yield self._between_slices(computation, i, times, i.id in behind)
            elif i.opcode == "while":
                again = times * trips(self.module, computation, i)
                for inner in i.calls:
                    yield from self.found(inner, again, fused)
            elif not i.opcode.endswith(("-done", "-update")):
                for inner in i.calls:
                    called = self.module.computations[inner].name
                    name = next((n for n in (called, i.name) if n.startswith(CUT)), i.name)
                    name = name if i.opcode == "fusion" else fused
                    yield from self.found(
                        inner, times, name, i.id in behind, [(computation, k) for k in i.operands]
                    )

    def _collective(
        self, i: Instruction, given: list[Shape], times: int, fused: str, hidden: bool
    ) -> Iterator[Emitted]:
        kind = KINDS[i.opcode]
        if kind == "all-reduce" and fused.startswith(CUT):
            kind = "reduce-scatter"
        chain = i.attributes.get("chain_id", "")
        if fused and chain:
            if (chain, kind) in self.seen:
                return
            self.seen.add((chain, kind))
        if i.pairs:
            axes = axes_of_pairs(i.pairs, self.within)
            devices = math.prod(self.within[a] for a in axes)
        else:
            groups = i.groups or (tuple(range(math.prod(self.within.values()))),)
            axes, devices = axes_of(groups, self.within), len(groups[0])
        if devices == 1:
            return
        source, op = asked_from(i.stack, i.op_name.rpartition("/")[2] or i.opcode)
        scope = scope_of(i.op_name)
        if kind == "all-to-all" and len(given) == devices:  # one array, cut into a part for each device
            given = [Shape(given[0].dtype, (devices, *given[0].dims))]
        for shape in given:
            sent = sent_bytes(kind, shape.bytes, devices) * times
            yield Emitted(
                *(kind, axes, devices, shape.dtype, shape.dims, times, sent, source, scope.op or op, scope),
                instruction=i.name,
                overlapped=hidden or bool(chain),
            )

    def _between_slices(self, computation: Computation, i: Instruction, times: int, hidden: bool) -> Emitted:
        """What TPU slices exchange, each of which has a module of its own: the hosts carry it, as the attributes say."""
        kind = i.attributes[BETWEEN_SLICES].lower().replace("_", "-")
        kind = "permute" if kind in ("one-to-one", "collective-permute") else kind
        shape = computation.instructions[i.operands[0]].shape
        devices = math.prod(self.across.values())
        sent = sent_bytes(kind, shape.bytes, devices) * times
        source, op = asked_from(i.stack, i.op_name.rpartition("/")[2] or i.opcode)
        scope = scope_of(i.op_name)
        return Emitted(
            *(kind, tuple(self.across), devices, shape.dtype, shape.dims, times, sent, source),
            *(scope.op or op, scope, i.name, hidden),
        )

    def _parts(self, kind: str, computation: Computation, at: int, given: Sequence[Place]) -> Iterator[Shape]:
        """The arrays of an operand: those of a tuple, or what a reduction finds laid end to end in one array (on GPU)."""
        i = computation.instructions[at]
        if i.opcode == "parameter" and i.parameter < len(given):
            computation, at = given[i.parameter]
            i = computation.instructions[at]
        inner = self.module.computations[i.calls[0]] if i.opcode == "fusion" else computation
        made = inner.instructions[inner.root] if i.opcode == "fusion" else i
        if kind == "all-reduce" and made.opcode == "concatenate" and len(made.shape.dims) == 1:
            for k in made.operands:
                yield inner.instructions[k].shape
        else:
            yield from i.shape.leaves()


def across_islands(sizes: Mapping[str, int], islands: int) -> dict[str, int]:
    """Factor of each axis that lies across islands, as `sharding.mesh` lays it: the outermost axes are used up first."""
    across = {}
    for axis, n in sizes.items():
        across[axis] = math.gcd(islands, n)
        islands //= across[axis]
    return across


def _hidden(computation: Computation, order: Sequence[int]) -> Iterator[int]:
    """Instructions that start something asynchronous which ends after other work has been begun."""
    ends = {
        k: i.id
        for i in computation.instructions.values()
        if i.opcode.endswith("-done") or (i.opcode == "fusion" and "collective-done" in i.name)
        for k in i.operands
    }
    place = {i: at for at, i in enumerate(order)}
    for start, end in ends.items():
        if start in place and end in place:
            between = (computation.instructions[k] for k in order[place[start] + 1 : place[end]])
            if any(i.opcode in WORK and "collective" not in i.name for i in between):
                yield start


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


def axes_of_pairs(pairs: Sequence[tuple[int, int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a permutation moves anything from one device to another, outermost first."""
    shape = tuple(sizes.values())
    places = (np.unravel_index(ends, shape) for ends in pairs)
    moved = {d for dims in places for d, (a, b) in enumerate(dims) if a != b}
    return tuple(name for d, name in enumerate(sizes) if d in moved)


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


__all__ = [
    "BETWEEN_SLICES",
    "KINDS",
    "NOWHERE",
    "Emitted",
    "across_islands",
    "axes_of",
    "axes_of_pairs",
    "compiled_collectives",
    "trips",
]
