"""What a traced step does, read from its jaxpr: every collective with its axes, bytes and source line, and its FLOPs.

Nothing runs and no device is needed. With the manual partitioner the jaxpr holds every collective of the step, so the
list is exact; under XLA's partitioner it holds none, since XLA decides after tracing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import flax
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

KINDS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_gather_reduced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "unreduced_reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "permute",
}
"""jax primitive -> the collective it is."""


@dataclass(frozen=True)
class Collective:
    """One collective of a traced step. `bytes` are those that each device sends in one step, all repeats together, on
    a ring: (n-1)/n of the larger side, twice that for an all-reduce.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    dtype: str
    shape: tuple[int, ...]
    """Local shape of the operand."""
    times: int
    """Repeats in one step: loop trip counts multiplied."""
    bytes: int
    source: str
    """file:line of the code that asked for it, where jax knows."""


def collectives(jaxpr: ClosedJaxpr, sizes: Mapping[str, int]) -> list[Collective]:
    """Every collective in a jaxpr over axes of more than one device, in program order; loops count their trips."""
    found = []
    for eqn, times in equations(jaxpr.jaxpr, 1):
        kind = KINDS.get(eqn.primitive.name)
        if kind is None:
            continue
        named = eqn.params.get("axes", eqn.params.get("axis_name", ()))
        axes = tuple(
            a for a in (named if isinstance(named, (tuple, list)) else (named,)) if sizes.get(a, 1) > 1
        )
        n = math.prod(sizes[a] for a in axes)
        if n == 1:
            continue
        for var in eqn.invars:
            aval: Any = var.aval
            size = math.prod(aval.shape) * aval.dtype.itemsize
            sent = _sent(kind, size, n) * times
            found.append(
                Collective(kind, axes, n, str(aval.dtype), tuple(aval.shape), times, sent, _source(eqn))
            )
    return found


def per_axis(found: list[Collective]) -> dict[tuple[str, ...], dict[str, tuple[int, int]]]:
    """Axes -> kind -> (how many in a step, bytes that each device sends in a step)."""
    table: dict[tuple[str, ...], dict[str, tuple[int, int]]] = {}
    for c in found:
        count, sent = table.setdefault(c.axes, {}).get(c.kind, (0, 0))
        table[c.axes][c.kind] = (count + c.times, sent + c.bytes)
    return table


def flops(jaxpr: ClosedJaxpr) -> int:
    """FLOPs of every matrix product in a jaxpr (2 per multiply-add), loop trips multiplied; elementwise work is left out."""
    total = 0
    for eqn, times in equations(jaxpr.jaxpr, 1):
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            deep = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * deep * times
    return total


def equations(jaxpr: Jaxpr, times: int) -> Iterator[tuple[Any, int]]:
    """Every equation with how often it runs; bodies of `while` count once, of `cond` every branch."""
    for eqn in jaxpr.eqns:
        inner = list(_inner(eqn.params))
        if not inner:
            yield eqn, times
        again = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for body in inner:
            yield from equations(body, again)


def _inner(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _sent(kind: str, size: int, n: int) -> int:
    if kind == "all-reduce":
        return 2 * size * (n - 1) // n
    if kind == "all-gather":
        return size * (n - 1)
    if kind == "permute":
        return size
    return size * (n - 1) // n


def _source(eqn: Any) -> str:
    """file:line of the innermost frame outside jax, flax and this package; "" where jax kept none."""
    frames = user_frames(eqn)
    return next((where for where, ours in frames if not ours), "")


def user_frames(eqn: Any) -> list[tuple[str, bool]]:
    """(file:line, whether it is of this package) of the frames outside jax and flax, innermost first."""
    traceback = eqn.source_info.traceback
    frames = [] if traceback is None else traceback.frames
    outside = [f for f in frames if not f.file_name.startswith(_LIBRARIES)]
    return [(f"{f.file_name}:{f.line_num}", f.file_name.startswith(_HERE)) for f in outside]


_HERE = __file__.rpartition("/")[0] + "/"
_LIBRARIES = tuple(str(m.__file__).rpartition("/")[0] + "/" for m in (jax, flax))


def trace(function: Any, *arguments: Any) -> ClosedJaxpr:
    """The jaxpr of a function for abstract arguments (`jax.ShapeDtypeStruct` leaves)."""
    return jax.make_jaxpr(function)(*arguments)
