"""Collectives that a trace asks for more than once of the same value: a compiler does them once.

Found by numbering values (Alpern, Wegman and Zadeck 1988): equal operations on equal numbers have equal numbers. A forward
pass that is computed again inside a backward pass is where they come from.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from sharding.ledger import KINDS, Collective, collectives, subjaxprs

CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "shard_map")
"""jax primitives whose body sees the very values that they are given."""


def repeated(jaxpr: ClosedJaxpr, sizes: Mapping[str, int]) -> list[Collective]:
    """Those that another one in the same body makes needless, with how often in a step; loops count their trips."""
    made: list[Collective] = []
    for eqn, times in _Numbers().again(jaxpr.jaxpr, (), 1):
        alone = jaxpr.jaxpr.replace(eqns=[eqn])
        for c in collectives(ClosedJaxpr(alone, jaxpr.consts), sizes):
            made.append(dataclasses.replace(c, times=times, bytes=c.bytes * times))
    return made


class _Numbers:
    """One walk over a jaxpr, every value by its number."""

    def __init__(self) -> None:
        self.fresh = itertools.count()
        self.known: dict[Any, tuple[int, ...]] = {}

    def again(self, body: Jaxpr, given: tuple[int, ...], times: int) -> Iterator[tuple[Any, int]]:
        """Equations of collectives whose value is there already; leaves the numbers of the results in `results`."""
        inside = given if len(given) == len(body.invars) else tuple(next(self.fresh) for _ in body.invars)
        held: dict[Any, int] = dict(zip(body.invars, inside, strict=True))
        held |= {v: next(self.fresh) for v in body.constvars}
        for eqn in body.eqns:
            numbers = tuple(self._number(held, v) for v in eqn.invars)
            results = None
            inner = list(subjaxprs(eqn.params))
            again = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
            for sub in inner:
                # An array that a layer computes again goes through a barrier: inside, it is another value.
                yield from self.again(sub, numbers if eqn.primitive.name in CALLS else (), again)
            if len(inner) == 1 and eqn.primitive.name in CALLS and len(self.results) == len(eqn.outvars):
                results = self.results
            elif not inner and not eqn.effects:
                key = (eqn.primitive.name, repr(sorted(eqn.params.items(), key=lambda x: x[0])), numbers)
                if key in self.known and eqn.primitive.name in KINDS:
                    yield eqn, times
                results = self.known.setdefault(key, tuple(next(self.fresh) for _ in eqn.outvars))
            held |= dict(
                zip(eqn.outvars, results or tuple(next(self.fresh) for _ in eqn.outvars), strict=True)
            )
        self.results = tuple(self._number(held, v) for v in body.outvars)

    def _number(self, held: dict[Any, int], v: Any) -> int:
        if isinstance(v, Literal):
            return self.known.setdefault(("literal", repr(v.val), str(v.aval)), (next(self.fresh),))[0]
        return held[v]


__all__ = ["repeated"]
