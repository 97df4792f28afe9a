"""What lies in memory at each step of a traced program, and how long: the values of a jaxpr with every call in it written out.

Only results of products, collectives and loops lie, what those read, and what leaves the program; elementwise work is fused
into what reads it. `sharding.price.habits` says what a platform's compiler does besides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import Jaxpr, Literal

from sharding.ledger import PRODUCTS, scan_counts, subjaxprs
from sharding.price.habits import ELSEWHERE, FRESH, LOOPS, SAME, WHOLE, Habits
from sharding.scope import scope_of


@dataclass(frozen=True)
class Sum:
    """Bytes alive in a program at one step."""

    kept: int = 0
    """Made in the forward pass."""
    made: int = 0
    """Made after it."""
    short: int = 0
    """Of both, what can lie on the chip."""

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.kept + other.kept, self.made + other.made, self.short + other.short)


@dataclass(eq=False)
class Value:
    """One array of a program."""

    bytes: int
    forward: bool = False
    lies: bool = False
    given: bool = False
    """Whether it lies outside the program, and is counted there."""
    stacked: bool = False
    """Whether a loop makes a row of it at a time."""
    born: int = -1
    """The step that makes it; -1 for what is there before."""
    last: int = -1
    """The last step that reads it."""
    readers: list[Step] = field(default_factory=list)
    sources: frozenset[Value] = frozenset()
    """What lies and is read to compute it, where it is fused into its reader."""

    def read(self) -> frozenset[Value]:
        """What lies in memory and is read by whoever reads this."""
        return frozenset([self]) if self.lies or self.given else self.sources


@dataclass(eq=False)
class Step:
    """One equation, and what is alive within it: a loop's body has a program of its own."""

    eqn: Any
    reads: list[Value]
    makes: list[Value]
    stack: str
    scratch: int = 0
    """Bytes that it needs for itself."""
    inner: Sum = Sum()
    handed: list[Value] = field(default_factory=list)
    """Operands whose memory a loop goes on using, counted within it."""
    rows: list[tuple[Value, Value, int]] = field(default_factory=list)
    """Of a scan: each stacked operand, its row in the body's program, and how many rows there are."""

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.eqn.primitive.name

    @property
    def lies(self) -> bool:
        """Whether it is done by itself, and not only as a part of its readers."""
        return self.name in WHOLE or any(v.lies for v in self.makes)


class Program:
    """A jaxpr with every call in it written out; loops are steps. given: place among its inputs -> a value that the program
    counts; other inputs lie outside it. stack: the name stack of whoever calls it.
    """

    def __init__(self, jaxpr: Jaxpr, given: Mapping[int, Value], stack: str, habits: Habits):
        self.steps: list[Step] = []
        self.values: list[Value] = []
        self.habits = habits
        self._rounded: dict[tuple[Value, Any], Value] = {}
        held: dict[Any, Value] = {}
        for at, var in enumerate((*jaxpr.constvars, *jaxpr.invars)):
            held[var] = given.get(at) or Value(0, given=True)
            self.values.append(held[var])
        self._write(jaxpr, held, stack)
        self.out = [_value(v, held) for v in jaxpr.outvars]
        self._lay()
        if habits.late:
            self._postpone()
        self._live()

    def _write(self, jaxpr: Jaxpr, held: dict[Any, Value], stack: str) -> None:
        """Append the steps of a jaxpr."""
        for eqn in jaxpr.eqns:
            name, here = eqn.primitive.name, f"{stack}/{eqn.source_info.name_stack}"
            reads = [_value(v, held) for v in eqn.invars]
            bodies = list(subjaxprs(eqn.params))
            if bodies and name not in WHOLE:
                body = bodies[0]
                inner: dict[Any, Value] = dict(zip(body.invars, reads[-len(body.invars) :], strict=False))
                inner.update((var, Value(0, given=True)) for var in body.constvars)
                self._write(body, inner, here)
                held.update(zip(eqn.outvars, (_value(v, inner) for v in body.outvars), strict=True))
            elif name in SAME:
                held.update(zip(eqn.outvars, reads, strict=True))
            else:
                held.update(zip(eqn.outvars, self._step(eqn, reads, here), strict=True))

    def _step(self, eqn: Any, reads: list[Value], stack: str) -> list[Value]:
        """Append one step; what it makes."""
        cast = eqn.primitive.name == "convert_element_type"
        if cast and (reads[0], eqn.outvars[0].aval.dtype) in self._rounded:
            # compilers take what was rounded to fewer bits and is widened again as it was before (XLA's excess precision)
            return [self._rounded[reads[0], eqn.outvars[0].aval.dtype]]
        forward = scope_of(stack).phase == "forward"
        makes = [Value(_size(v), forward) for v in eqn.outvars]
        if cast and makes[0].bytes < reads[0].bytes:
            self._rounded[makes[0], eqn.invars[0].aval.dtype] = reads[0]
        self.values += makes
        self.steps.append(Step(eqn, reads, makes, stack, _turned(eqn) if self.habits.turned else 0))
        return makes

    def _lay(self) -> None:
        """Which values lie in memory, and what is read for those that do not."""
        for step in self.steps:
            for value in step.reads:
                value.readers.append(step)
                value.lies = value.lies or step.name in WHOLE
        for value in self.out:
            value.lies = True
        lies = WHOLE | FRESH | self.habits.alone
        for step in self.steps:
            sources = frozenset().union(*(v.read() for v in step.reads))
            for value in step.makes:
                dear = step.name in self.habits.dear and len(value.readers) > 1
                value.lies = value.lies or dear or step.name in lies
                value.sources = sources

    def _postpone(self) -> None:
        """Put the products that no product and no loop waits for last, with what is made of them, and for them alone."""
        awaited: set[Value] = set()
        needed, late = set(self.out), set[Value]()
        for step in reversed(self.steps):
            waits = any(v in awaited for v in step.makes)
            heavy = step.name in PRODUCTS or step.name in LOOPS
            if waits or heavy:
                awaited.update(step.reads)
            product = step.name in PRODUCTS and not waits
            for_them = waits and not heavy and not any(v in needed for v in step.makes)
            (late.update(step.makes) if product or for_them else needed.update(step.reads))
        for step in self.steps:
            if any(v in late for v in step.reads):
                late.update(step.makes)
        self.steps.sort(key=lambda step: any(v in late for v in step.makes))

    def _live(self) -> None:
        """When each value is made and read last; what is alive within loops."""
        cast: dict[Value, Value] = {}
        for at, step in enumerate(self.steps):
            for value in step.makes:
                value.born = at
            if step.name in LOOPS:
                _look_inside(step, self.habits)
            for stacked, row, many in step.rows if self.habits.hoists else ():
                if small := _cast(row):
                    before = cast.setdefault(stacked, Value(many * small, row.forward, lies=True, born=at))
                    before.last = at
            if step.lies:
                again = step.reads[0].sources if step.scratch else frozenset[Value]()
                for source in again.union(*(v.read() for v in step.reads)):
                    source.last = max(source.last, at)
        self.values += cast.values()
        for source in frozenset().union(*(v.read() for v in self.out)):
            source.last = len(self.steps)
        self._reuse()

    def _reuse(self) -> None:
        """Elementwise work writes over an array of its size that nobody reads afterwards."""
        for at, step in enumerate(self.steps):
            for value in step.makes:
                if not value.lies or step.name in ELSEWHERE:
                    continue
                free = (
                    s
                    for s in value.sources
                    if s.lies and not s.given and (s.last, s.bytes) == (at, value.bytes)
                )
                for source in itertools.islice(free, 1):
                    source.last = at - 1

    def peak(self) -> Sum:
        """The most that is alive."""
        births: list[list[Value]] = [[] for _ in self.steps]
        for value in self.values:
            if value.lies and not value.given and value.last >= max(value.born, 0) and self.steps:
                births[max(value.born, 0)].append(value)
        alive: set[Value] = set()
        found = []
        for at, step in enumerate(self.steps):
            alive.update(births[at])
            alive = {v for v in alive if v.last >= at}
            found.append(self._at(at, step, alive))
        return most(found, self.habits)

    def _at(self, at: int, step: Step, alive: set[Value]) -> Sum:
        """What is alive while a step runs."""
        if step.name in LOOPS:
            alive = (
                alive - {v for v in step.handed if v.last == at} - {v for v in step.makes if not v.stacked}
            )
        kept = sum(v.bytes for v in alive if v.forward)
        short = sum(v.bytes for v in alive if not v.stacked and 2 * v.bytes <= self.habits.on_chip)
        return Sum(kept, sum(v.bytes for v in alive) - kept + step.scratch, short) + step.inner


