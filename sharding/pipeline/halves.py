"""A traced function taken apart into two: what some of its results need, and the rest, which goes on from there.

A zero-bubble schedule (Qi et al. 2023, arXiv:2401.10241) does the backward pass in two tasks: the gradients of the inputs,
for which another stage waits, and later those of the weights. Neither computes again what the other has: the second half is
given the first's intermediate values, the cotangents at each product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.core
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Literal, Var

from sharding.ledger import scan_counts

INLINED = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
"""Primitives whose body is taken apart in its own place."""

Given = Sequence[Any]
"""Values of an equation's or a jaxpr's inputs; None for one that a half does not read."""


class Apart(Protocol):
    """An equation of which each half does a part."""

    wanted: list[bool]
    """Which of its results the first half gives."""
    reads_first: list[bool]
    reads_second: list[bool]
    """Which of its operands each half reads."""

    def first(self, given: Given, /) -> tuple[list[Array], Any]:
        """(wanted results, what the second half needs of the first)."""
        ...

    def second(self, given: Given, handed: Any, /) -> list[Array]:
        """The other results."""
        ...


class Halves:
    """`jaxpr` in two halves. `wanted`: which of its results the first gives; the second gives the others.

    `first_alone`: inputs that the second half is not given, as the first is: what a scan carries from trip to trip.
    """

    def __init__(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        wanted: Sequence[bool],
        first_alone: frozenset[Var] = frozenset(),
    ):
        self.jaxpr, self.consts, self.wanted = jaxpr, consts, wanted
        self.inner: dict[int, Apart] = {}
        """Equations of which each half does a part, by number."""
        self.whole: set[int] = set()
        """Equations that the first half does whole."""
        self.reads_first = self._divide()
        """What the first half reads."""
        made = first_alone | set(self._first_makes())
        reads = list(dict.fromkeys(self._second_reads()))
        self.between = [v for v in reads if v in made]
        """What the second half is given of the first's values, beside what the inner equations hand on."""
        self.reads_second = frozenset(reads) - made

    def _divide(self) -> frozenset[Var]:
        """Find what the first half has to do, from its results backwards; what it reads."""
        needed = set(_variables(_picked(self.jaxpr.outvars, self.wanted)))
        for at in reversed(range(len(self.jaxpr.eqns))):
            eqn = self.jaxpr.eqns[at]
            used = [v in needed for v in eqn.outvars]
            if not any(used):
                continue
            parts = None if all(used) else _apart(eqn, used)
            if parts is None:
                self.whole.add(at)
                needed |= set(_variables(eqn.invars))
            else:
                self.inner[at] = parts
                needed |= set(_variables(_picked(eqn.invars, parts.reads_first)))
        return frozenset(needed)

    def _first_makes(self) -> Iterator[Var]:
        for at, eqn in enumerate(self.jaxpr.eqns):
            if at in self.whole:
                yield from eqn.outvars
            elif at in self.inner:
                yield from _picked(eqn.outvars, self.inner[at].wanted)

    def _second_reads(self) -> Iterator[Var]:
        for at, eqn in enumerate(self.jaxpr.eqns):
            if at in self.inner:
                yield from _variables(_picked(eqn.invars, self.inner[at].reads_second))
            elif at not in self.whole:
                yield from _variables(eqn.invars)
        yield from _variables(_picked(self.jaxpr.outvars, _others(self.wanted)))

    def first(self, given: Given) -> tuple[list[Array], list[Any]]:
        """(wanted results, what the second half needs of the first)."""
        env, handed = self._env(given), []
        for at, eqn in enumerate(self.jaxpr.eqns):
            if at in self.whole:
                self._run(eqn, env)
            elif at in self.inner:
                with _scope(eqn):
                    made, more = self.inner[at].first([_read(env, v) for v in eqn.invars])
                env.update(zip(_picked(eqn.outvars, self.inner[at].wanted), made, strict=True))
                handed.append(more)
        results = [_read(env, v) for v in _picked(self.jaxpr.outvars, self.wanted)]
        return results, [[env[v] for v in self.between], *handed]

    def second(self, given: Given, handed: Sequence[Any]) -> list[Array]:
        """The other results."""
        env, rest = self._env(given), iter(handed)
        env.update(zip(self.between, next(rest), strict=True))
        for at, eqn in enumerate(self.jaxpr.eqns):
            if at in self.inner:
                with _scope(eqn):
                    made = self.inner[at].second([_read(env, v) for v in eqn.invars], next(rest))
                env.update(zip(_picked(eqn.outvars, _others(self.inner[at].wanted)), made, strict=True))
            elif at not in self.whole:
                self._run(eqn, env)
        return [_read(env, v) for v in _picked(self.jaxpr.outvars, _others(self.wanted))]

    def _run(self, eqn: Any, env: dict[Var, Any]) -> None:
        """One equation, as jax evaluates it: with its line and name."""
        inputs = list(dict.fromkeys(_variables(eqn.invars)))
        results = [v for v in eqn.outvars if not isinstance(v, DropVar)]
        names = self.jaxpr.debug_info.with_unknown_names()
        one = self.jaxpr.replace(
            constvars=[], invars=inputs, outvars=results, eqns=[eqn], effects=eqn.effects, debug_info=names
        )
        made = jax.core.eval_jaxpr(one, (), *(env[v] for v in inputs))
        env.update(zip(results, made, strict=True))

    def _env(self, given: Given) -> dict[Var, Any]:
        env = dict(zip(self.jaxpr.constvars, self.consts, strict=True))
        env.update(zip(self.jaxpr.invars, given, strict=True))
        return env


