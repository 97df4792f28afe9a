"""Which elementwise ops run together, and what such a run reads from memory and writes to it: the assumption on fusion.

An elementwise op joins the first of the ops that read its result, and with it those that made its operands, unless a
product, a collective, a gather, a sort, a loop or the end of a reduction lies between. A run reads each array from outside
it once and writes what is used outside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp

from sharding.scope import Scope, scope_of


@dataclass(frozen=True)
class Work:
    """One op of the step, or one run of elementwise ops, on one device; figures are of a single time."""

    kind: str
    """"product", "convolution", "gather", "collective", "elementwise" or the primitive's name."""
    dtype: str
    """Of the operands of a product, of the largest result otherwise."""
    precision: str
    """That a product asks for: "", "high", "highest"; see `sharding.price.machine.product_rate`."""
    flops: int
    """Of a product or convolution, 2 a multiply-add; 0 otherwise."""
    bytes: int
    """Read and written."""
    times: int
    """How often in a step."""
    scope: Scope = Scope()


@dataclass(eq=False)
class Value:
    """An array: its bytes, and the run of elementwise ops that makes it, where one does."""

    bytes: int
    """Of the whole array, see `parts`."""
    dtype: str
    node: int = -1
    level: int = 0
    of: Value | None = None
    """What this is a part of."""
    kept: bool = False
    """Whether something outside its run reads it, so that it is written to memory."""
    parts: int = 1
    """Into how many it is split over the devices, outside the manual region, where shapes are those of all devices."""

    @property
    def elements(self) -> float:
        return self.bytes / max(1, jnp.dtype(self.dtype).itemsize if self.dtype in _NUMBERS else 1)

    @property
    def local(self) -> int:
        """Bytes on a device."""
        return self.bytes // self.parts

    def whole(self) -> Value:
        return self if self.of is None else self.of.whole()


@dataclass
class Node:
    """One elementwise op or reduction."""

    reads: list[Value]
    makes: list[Value]
    level: int
    """How many products and the like must have ended before it; at first as early as can be, see `Runs.sink`."""
    ends: int
    """1 for a reduction: what reads its result is of the next level."""
    stack: str
    run: int


@dataclass
class Runs:
    """The elementwise ops of one body and which of them run together."""

    times: int
    nodes: list[Node] = field(default_factory=list)
    found: list[Work] = field(default_factory=list)
    latest: dict[int, int] = field(default_factory=dict)
    """Node -> the level of the first product or the like that reads what it makes."""
    divided: bool = False
    """Whether this is outside a manual region."""

    def run_of(self, node: int) -> int:
        while self.nodes[node].run != node:
            self.nodes[node].run = self.nodes[self.nodes[node].run].run
            node = self.nodes[node].run
        return node

    def add(self, reads: list[Value], makes: list[Value], level: int, ends: int, stack: str) -> None:
        number = len(self.nodes)
        self.nodes.append(Node(reads, makes, level, ends, stack, number))
        for value in makes:
            value.node = number

    def keep(self, values: Sequence[Value], level: int | None = None) -> None:
        """These are read from memory, by something of this level where it is known."""
        for value in values:
            value.whole().kept = True
            if level is not None and value.node >= 0:
                self.latest[value.node] = min(self.latest.get(value.node, level), level)

    def sink(self) -> None:
        """Every op as late as what reads it allows: it then joins its reader's run instead of being written for it."""
        wanted = {n: level - self.nodes[n].ends for n, level in self.latest.items()}
        for number in reversed(range(len(self.nodes))):
            node = self.nodes[number]
            node.level = max(node.level, wanted.get(number, node.level))
            for value in node.reads:
                if value.node >= 0:
                    level = node.level - self.nodes[value.node].ends
                    wanted[value.node] = min(wanted.get(value.node, level), level)

    def join(self) -> None:
        """Ops of one level that read each other become one run."""
        for number, node in enumerate(self.nodes):
            for value in node.reads:
                made_by = self.nodes[value.node] if value.node >= 0 else None
                if made_by is not None and not made_by.ends and made_by.level == node.level:
                    made_by_run = self.run_of(value.node)
                    self.nodes[made_by_run].run = self.run_of(number)

    def split(self) -> None:
        """Outside the manual region arrays are split as those are with which they are combined: the moments of an
        optimizer as the gradients that the region gives out.
        """
        for nodes in (self.nodes, self.nodes[::-1], self.nodes):
            for node in nodes:
                for made in node.makes:
                    alike = [v for v in (*node.reads, made) if v.elements == made.elements]
                    most = max(v.parts for v in alike)
                    for value in alike:
                        value.parts = most

    def finish(self) -> list[Work]:
        """The products and the like that were found, then the runs."""
        if self.divided:
            self.split()
        self.sink()
        self.join()
        runs: dict[int, list[Node]] = {}
        for number, node in enumerate(self.nodes):
            runs.setdefault(self.run_of(number), []).append(node)
            self.keep([v for v in node.reads if v.node >= 0 and self.run_of(v.node) != self.run_of(number)])
        for run, nodes in runs.items():
            read = {v for node in nodes for v in node.reads if v.node < 0 or self.run_of(v.node) != run}
            written = [v for node in nodes for v in node.makes if v.kept]
            moved = sum(v.local for v in read) + sum(v.local for v in written)
            if moved:
                widest = max((v for node in nodes for v in node.makes), key=lambda v: v.local)
                scope = scope_of(nodes[-1].stack)
                self.found.append(Work("elementwise", widest.dtype, "", 0, moved, self.times, scope))
        return self.found


_NUMBERS = frozenset(
    "float64 float32 bfloat16 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split()
)
