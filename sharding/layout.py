"""Layouts: where each dim of each array lies on the mesh, and which rule put it there. No jax but `spec`.

`Layouts` is a chain of rules bound to the sizes of a mesh. It answers for parameters (by path, names and shape, one
layout a role) and for activations (by names alone), and refuses what cannot be laid out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharding.axes import NAMES, PLACES, nearest
from sharding.errors import InputError
from sharding.order import Order
from sharding.paths import ByPath, check_spoken
from sharding.rule import PARAM_ROLES, Ask, Rule, Rules, Split

if TYPE_CHECKING:
    from jax.sharding import PartitionSpec

Dims = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Reason:
    """One placement: the dim with this name is split over this axis because of this rule, in this role."""

    name: str
    axis: str
    size: int
    role: str
    rule: str
    source: str


@dataclass(frozen=True)
class Layout:
    """The axes of each dim, major to minor. Only axes of more than one device appear in `dims`."""

    names: tuple[str, ...]
    dims: Dims
    reasons: tuple[Reason, ...] = ()
    declined: tuple[str, ...] = ()
    """Placements that a rule left out because dim or axis was taken, in words."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis that splits the array."""
        return tuple(a for dim in self.dims for a in dim)

    def spec(self) -> PartitionSpec:
        """The layout as jax's PartitionSpec."""
        return spec_of(self.dims)

    def text(self) -> str:
        """The layout for people: `embed/fsdp mlp/tensor`, a whole dim without a slash."""
        return (
            " ".join(n + "".join(f"/{a}" for a in dim) for n, dim in zip(self.names, self.dims, strict=True))
            or "scalar"
        )


@dataclass(frozen=True)
class ParamLayouts:
    """A parameter's layout in each role, from least to most split."""

    compute: Layout
    param: Layout
    gradient: Layout
    optimizer: Layout

    def drop(self, leading: int) -> ParamLayouts:
        """The layouts without the first `leading` dims: what a scan over layers sees of a stacked parameter."""
        cut = (
            Layout(x.names[leading:], x.dims[leading:], x.reasons, x.declined) for x in self.roles().values()
        )
        return ParamLayouts(*cut) if leading else self

    def roles(self) -> dict[str, Layout]:
        """Role -> layout."""
        return {role: getattr(self, role) for role in PARAM_ROLES}