class _Inlined:
    """A call, whose body is done in two halves in its place."""

    def __init__(self, body: Jaxpr, consts: Sequence[Any], wanted: Sequence[bool]):
        self.wanted, halves = list(wanted), Halves(body, consts, wanted)
        self.reads_first = [v in halves.reads_first for v in body.invars]
        self.reads_second = [v in halves.reads_second for v in body.invars]
        self.first, self.second = halves.first, halves.second


class _Scan:
    """A scan as two: the first carries what the wanted results need, and hands each trip's values on to the second."""

    def __init__(self, eqn: Any, used: Sequence[bool]):
        self.params, body = eqn.params, eqn.params["jaxpr"]
        self.consts, carried = scan_counts(eqn)
        inputs = body.jaxpr.invars
        carries = inputs[self.consts : self.consts + carried]
        first = list(used[:carried])
        while True:
            alone = frozenset(_picked(carries, first))
            halves = Halves(body.jaxpr, body.consts, [*first, *used[carried:]], alone)
            more = [f or c in halves.reads_first for f, c in zip(first, carries, strict=True)]
            if more == first:
                break
            first = more  # what the wanted results need of the trip before is carried as well
        self.carry, self.halves, self.wanted = first, halves, [*first, *used[carried:]]
        later = set(_picked(carries, _others(first)))
        self.reads_first = [v in halves.reads_first or v in alone for v in inputs]
        self.reads_second = [v in halves.reads_second or v in later for v in inputs]

    def first(self, given: Given) -> tuple[list[Array], Any]:
        carry, (rows, handed) = self._scan(given, self.carry, lambda held, _: self.halves.first(held))
        return [*carry, *rows], handed

    def second(self, given: Given, handed: Any) -> list[Array]:
        half = lambda held, of_trip: (self.halves.second(held, of_trip), None)
        carry, (rows, _) = self._scan(given, _others(self.carry), half, handed)
        return [*carry, *rows]

    def _scan(self, given: Given, mine: Sequence[bool], half: Any, handed: Any = None) -> Any:
        consts, rest = given[: self.consts], given[self.consts :]
        start, rows = _picked(rest[: len(mine)], mine), list(rest[len(mine) :])

        def trip(carried: list[Any], row: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
            left = iter(carried)
            held = [*consts, *(next(left) if m else None for m in mine), *row[0]]
            made, more = half(held, row[1])
            return made[: len(start)], (made[len(start) :], more)

        p = self.params
        turns = {"length": p["length"], "reverse": p["reverse"], "unroll": p["unroll"]}
        return lax.scan(trip, start, (rows, handed), **turns)


def _apart(eqn: Any, used: Sequence[bool]) -> Apart | None:
    """The equation in two parts; None where it is done whole."""
    if eqn.primitive.name == "scan":
        parts = _Scan(eqn, used)
        return None if all(parts.wanted) else parts
    if eqn.primitive.name not in INLINED:
        return None
    body = next(v for v in eqn.params.values() if isinstance(v, (Jaxpr, ClosedJaxpr)))
    if isinstance(body, ClosedJaxpr):
        return _Inlined(body.jaxpr, body.consts, used)
    return _Inlined(body, (), used)


def _picked(items: Iterable[Any], which: Iterable[bool]) -> list[Any]:
    return [item for item, picked in zip(items, which, strict=True) if picked]


def _others(which: Iterable[bool]) -> list[bool]:
    return [not picked for picked in which]


def _variables(atoms: Iterable[Any]) -> list[Var]:
    return [v for v in atoms if isinstance(v, Var)]


def _read(env: Mapping[Var, Any], v: Any) -> Any:
    return v.val if isinstance(v, Literal) else env.get(v)


def _scope(eqn: Any) -> contextlib.AbstractContextManager[object]:
    stack = str(eqn.source_info.name_stack)
    return jax.named_scope(stack) if stack else contextlib.nullcontext()
