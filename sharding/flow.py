"""What the devices of a traced step do twice: values followed through the manual region, axis by axis.

Types say over which axes a value *may* vary; a cast adds to them. Here each value carries the axes over which it really
can differ: a shard differs over the axes that split it, `axis_index` over its axis, a gather or a sum makes its result
equal over the axes that it runs along. A product of operands that are equal over an axis is computed once by every device
of that axis. A gather or sum of which only this device's slice is used moved too much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from sharding.ledger import (
    KINDS,
    PRODUCTS,
    asked_by,
    collectives,
    frame_kind,
    product_flops,
    sent_bytes,
    subjaxprs,
)

TRANSPARENT = ("pcast", "pvary", "convert_element_type", "copy", "reduce_precision", "name", "stop_gradient")
"""Primitives that leave every element where it is and what it is, but for its type."""
USES = (
    "dot_general",
    "conv_general_dilated",
    "gather",
    "sort",
    "top_k",
    "argmax",
    "argmin",
    "while",
    "scan",
    "cond",
)
"""Primitives that need all that they are given, as every reduction, scatter and collective does: nothing that is computed
from their result is traced back to a move before them."""


@dataclass
class Move:
    """One gather or sum, and what became of its result."""

    kind: str
    axes: tuple[str, ...]
    dim: int
    """The dim that is gathered; -1 for a sum."""
    local: int
    """Bytes of the operand on one device."""
    times: int
    bytes: int
    """Bytes that each device sends in one step."""
    source: str
    op: str
    again: bool = False
    """Every device had cut its part out of this very array just before."""
    equal: frozenset[str] = frozenset()
    """Axes that it runs along although its operand is equal over them."""
    slices: list[tuple[int, frozenset[str], bool]] = field(default_factory=list)
    """(dim, axes, straight) of every slice by device index that was taken of the result; straight: of the result itself."""
    used: bool = False
    """Whether anything else but such slices read the result."""


@dataclass(frozen=True)
class Product:
    """One matrix product or convolution: FLOPs of each device in one step, and the axes whose devices compute the same."""

    flops: int
    repeats: tuple[str, ...]
    source: str
    op: str


@dataclass(frozen=True)
class Value:
    """What is known of one value of the trace."""

    differs: frozenset[str] = frozenset()
    """Axes over which it can differ between devices."""
    index: bool = False
    """Whether it is computed from device indices and constants alone."""
    moved: frozenset[int] = frozenset()
    """Moves that it comes from through local code."""
    straight: int = -1
    """The move whose result it is, unchanged."""
    cut: tuple[int, frozenset[str]] | None = None
    """It was cut by device index out of an array that every device had: the dim and the axes."""


class Flow:
    """Products and moves of every manual region in a jaxpr. `sizes`: mesh axes and their devices."""

    def __init__(self, jaxpr: ClosedJaxpr, sizes: Mapping[str, int]):
        self.sizes = dict(sizes)
        self.products: list[Product] = []
        self._around: list[tuple[str, str]] = []
        self.moves: list[Move] = []
        self.sent = sum(c.bytes for c in collectives(jaxpr, sizes))
        """Bytes that each device sends in one step, in all."""
        for body, times in _regions(jaxpr.jaxpr, 1):
            avals: list[Any] = [v.aval for v in body.invars]
            inputs = [Value(frozenset(a.manual_axis_type.varying)) for a in avals]
            self._use(self._walk(body, inputs, times))

    def _walk(self, body: Jaxpr, inputs: Sequence[Value], times: int) -> list[Value]:
        """The values that a body returns for the values that it is given."""
        known: dict[Any, Value] = dict(zip(body.invars, inputs, strict=True))
        known.update((v, Value(index=True)) for v in body.constvars)
        read = lambda atom: Value(index=True) if isinstance(atom, Literal) else known[atom]
        for eqn in _live(body):
            given = [read(v) for v in eqn.invars]
            known.update(zip(eqn.outvars, self._equation(eqn, given, times), strict=True))
        return [read(v) for v in body.outvars]

    def _equation(self, eqn: Any, given: list[Value], times: int) -> list[Value]:
        name, inner = eqn.primitive.name, list(subjaxprs(eqn.params))
        if name == "scan":
            return self._scan(eqn, inner[0], given, times)
        if name == "while":
            return self._while(eqn, given, times)
        if name == "cond":
            return self._cond(inner, given, times)
        if inner and all(
            len(j.invars) == len(given) and len(j.outvars) == len(eqn.outvars) for j in inner[:1]
        ):
            return self._called(eqn, inner[0], given, times)
        if name in KINDS:
            return self._collective(eqn, given, times)
        if name == "axis_index":
            return [Value(frozenset({eqn.params["axis_name"]}), index=True)]
        if name in TRANSPARENT:
            return [given[0]]
        differs = frozenset().union(*(v.differs for v in given))
        if name == "dynamic_slice":
            cut = self._slice(eqn, given)
            if cut is not None:
                return [Value(differs, cut=cut)]
        if name in PRODUCTS:
            again = tuple(a for a, n in self.sizes.items() if n > 1 and a not in differs)
            self.products.append(Product(product_flops(eqn) * times, again, *self._asked(eqn)))
        index = all(v.index for v in given)
        if name in USES or name.startswith(("reduce", "scatter", "cum", "custom", "fft")):
            self._use(given)
            return [Value(differs, index) for _ in eqn.outvars]
        moved = frozenset().union(*(v.moved for v in given))
        return [Value(differs, index, moved) for _ in eqn.outvars]

    def _called(self, eqn: Any, body: Jaxpr, given: list[Value], times: int) -> list[Value]:
        self._around.append(asked_by(eqn))
        out = self._walk(body, given, times)
        self._around.pop()
        return out

    def _asked(self, eqn: Any) -> tuple[str, str]:
        """Who asked for an equation; jax keeps no outer lines inside a function whose backward is written by hand."""
        sources = [asked_by(eqn), *reversed(self._around)]
        return next((s for s in sources if frame_kind(s[0]) == "model" and s[0]), sources[0])

    def _collective(self, eqn: Any, given: list[Value], times: int) -> list[Value]:
        kind, named = KINDS[eqn.primitive.name], eqn.params.get("axes", eqn.params.get("axis_name", ()))
        axes = tuple(
            a for a in (named if isinstance(named, (tuple, list)) else (named,)) if isinstance(a, str)
        )
        self._use(given)
        if kind == "permute":
            return [Value(v.differs) for v in given]
        if kind not in ("all-gather", "all-reduce") or eqn.params.get("axis_index_groups") is not None:
            return [Value(v.differs | set(axes)) for v in given]
        over = tuple(a for a in axes if self.sizes[a] > 1)
        made = []
        for v, var in zip(given, eqn.invars, strict=True):
            left = v.differs - set(axes)
            if not over:
                made.append(Value(left))
                continue
            n = math.prod(self.sizes[a] for a in over)
            local = math.prod(var.aval.shape) * var.aval.dtype.itemsize
            dim = eqn.params["all_gather_dimension"] if kind == "all-gather" else -1
            self.moves.append(
                Move(kind, over, dim, local, times, sent_bytes(kind, local, n) * times, *self._asked(eqn),
                     again=v.cut == (dim, frozenset(over)), equal=frozenset(over) - v.differs,
                     used=eqn.primitive.name in ("pmax", "pmin"))
            )  # fmt: skip
            made.append(Value(left, moved=frozenset({len(self.moves) - 1}), straight=len(self.moves) - 1))
        return made

    def _slice(self, eqn: Any, given: list[Value]) -> tuple[int, frozenset[str]] | None:
        """The dim and axes of a slice by device index out of an array that is equal over these axes, else None."""
        starts = [(d, v) for d, v in enumerate(given[1:]) if v.differs]
        if len(starts) != 1 or not starts[0][1].index or starts[0][1].differs & given[0].differs:
            return None
        dim, axes = starts[0][0], starts[0][1].differs
        for at in given[0].moved:
            self.moves[at].slices.append((dim, axes, given[0].straight == at))
        return dim, axes

    def _use(self, values: Sequence[Value]) -> None:
        for value in values:
            for at in value.moved:
                self.moves[at].used = True

    def _scan(self, eqn: Any, body: Jaxpr, given: list[Value], times: int) -> list[Value]:
        rank = lambda v: v.aval.ndim
        stacked = sum(rank(v) != rank(w) for v, w in zip(eqn.invars, body.invars, strict=True))
        carried = sum(rank(v) == rank(w) for v, w in zip(eqn.outvars, body.outvars, strict=True))
        self._use(given)
        start = [Value(v.differs, v.index) for v in given]
        fixed = len(start) - stacked - carried
        run = lambda carry, n: self._walk(body, [*start[:fixed], *carry, *start[fixed + carried :]], n)
        return self._loop(run, start[fixed : fixed + carried], times * eqn.params["length"])

    def _while(self, eqn: Any, given: list[Value], times: int) -> list[Value]:
        test, body = (eqn.params[k] for k in ("cond_jaxpr", "body_jaxpr"))
        test, body = (j.jaxpr if isinstance(j, ClosedJaxpr) else j for j in (test, body))
        self._use(given)
        start = [Value(v.differs) for v in given]
        of_test, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        of_body, carry = start[of_test : of_test + fixed], start[of_test + fixed :]

        def run(carry: list[Value], n: int) -> list[Value]:
            (more,) = self._walk(test, [*start[:of_test], *carry], n)
            return [Value(v.differs | more.differs) for v in self._walk(body, [*of_body, *carry], n)]

        return self._loop(run, carry, times)

    def _loop(self, run: Any, carry: list[Value], times: int) -> list[Value]:
        """Walk a loop's body until what is carried differs over no further axis; only the last walk is kept."""
        while True:
            moves, products = len(self.moves), len(self.products)
            out = run(carry, times)
            grown = [
                Value(v.differs | w.differs, v.index and w.index)
                for v, w in zip(carry, out[: len(carry)], strict=True)
            ]
            if grown == carry:
                self._use(out)
                return [Value(v.differs) for v in out]
            del self.moves[moves:], self.products[products:]
            carry = grown

    def _cond(self, branches: list[Jaxpr], given: list[Value], times: int) -> list[Value]:
        self._use(given)
        plain = [Value(v.differs) for v in given[1:]]
        outs = [self._walk(branch, plain, times) for branch in branches]
        for out in outs:
            self._use(out)
        return [Value(given[0].differs.union(*(v.differs for v in same))) for same in zip(*outs, strict=True)]


def _live(body: Jaxpr) -> list[Any]:
    """The equations whose results are needed: a backward pass by hand makes gradients that nobody reads, XLA drops them."""
    needed, kept = {v for v in body.outvars if not isinstance(v, Literal)}, []
    for eqn in reversed(body.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, Literal))
    return kept[::-1]


def _regions(jaxpr: Jaxpr, times: int) -> Iterator[tuple[Jaxpr, int]]:
    """The body of every manual region, with how often it runs."""
    for eqn in jaxpr.eqns:
        inner = list(subjaxprs(eqn.params))
        if eqn.primitive.name == "shard_map":
            yield inner[0], times
            continue
        again = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for body in inner:
            yield from _regions(body, again)