class Layouts:
    """A chain of rules bound to mesh axis sizes: names (and shapes) in, layouts out, each computed once."""

    def __init__(self, rules: Rules, sizes: Mapping[str, int]):
        self.rules = rules
        self.sizes = dict(sizes)
        self.asked: dict[tuple[str, ...], Layout] = {}
        """Activation layouts asked for so far, by names."""
        self.params: dict[str, ParamLayouts] = {}
        """Parameter layouts asked for so far, by path."""
        self._placed: set[Rule] = {r for r in rules.chain if r.replicated}
        self._named = {n for r in rules.chain for n in r.names()}

    def activation(self, names: tuple[str, ...]) -> Layout:
        """Layout of an activation whose dims have these names."""
        if names not in self.asked:
            self._known(names, f"an activation ({' '.join(names)})")
            dims: list[tuple[str, ...]] = [() for _ in names]
            self.asked[names] = self._chain(
                "activation", f"activation ({' '.join(names)})", names, None, dims, (), ()
            )
            self._split_where_ordered(self.asked[names])
        return self.asked[names]

    def check_fits(self, where: str, names: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """InputError, as of a parameter, where an activation of this global shape does not divide as the rules split it."""
        self._chain("activation", where, names, shape, [() for _ in names], (), ())

    def param(self, path: str, names: tuple[str, ...], shape: tuple[int, ...]) -> ParamLayouts:
        """Layouts of a parameter of global `shape`, one a role, each starting from the one before."""
        if path not in self.params:
            self._known(names, path)
            if len(names) != len(shape):
                raise InputError(
                    f"{path} has {len(names)} names ({' '.join(names)}) for {len(shape)} dims {shape}. Name every dim."
                )
            made: list[Layout] = []
            for role in PARAM_ROLES:
                last = made[-1] if made else Layout(names, ((),) * len(names))
                made.append(
                    self._chain(role, path, names, shape, list(last.dims), last.reasons, last.declined)
                )
            self.params[path] = ParamLayouts(*made)
        return self.params[path]

    def _split_where_ordered(self, layout: Layout) -> None:
        for name, axes in zip(layout.names, layout.dims, strict=True):
            order, _ = self.order(name)
            if order is not None and order.axis not in axes:
                raise InputError(
                    f"activation ({' '.join(layout.names)}): {name} lies in the order {order}, but the rules {self.rules!r} do "
                    f"not split it over {order.axis!r} here. Split it wherever it occurs: {{'{name}': also('{order.axis}')}}."
                )

    def order(self, name: str) -> tuple[Order | None, int]:
        """The order in which positions of a dim of this name lie, and the devices of its axis; (None, 1): in their own."""
        orders = (r.order[name] for r in self.rules.chain if name in r.order)
        found = [o for o in orders if self.sizes[o.axis] > 1]
        if len(found) > 1:
            raise InputError(
                f"Two rules of the chain {self.rules!r} lay {name} in an order of their own, {found[0]} and {found[1]}. Choose "
                f"order='contiguous' for one of them."
            )
        return (found[0], self.sizes[found[0].axis]) if found else (None, 1)

    def _known(self, names: Iterable[str], where: str) -> None:
        for name in names:
            if name not in NAMES and name not in self._named and name not in PLACES:
                raise InputError(
                    f"{where} has a dim named {name!r}, a logical name that no rule knows"
                    f"{nearest(name, [*NAMES, *self._named])}. The vocabulary is {', '.join(NAMES)}; a model's own "
                    f"name is declared by a rule that splits it or by replicated({name!r})."
                )

    def _chain(
        self,
        role: str,
        path: str,
        names: tuple[str, ...],
        shape: tuple[int, ...] | None,
        dims: list[tuple[str, ...]],
        reasons: tuple[Reason, ...],
        declined: tuple[str, ...],
    ) -> Layout:
        made, left = list(reasons), list(declined)
        taken = {r.axis: r for r in made}
        for rule in self.rules.chain:
            ask = Ask(path, role, names, shape, tuple(dims), self.sizes)
            for name, split in rule.place(ask).items():
                at = names.index(name)
                self._stays_whole(rule, split, name, path)
                reason = Reason(name, split.axis, self.sizes[split.axis], role, rule.call, rule.source)
                clash = self._clash(reason, split, taken, [r for r in made if r.name == name], path)
                if clash:
                    left.append(clash)
                    continue
                self._placed.add(rule)
                made.append(reason)
                taken[split.axis] = reason
                if reason.size > 1:
                    self._divides(reason, path, shape, at, dims[at], split.otherwise)
                    dims[at] = (*dims[at], split.axis)
        return Layout(names, tuple(dims), tuple(made), tuple(left))

    def _stays_whole(self, rule: Rule, split: Split, name: str, path: str) -> None:
        kept = next((r for r in self.rules.chain if name in r.replicated), None)
        if kept is not None:
            raise InputError(
                f"{path}: rule {rule.call} ({rule.source}) splits {name} over {split.axis!r}, but {kept.call} "
                f"({kept.source}) declares that {name} stays whole. Drop one of the two."
            )

    def _clash(
        self, new: Reason, split: Split, taken: Mapping[str, Reason], on_dim: list[Reason], path: str
    ) -> str:
        """A sentence when the placement is declined, "" when it stands; InputError when it is a conflict."""
        old = taken.get(new.axis)
        if old is not None and not split.when_taken.endswith("decline"):
            raise InputError(
                f"{path}: rule {new.rule} ({new.source}) splits {new.name} over axis {new.axis!r}, which rule {old.rule} "
                f"({old.source}) already uses for {old.name}. One axis can split one dim of an array: give one of the "
                f"two rules another axis, or let the later one decline with if_free({new.axis!r})."
            )
        if on_dim and split.when_taken == "error":
            raise InputError(
                f"{path}: two rules for the dim {new.name}: {on_dim[0].rule} ({on_dim[0].source}) splits it over "
                f"{on_dim[0].axis!r} and {new.rule} ({new.source}) over {new.axis!r}. Drop one, or let the later one "
                f"split further with also({new.axis!r})."
            )
        if old is not None or (on_dim and split.when_taken == "decline"):
            first = old or on_dim[0]
            return f"{new.rule} left {new.name} whole: {first.rule} uses {first.axis!r} for {first.name}"
        return ""

    def _divides(
        self,
        new: Reason,
        path: str,
        shape: tuple[int, ...] | None,
        at: int,
        so_far: tuple[str, ...],
        otherwise: str,
    ) -> None:
        if shape is None:
            return
        parts = new.size * math.prod(self.sizes[a] for a in so_far)
        if shape[at] % parts:
            smaller = max(n for n in range(1, new.size + 1) if shape[at] % (parts // new.size * n) == 0)
            raise InputError(
                f"{path}: rule {new.rule} ({new.source}) splits {new.name} = {shape[at]} into {parts} parts "
                f"({' x '.join(f'{a}={self.sizes[a]}' for a in (*so_far, new.axis))}), which does not divide. Set mesh axis "
                f"{new.axis} to {smaller} or make {new.name} a multiple of {parts}{otherwise and f', or {otherwise}'}."
            )

    def check_used(self) -> None:
        """After every array has been asked for: each rule must have placed something, each axis must be used."""
        for rule in self.rules.chain:
            for placing in (getattr(rule, role) for role in PARAM_ROLES):
                if isinstance(placing, ByPath):
                    check_spoken(
                        f"Rule {rule.call.partition('(')[0]} ({rule.source}): the pattern",
                        placing.table,
                        self.params,
                    )
        idle = [r for r in self.rules.chain if r not in self._placed]
        if idle:
            raise InputError(
                f"Rule {idle[0].call} ({idle[0].source}) is used by no array: none of the model's {len(self.params)} "
                f"parameters and {len(self.asked)} kinds of activation has a dim that it splits. Remove it from the "
                f"chain {self.rules!r}, or correct the names it speaks of ({', '.join(sorted(idle[0].names())) or 'none'})."
            )
        seen = {n for names in self.asked for n in names}.union(
            *(p.compute.names for p in self.params.values())
        )
        for rule in self.rules.chain:
            for name in sorted(rule.names() - set(NAMES) - seen):
                raise InputError(
                    f"Rule {rule.call} ({rule.source}) speaks of a name {name!r} that no array has"
                    f"{nearest(name, [*NAMES, *seen])}. Correct it, or remove it from the rule."
                )
        every = [*self.asked.values(), *(p.optimizer for p in self.params.values())]
        used = {a for layout in every for a in layout.axes}
        for axis, size in self.sizes.items():
            if size > 1 and axis not in used:
                raise InputError(
                    f"Mesh axis {axis} has {size} devices, but no rule of the chain {self.rules!r} splits any array over "
                    f"it: they would all do the same work. Set mesh axis {axis} to 1, or add a rule that uses it."
                )


def contribution_axes(params: Mapping[str, ParamLayouts], inputs: list[Layout]) -> dict[str, frozenset[str]]:
    """Axes over which each parameter's gradient is contributed: those that split the batch's rows everywhere, and those
    that split another dim of the inputs and no parameter in use; but none that splits the parameter itself in use.
    """
    rows = [{a for n, dim in zip(x.names, x.dims, strict=True) if n == "batch" for a in dim} for x in inputs]
    everywhere = set.intersection(*rows) if rows else set()
    used = {a for p in params.values() for a in p.compute.axes}
    tokens = {a for x in inputs for a in x.axes} - used | everywhere
    return {p: frozenset(tokens) - frozenset(x.compute.axes) for p, x in params.items()}


def spec_of(dims: Dims) -> PartitionSpec:
    """Axes of each dim as jax's PartitionSpec."""
    from jax.sharding import PartitionSpec

    return PartitionSpec(*(dim if len(dim) > 1 else (dim[0] if dim else None) for dim in dims))


def local_shape(shape: tuple[int, ...], dims: Dims, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape on one device of an array of global `shape` laid out by `dims`."""
    return tuple(n // math.prod(sizes[a] for a in axes) for n, axes in zip(shape, dims, strict=True))
