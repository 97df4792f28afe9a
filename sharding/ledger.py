"""What a traced step does, read from its jaxpr: every collective with its axes, bytes and source line, and its FLOPs.

Nothing runs and no device is needed. With the manual partitioner the jaxpr holds every collective of the step, so the
list is exact; under XLA's partitioner it holds none, since XLA decides after tracing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from sharding.scope import Scope, scope_of

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


PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
"""jax primitives whose FLOPs are counted."""


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
    op: str = ""
    """The named op called there, or the step's function that moves it."""
    scope: Scope = Scope()
    """The pass, the layers and the named op's text that it belongs to."""

    @property
    def payload(self) -> int:
        """Bytes of the operand on a device, all repeats together."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize * self.times


def collectives(jaxpr: ClosedJaxpr, sizes: Mapping[str, int]) -> list[Collective]:
    """Every collective in a jaxpr over axes of more than one device, in program order; loops count their trips."""
    found = []
    for eqn, times, stack in equations(jaxpr.jaxpr):
        kind = KINDS.get(eqn.primitive.name)
        if kind is None:
            continue
        named = eqn.params.get("axes", eqn.params.get("axis_name", ()))
        given = named if isinstance(named, (tuple, list)) else (named,)
        axes = tuple(a for a in sizes if a in given and sizes[a] > 1)
        n = math.prod(sizes[a] for a in axes)
        if n == 1:
            continue
        for var in eqn.invars:
            aval: Any = var.aval
            size = math.prod(aval.shape) * aval.dtype.itemsize
            sent, what = sent_bytes(kind, size, n) * times, (str(aval.dtype), tuple(aval.shape))
            source, op = asked_by(eqn)
            scope = scope_of(stack)
            found.append(Collective(kind, axes, n, *what, times, sent, source, scope.op or op, scope))
    return found


def per_axis(found: Iterable[Collective]) -> dict[tuple[str, ...], dict[str, tuple[int, int]]]:
    """Axes -> kind -> (how many in a step, bytes that each device sends in a step)."""
    table: dict[tuple[str, ...], dict[str, tuple[int, int]]] = {}
    for c in found:
        count, sent = table.setdefault(c.axes, {}).get(c.kind, (0, 0))
        table[c.axes][c.kind] = (count + c.times, sent + c.bytes)
    return table


def flops(jaxpr: ClosedJaxpr) -> int:
    """FLOPs of every matrix product and convolution in a jaxpr (2 per multiply-add), loop trips multiplied; elementwise
    work is left out.
    """
    total = 0
    for eqn, times, _ in equations(jaxpr.jaxpr):
        if eqn.primitive.name in PRODUCTS:
            total += product_flops(eqn) * times
    return total


def product_flops(eqn: Any) -> int:
    """FLOPs of one product or convolution, 2 per multiply-add: of a convolution with the zeros at its edges, of a product over
    groups (`ragged_dot_general`) those of all rows, each of which is in one group.
    """
    if eqn.primitive.name == "conv_general_dilated":
        kernel, of = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
        spread = math.prod(
            eqn.params["lhs_dilation"]
        )  # of so many positions all but one are zeros put between
        return 2 * math.prod(eqn.outvars[0].aval.shape) * (math.prod(kernel) // kernel[of[0]]) // spread
    groups = 1
    if eqn.primitive.name == "ragged_dot_general":
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (contract, _), _ = numbers.dot_dimension_numbers
        if numbers.lhs_ragged_dimensions[0] in contract:  # a matrix a group, each the sum over its own rows
            groups = eqn.outvars[0].aval.shape[0]
    else:
        (contract, _), _ = eqn.params["dimension_numbers"]
    deep = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
    return 2 * math.prod(eqn.outvars[0].aval.shape) * deep // groups


def equations(jaxpr: Jaxpr, times: int = 1, stack: str = "") -> Iterator[tuple[Any, int, str]]:
    """Every equation with how often it runs and its name stack; bodies of `while` count once, of `cond` every branch."""
    for eqn in jaxpr.eqns:
        inner, here = list(subjaxprs(eqn.params)), f"{stack}/{eqn.source_info.name_stack}"
        if not inner:
            yield eqn, times, here
        again = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for body in inner:
            yield from equations(body, again, here)


def subjaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """The bodies that an equation calls."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def scan_counts(eqn: Any) -> tuple[int, int]:
    """(constants, carried) of a `scan`: how many of its operands its body is given as they are, and how many from trip to trip.

    Read from the shapes, since jax's versions note it differently: rows and stacks have one dim more outside.
    """
    body = eqn.params["jaxpr"].jaxpr
    alike = lambda outer, inner: sum(a.aval.shape == b.aval.shape for a, b in zip(outer, inner, strict=True))
    carried = alike(eqn.outvars, body.outvars)
    return alike(eqn.invars, body.invars) - carried, carried


def sent_bytes(kind: str, size: int, n: int) -> int:
    """Bytes that each of `n` devices sends for one collective whose operand has `size` bytes on a device, on a ring."""
    if kind == "all-reduce":
        return 2 * size * (n - 1) // n
    if kind == "all-gather":
        return size * (n - 1)
    if kind == "permute":
        return size
    return size * (n - 1) // n


def asked_by(eqn: Any) -> tuple[str, str]:
    """(file:line, op) of the code that asked for an equation: a model's line and the named op that it calls there.

    What the step adds itself, such as the reduction of gradients, and a backward pass written by hand have this
    package's line and function instead. ("", primitive) where jax kept no line.
    """
    traceback = eqn.source_info.traceback
    frames = [] if traceback is None else traceback.frames
    return asked_from([(f.file_name, f.line_num, f.function_name) for f in frames], eqn.primitive.name)


def asked_from(frames: Iterable[tuple[str, int, str]], op: str) -> tuple[str, str]:
    """The same from (file, line, function), innermost first; `op` is what it is called where no function has called it."""
    own = None
    for file, line, function in frames:
        if frame_kind(file) == "library":
            continue
        name = function.rpartition(".")[2]
        if frame_kind(file) == "model":
            return f"{file}:{line}", op
        if file not in _MOVERS:
            own = own or (f"{file}:{line}", name)
            own = (own[0], name) if own[1].startswith("<") else own  # a comprehension's function is around it
        if file == _STEP:  # whoever stands further out called the step, and asked for nothing in it
            break
        op = name
    return own or ("", op)


def user_frames(eqn: Any) -> list[tuple[str, bool]]:
    """(file:line, whether it is of this package) of the frames outside jax and flax, innermost first."""
    traceback = eqn.source_info.traceback
    frames = [] if traceback is None else traceback.frames
    kinds = [(f, frame_kind(f.file_name)) for f in frames]
    return [(f"{f.file_name}:{f.line_num}", kind == "ours") for f, kind in kinds if kind != "library"]


def frame_kind(file: str) -> str:
    """Whose code a file is: "library" (jax and flax, and what only names an op), "ours" (this package), or "model"."""
    if file.startswith(_LIBRARIES):
        return "library"
    return "ours" if file.startswith(_HERE) else "model"


_HERE = __file__.rpartition("/")[0] + "/"
_STEP = _HERE + "step.py"
_MOVERS = (_HERE + "relayout.py", _HERE + "region.py")
_LIBRARIES = (*(str(m.__file__).rpartition("/")[0] + "/" for m in (jax, flax)), _HERE + "scope.py")
