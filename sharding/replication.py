"""Arrays that stay whole over an axis although a rule of the chain means to split arrays like them. No jax.

What a rule means is asked of the rule itself: a rule that leaves an array whole, but would split it if one of its dims
were a little larger, found no dim that divides. A rule that leaves it whole whatever its sizes does so on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sharding.axes import PLACES
from sharding.errors import InputError
from sharding.finding import Finding, Limits, human
from sharding.layout import Layouts, ParamLayouts, local_shape
from sharding.rule import PARAM_ROLES, Ask, Rule, Split

WHAT = {"param": "parameter", "gradient": "gradient", "optimizer": "optimizer state"}
WHEN = {
    "compute": "in use", "param": "at rest", "gradient": "as its gradient", "optimizer": "as optimizer state",
}  # fmt: skip


@dataclass(frozen=True)
class Array:
    """One parameter as it is held: global shape, bytes of an element, arrays of optimizer state like it."""

    shape: tuple[int, ...]
    itemsize: int
    moments: int


@dataclass(frozen=True)
class _Case:
    """One rule asked of one array in one role."""

    rule: Rule
    role: str
    path: str
    array: Array
    lies: ParamLayouts
    layouts: Layouts

    def ask(self, shape: tuple[int, ...], **sizes: int) -> Mapping[str, Split]:
        """What the rule would place if the array had this shape and the mesh these sizes; nothing where it refuses."""
        now = getattr(self.lies, self.role)
        around = {**self.layouts.sizes, **sizes}
        try:
            return self.rule.place(Ask(self.path, self.role, now.names, shape, now.dims, around))
        except InputError:
            return {}

    def lacks(self, axis: str) -> bool:
        """Whether no role splits the array over `axis`, which has more than one device."""
        return self.layouts.sizes.get(axis, 1) > 1 and axis not in self.lies.optimizer.axes

    def finding(self, axis: str, why: str, change: str, limits: Limits) -> Finding | None:
        """The finding when what is held for nothing reaches the limit."""
        n, has, needs, held = self.layouts.sizes[axis], 0, 0, []
        for role in PARAM_ROLES[max(1, PARAM_ROLES.index(self.role)) :]:
            dims = getattr(self.lies, role).dims
            copies = self.array.moments if role == "optimizer" else 1
            local = math.prod(local_shape(self.array.shape, dims, self.layouts.sizes)) * self.array.itemsize
            has, needs = has + copies * local, needs + copies * -(-local // n)
            held += [WHAT[role]] * bool(copies)
        if has - needs < limits.bytes:
            return None
        what = " and ".join(x for x in (", ".join(held[:-1]), held[-1]) if x)
        says = (
            f"{self.path} ({'x'.join(map(str, self.array.shape))}: {' '.join(self.lies.param.names)}) stays whole over "
            f"{axis} = {n}: rule {self.rule.call} ({self.rule.source}) {why}. Its {what} take{'s' * (len(held) == 1)} "
            f"{human(has)} on each device where {human(needs)} would do."
        )
        return Finding(
            "replicated array", "warning", self.path, (axis,), (self.rule.call,), (self.rule.source,),
            has, needs, "bytes", says, change,
        )  # fmt: skip


def replicated(layouts: Layouts, arrays: Mapping[str, Array], limits: Limits) -> Iterator[Finding]:
    """A finding for each array and axis over which the array is whole by accident."""
    for path, array in arrays.items():
        found: set[str] = set()
        for rule in layouts.rules.chain:
            for role in PARAM_ROLES:
                if not getattr(rule, role):
                    continue
                case = _Case(rule, role, path, array, layouts.params[path], layouts)
                for axis, why, change in (*_declined(case), *_indivisible(case), *_unnamed(case, arrays)):
                    made = None if axis in found else case.finding(axis, why, change, limits)
                    if made is not None:
                        found.add(axis)
                        yield made


def _indivisible(case: _Case) -> Iterator[tuple[str, str, str]]:
    """The rule is a function that placed nothing here, but would if one dim were larger."""
    if not callable(getattr(case.rule, case.role)):
        return
    shape, now = case.array.shape, getattr(case.lies, case.role)
    better: list[tuple[float, str, int, int]] = []
    for axis in (a for a, n in case.layouts.sizes.items() if n > 1 and case.lacks(a)):
        for d, n in enumerate(shape):
            parts = math.prod(case.layouts.sizes[a] for a in (*now.dims[d], axis))
            padded = -(-n // parts) * parts
            placed = case.ask((*shape[:d], padded, *shape[d + 1 :])) if padded != n else {}
            if any(s.axis == axis and name == now.names[d] for name, s in placed.items()):
                better.append((padded / n, axis, d, padded))
    if not better:
        return
    _, axis, d, padded = min(better)
    n = case.layouts.sizes[axis]
    smaller = [k for k in range(n - 1, 1, -1) if n % k == 0 and _splits(case.ask(shape, **{axis: k}), axis)]
    peers = sum(axis in getattr(p, case.role).axes for p in case.layouts.params.values())
    also = f", as it does {peers} of {len(case.layouts.params)}" if peers else ""
    change = (
        f"Make {now.names[d]} a multiple of {math.prod(case.layouts.sizes[a] for a in (*now.dims[d], axis))}"
    )
    change += f" ({shape[d]} -> {padded})" + (
        f", or set mesh axis {axis} to {smaller[0]}." if smaller else "."
    )
    yield axis, f"splits such an array {WHEN[case.role]}{also}, but no dim of this one divides by {n}", change


def _splits(placed: Mapping[str, Split], axis: str) -> bool:
    return any(s.axis == axis for s in placed.values())


def _declined(case: _Case) -> Iterator[tuple[str, str, str]]:
    """The rule gave way to another on this dim, so that the axis splits nothing of this array."""
    now = getattr(case.lies, case.role)
    for name, split in case.ask(case.array.shape).items():
        d = now.names.index(name)
        if split.when_taken != "decline" or not now.dims[d] or not case.lacks(split.axis):
            continue
        parts = math.prod(case.layouts.sizes[a] for a in (*now.dims[d], split.axis))
        first = next(r for r in now.reasons if r.name == name and r.size > 1)
        if case.array.shape[d] % parts == 0:
            change = f"Let it split {name} further with also({split.axis!r}), or another dim."
        else:
            change = f"Let it split another dim ({name} = {case.array.shape[d]} does not divide by {parts})."
        yield (
            split.axis,
            f"left {name} whole, which {first.rule} ({first.source}) splits over {first.axis}",
            change,
        )


def _unnamed(case: _Case, arrays: Mapping[str, Array]) -> Iterator[tuple[str, str, str]]:
    """The rule names dims and splits this array's neighbours in the same module, but names no dim of this one."""
    table, now = getattr(case.rule, case.role), getattr(case.lies, case.role)
    if callable(table) or set(table) & set(now.names):
        return
    module = case.path.rpartition(".")[0]
    beside = [p for p in arrays if p.rpartition(".")[0] == module and p != case.path]
    kept = {n for r in case.layouts.rules.chain for n in r.replicated}
    for axis in dict.fromkeys(getattr(s, "axis", s) for s in table.values()):
        split = {
            p: next(r for r in getattr(case.layouts.params[p], case.role).reasons if r.axis == axis)
            for p in beside
            if axis in getattr(case.layouts.params[p], case.role).axes
        }
        split = {p: r for p, r in split.items() if (r.rule, r.source) == (case.rule.call, case.rule.source)}
        known = {n for p in split for n in case.layouts.params[p].param.names} | kept | {"layers", *PLACES}
        n = case.layouts.sizes.get(axis, 1)
        free = [
            name for name, dims, whole in zip(now.names, now.dims, case.array.shape, strict=True)
            if name not in known and not dims and whole % n == 0
        ]  # fmt: skip
        if split and free and case.lacks(axis):
            near = ", ".join(p.rpartition(".")[2] for p in split)
            names = " ".join(now.names)
            yield (
                axis,
                f"splits its neighbours {near}, but names none of {names}",
                (
                    f"Add {free[0]!r} to the rule (it divides by {n}), or say that it stays whole: replicated({free[0]!r})."
                ),
            )
