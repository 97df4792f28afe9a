"""The difference of two plans in words: figures with their sign, layouts with the rule that changed them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments.plans.words import NOTHING, duration, percent
from sharding.finding import human

if TYPE_CHECKING:
    from experiments.explanation import Line
    from experiments.plans.compared import MovedArray, PlanDifference
    from experiments.plans.figures import Traffic


def figure_text(value: float | None, unit: str) -> str:
    """A figure in its unit, or a dash."""
    if value is None:
        return NOTHING
    if unit == "bytes":
        return human(value)
    if unit == "seconds":
        return duration(value)
    return percent(value) if unit == "share" else f"{human(value, '', 1000)}/s"


def changed_text(a: float | None, b: float | None, unit: str) -> str:
    """`+1.5 MiB (+12 %)`: what the second has more, of what the first has."""
    if a is None or b is None:
        return (
            "not in A"
            if a is None and b is not None
            else "not in B"
            if b is None and a is not None
            else NOTHING
        )
    change = b - a
    if not change:
        return "="
    sign = "+" if change > 0 else "-"
    if unit == "share":
        return f"{sign}{abs(100 * change):.2g} points"
    share = f" ({sign}{percent(abs(change) / a)})" if a else ""
    return f"{sign}{figure_text(abs(change), unit)}{share}"


def amount_text(amount: tuple[int, int] | None) -> str:
    """Bytes, and in how many collectives."""
    return f"{human(amount[1])} ({amount[0]:,})" if amount else NOTHING


def changed_bytes(r: Traffic) -> str:
    """What a device sends more in the second plan."""
    a, b = r.a or (0, 0), r.b or (0, 0)
    if a[1] == b[1]:
        return f"{b[0] - a[0]:+,} collectives"
    return changed_text(a[1], b[1], "bytes")


def shapes(m: MovedArray) -> str:
    """The array's shape and dtype in both plans, once where they are equal."""
    told = dict.fromkeys(_shape(x) for x in (m.a, m.b) if x)
    return " -> ".join(told)


def _shape(line: Line) -> str:
    copies = f"{line.copies} x " if line.copies > 1 else ""
    return f"{copies}{'x'.join(map(str, line.shape)) or 'scalar'} {line.dtype}"


def layouts(m: MovedArray, ours: Mapping[str, int], theirs: Mapping[str, int]) -> tuple[str, str]:
    """Its layout in either plan; with the sizes of the axes where only these differ."""
    texts = tuple(_layout(x) for x in (m.a, m.b))
    if texts[0] == texts[1] and m.a and m.b:
        return (_sized(m.a, ours), _sized(m.b, theirs))
    return texts  # pyright: ignore[reportReturnType]


def _layout(line: Line | None) -> str:
    if line is None:
        return "not there"
    where = " in the host's memory" if line.memory == "host" else ""
    used = f" (in use {line.in_use})" if line.in_use else ""
    return f"{line.layout or 'a scalar'}{used}{where}"


def _sized(line: Line, mesh: Mapping[str, int]) -> str:
    words = (
        "/".join((n, *(f"{a}:{mesh.get(a, 1)}" for a in axes)))
        for n, axes in zip(line.names, line.dims, strict=True)
    )
    return " ".join(words) or _layout(line)


def how_moved(m: MovedArray) -> tuple[str, ...]:
    """`+ mlp/tensor 4 by tensor() sharding/rules/tensor.py:11`, `embed/fsdp 2 -> 8 by ...`: each split that it gained, lost or
    has otherwise, with its rule; or why there is none.
    """
    lost = {(p.name, p.axis): p for p in m.lost}
    told = []
    for p in m.gained:
        before = lost.pop((p.name, p.axis), None)
        size = f"{before.size} -> {p.size}" if before else f"{p.size}"
        told.append(f"{'' if before else '+ '}{p.name}/{p.axis} {size} by {p.rule} {p.source}")
    told += [f"- {p.name}/{p.axis} {p.size} by {p.rule} {p.source}" for p in lost.values()]
    if m.a is None or m.b is None:
        return ("only in B" if m.a is None else "only in A",)
    if m.a.shape != m.b.shape or m.a.dtype != m.b.dtype:
        told.append("of another shape or dtype")
    if m.a.memory != m.b.memory:
        told.append(f"in the memory of the {m.b.memory}, not of the {m.a.memory}")
    if m.a.in_use != m.b.in_use:
        told.append(f"in use {m.a.in_use or 'as at rest'} -> {m.b.in_use or 'as at rest'}")
    return tuple(told) or ("the axes of a dim in another order",)


def mesh_words(mesh: Mapping[str, int]) -> str:
    """`data 2 x fsdp 4`."""
    return " x ".join(f"{a} {n}" for a, n in mesh.items()) or "one device"


def not_in(told: PlanDifference) -> tuple[str, ...]:
    """What one of the plans could not say, or exceeds."""
    named = [
        f"{name} lacks {words}" for name, side in (("A", told.a), ("B", told.b)) for words in side.missing
    ]
    named += [
        f"{name} is over its budget: {words}"
        for name, side in (("A", told.a), ("B", told.b))
        for words in side.over_budget
    ]
    return tuple(named)