def most(found: Iterable[Sum], habits: Habits) -> Sum:
    """The sum that takes the most of the device's memory."""
    return max(found, key=lambda x: x.kept + x.made - min(x.short, habits.on_chip), default=Sum())


def _look_inside(step: Step, habits: Habits) -> None:
    """The most that is alive in a loop's body, what it carries included; its rows and stacks."""
    params = step.eqn.params
    if step.name == "cond":
        step.inner = most((Program(b, {}, step.stack, habits).peak() for b in subjaxprs(params)), habits)
        return
    if step.name == "scan":
        body, before, (consts, carried) = params["jaxpr"].jaxpr, 0, scan_counts(step.eqn)
        for value in step.makes[carried:]:
            value.stacked = True
    else:
        body, before, consts = params["body_jaxpr"].jaxpr, params["cond_nconsts"], params["body_nconsts"]
        carried = len(body.invars) - consts
    forward, given = scope_of(step.stack).phase == "forward", {}
    for at in range(consts, len(body.invars)):
        operand, size = step.reads[before + at], _size(body.invars[at])
        if at < consts + carried:
            step.handed.append(operand)
            given[at] = Value(size, forward, lies=True, born=0)
        else:  # a row is cut out where something reads it that does not cut by itself
            given[at] = Value(size, operand.forward, lies=habits.rows, born=0)
            step.rows.append((operand, given[at], params["length"]))
    step.inner = Program(body, given, step.stack, habits).peak()


def _cast(row: Value) -> int:
    """Bytes of a row after the one cast that is all that reads it, 0 where more does or it grows."""
    casts = {step.makes[0].bytes for step in row.readers if step.name == "convert_element_type"}
    alone = len(casts) == 1 and all(step.name == "convert_element_type" for step in row.readers)
    return min(casts) if alone and min(casts) < row.bytes else 0


def _turned(eqn: Any) -> int:
    """Bytes of the left operand of a product in which what is summed does not lie last."""
    if eqn.primitive.name != "dot_general":
        return 0
    (summed, _), _ = eqn.params["dimension_numbers"]
    rank = len(eqn.invars[0].aval.shape)
    return 0 if sorted(summed) == list(range(rank - len(summed), rank)) else _size(eqn.invars[0])


def _value(atom: Any, held: Mapping[Any, Value]) -> Value:
    return Value(0, given=True) if isinstance(atom, Literal) else held[atom]


def _size(var: Any) -> int:
    return math.prod(var.aval.shape) * getattr(var.aval.dtype, "itemsize", 0)


__all__ = ["Program", "Sum"]
