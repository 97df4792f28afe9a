"""Plans of named contractions: which collectives an einsum needs for given layouts, with the fewest bytes. No jax.

A mesh axis can do one of two things while the product is computed: split one of the einsum's names, or nothing. Every
assignment of axes gives a correct plan: operands are gathered or sliced to it, the product is taken locally, sums over
a split name are reduced, and the result is brought to its layout. A parameter is used as the rules' `compute` role lays
it out. Of the plans with the fewest local products (no device repeats another's work where it can be avoided) the one
wins in which each device sends the fewest bytes forward.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from sharding.errors import InputError
from sharding.layout import Dims
from sharding.moves import finish_bytes, relayout_bytes, scatter_axes

Names = tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What one named contraction does on each device, in order."""

    operands: tuple[Dims, ...]
    """Layout to which each operand is brought before the local product."""
    reduce: tuple[str, ...]
    """Axes over which the local products are partial sums."""
    produced: Dims
    """Layout of the local products (partial sums still to be reduced)."""
    bytes: int
    """Bytes that each device sends in the forward pass."""
    products: int
    """Scalar multiplications on each device."""

    def only_reduces(self, layouts: tuple[Dims, ...], wanted: Dims) -> bool:
        """Whether operands that lie by `layouts` are multiplied as they are, and one all-reduce of the partial sums, or
        their reduce-scatter over one axis, brings the product to `wanted`.
        """
        if self.operands != layouts or self.produced == wanted:
            return self.operands == layouts
        pairs = zip(self.produced, wanted, strict=True)
        reached = tuple((*have, *scatter_axes(have, want, self.reduce)) for have, want in pairs)
        return len(self.reduce) == 1 and reached == wanted


@functools.lru_cache(maxsize=4096)
def parse(spec: str) -> tuple[tuple[Names, ...], Names]:
    """Operand and result names of `"batch length embed, embed mlp -> batch length mlp"`; InputError when malformed."""
    left, arrow, right = spec.partition("->")
    terms, result = tuple(tuple(t.split()) for t in left.split(",")), tuple(right.split())
    if not arrow or len(terms) > 2:
        raise InputError(
            f"einsum {spec!r}: write one or two operands, an arrow and the result: 'batch embed, embed mlp -> batch mlp'."
        )
    for term in (*terms, result):
        if len(set(term)) != len(term):
            raise InputError(
                f"einsum {spec!r}: the term {' '.join(term)!r} repeats a name. Give each dim its own name."
            )
    unknown = [n for n in result if not any(n in t for t in terms)]
    if unknown:
        raise InputError(f"einsum {spec!r}: the result's {unknown[0]!r} is in no operand.")
    return terms, result


@dataclass(frozen=True)
class Contraction:
    """A named contraction as it stands on each device, before anything moves."""

    spec: str
    layouts: tuple[Dims, ...]
    """How each operand lies."""
    shapes: tuple[tuple[int, ...], ...]
    """*Local* shape of each operand."""
    itemsizes: tuple[int, ...]
    """Bytes per element of each operand; the result has the widest."""
    wanted: Dims
    """How the result must lie."""
    sizes: tuple[tuple[str, int], ...]
    """Mesh axes and their devices."""
    held: tuple[frozenset[Dims], ...] = ()
    """For each operand, layouts to which it has been brought already: they cost nothing again."""
    fixed: tuple[bool, ...] = ()
    """Operands that are not gathered as long as any plan does without: parameters, which the rules' `compute` role
    splits on purpose."""

    def priced(self) -> Iterator[Plan]:
        """Every plan that divides, one an assignment of axes to names."""
        terms, result = parse(self.spec)
        where: dict[str, dict[str, None]] = {}
        for names, dims in [*zip(terms, self.layouts, strict=True), (result, self.wanted)]:
            for name, axes in zip(names, dims, strict=True):
                for axis in axes:
                    where.setdefault(axis, {})[name] = None
        sizes = dict(self.sizes)
        axes = [a for a in where if sizes[a] > 1]
        for choice in itertools.product(*([*where[a], None] for a in axes)):
            on = dict(zip(axes, choice, strict=True))
            shared = len({n for n in choice if n is not None}) < sum(n is not None for n in choice)
            for order in (
                itertools.permutations(axes) if shared else [tuple(axes)]
            ):  # major to minor within a dim
                made = self._price(on, order, sizes)
                if made is not None:
                    yield made

    def gathers_fixed(self, made: Plan) -> bool:
        """Whether a plan gathers a fixed operand: one of its dims loses an axis."""
        kept = [at for at, keep in enumerate(self.fixed) if keep]
        moves = [pair for at in kept for pair in zip(self.layouts[at], made.operands[at], strict=True)]
        return any(have != want[: len(have)] for have, want in moves)

    def whole(self) -> dict[str, int]:
        """Global size of each name; InputError when two operands disagree."""
        terms, _ = parse(self.spec)
        sizes, found = dict(self.sizes), {}
        for names, dims, shape in zip(terms, self.layouts, self.shapes, strict=True):
            for name, axes, n in zip(names, dims, shape, strict=True):
                size = n * math.prod(sizes[a] for a in axes)
                if found.setdefault(name, size) != size:
                    raise InputError(
                        f"einsum {self.spec!r}: {name!r} is {found[name]} in one operand and {size} in the other (whole "
                        f"sizes; local shapes {self.shapes}, layouts {self.layouts}). An operand does not lie as its "
                        f"names say."
                    )
        return found

    def _price(
        self, choice: dict[str, str | None], order: tuple[str, ...], sizes: dict[str, int]
    ) -> Plan | None:
        """The plan in which each axis splits the name that `choice` gives it; None when a dim does not divide."""
        terms, result = parse(self.spec)
        whole = self.whole()
        split = {n: tuple(a for a in order if choice[a] == n) for n in whole}
        local = {}
        for name, size in whole.items():
            parts = math.prod(sizes[a] for a in split[name])
            if size % parts:
                return None
            local[name] = size // parts
        if any(
            whole[n] % math.prod(sizes[a] for a in dim) for n, dim in zip(result, self.wanted, strict=True)
        ):
            return None
        targets = tuple(tuple(split[n] for n in names) for names in terms)
        held = self.held or (frozenset(),) * len(targets)
        operands = zip(self.shapes, self.itemsizes, self.layouts, targets, held, strict=True)
        sent = sum(
            relayout_bytes(math.prod(shape) * item, src, dst, sizes)
            for shape, item, src, dst, free in operands
            if dst not in free
        )
        produced = tuple(split[n] for n in result)
        partial = tuple(a for n in whole if n not in result for a in split[n])
        out = math.prod(local[n] for n in result) * max(self.itemsizes)
        sent += finish_bytes(out, partial, produced, self.wanted, sizes)
        return Plan(targets, partial, produced, sent, math.prod(local.values()))


@functools.lru_cache(maxsize=4096)
def plan(asked: Contraction) -> Plan:
    """The plan with the fewest local products, and among those with the fewest bytes.

    Raises InputError when a dim that the result's layout splits does not divide.
    """
    plans = list(asked.priced())
    # Two parameters may disagree about an axis: one of them has to be gathered then.
    plans = [made for made in plans if not asked.gathers_fixed(made)] or plans
    if not plans:
        whole = asked.whole()
        raise InputError(
            f"einsum {asked.spec!r}: the result's layout {asked.wanted} does not divide its dims "
            f"{tuple(whole[n] for n in parse(asked.spec)[1])} on the mesh {dict(asked.sizes)}. Make the dims multiples of "
            f"the axes that split them."
        )
    return min(plans, key=lambda made: (made.products, made.bytes))
