"""What one device computes, reads and writes in a traced step: FLOPs by dtype, and bytes of memory, per op.

Read from the jaxpr, with local shapes (inside the manual region) and loop trips. What a compiler keeps out of memory is an
assumption, stated in `sharding.price.fusion`. Reshapes and transposes are free of charge where a product or a run reads through
them; products, gathers and the like read their operands from memory and write their results to it. Of elementwise ops the
bytes are counted and not the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from sharding.ledger import KINDS, PRODUCTS, product_flops, subjaxprs
from sharding.price.fusion import Runs, Value, Work
from sharding.scope import scope_of

__all__ = ["Work", "work"]


def work(jaxpr: ClosedJaxpr) -> list[Work]:
    """The work of a traced step on one device, in program order. Bodies of `while` count once, of `cond` every branch, as
    in `sharding.ledger.equations`. Outside the manual region, where shapes are those of all devices, elementwise ops are
    divided as the region divides the arrays that they work on, and products count whole.
    """
    return _body(jaxpr.jaxpr, 1, "")


def _body(jaxpr: Jaxpr, times: int, stack: str) -> list[Work]:
    """The work of a body that runs `times` times; what it is given and what it gives back lies in memory."""
    runs = Runs(times)
    given = [_external(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)]
    runs.keep(_inline(jaxpr, given, runs, stack))
    return runs.finish()


def _inline(jaxpr: Jaxpr, given: Sequence[Value], runs: Runs, stack: str) -> list[Value]:
    """Reads the equations of a body, those of the functions it calls included, into `runs`; what it gives back."""
    env: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), given, strict=True))

    def value(var: Any) -> Value:
        if isinstance(var, Literal):  # a number in the program's own text
            return Value(0, _dtype(var.aval))
        return env.setdefault(var, _external(var.aval))

    for eqn in jaxpr.eqns:
        here = f"{stack}/{eqn.source_info.name_stack}"
        made = _equation(eqn, [value(v) for v in eqn.invars], runs, here)
        env.update(zip(eqn.outvars, made, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _equation(eqn: Any, reads: list[Value], runs: Runs, stack: str) -> list[Value]:
    """Reads one equation into `runs`; the values that it makes."""
    name = eqn.primitive.name
    if name in _FREE:
        return [*reads, *(_external(v.aval) for v in eqn.outvars[len(reads) :])][: len(eqn.outvars)]
    if name in _PARTS:
        whole = reads[0]
        return [_part(whole, v.aval) for v in eqn.outvars]
    bodies = [] if name in _PLAIN or name.startswith(("scatter", "reduce_")) else list(subjaxprs(eqn.params))
    if bodies:
        return _call(eqn, bodies, reads, runs, stack)
    level = max((v.level for v in reads), default=0)
    if (name.startswith("reduce_") and name not in KINDS) or name in ("argmax", "argmin"):
        made = [Value(_size(v.aval), _dtype(v.aval), level=level + 1) for v in eqn.outvars]
        runs.add(reads, made, level, 1, stack)
    elif name in _HEAVY or name in KINDS or name in PRODUCTS or name.startswith(("scatter", "cum")):
        made = [Value(_size(v.aval), _dtype(v.aval), level=level + 1) for v in eqn.outvars]
        runs.keep(reads, level)
        runs.found.append(_heavy(eqn, reads, made, runs.times, stack))
    else:
        made = [Value(_size(v.aval), _dtype(v.aval), level=level) for v in eqn.outvars]
        runs.add(reads, made, level, 0, stack)
    return made


def _call(eqn: Any, bodies: list[Jaxpr], reads: list[Value], runs: Runs, stack: str) -> list[Value]:
    """An equation with bodies: a function called in place is read as if it stood here, a loop's body by itself."""
    name, body = eqn.primitive.name, bodies[0]
    in_place = name not in ("scan", "while", "cond", "shard_map") and len(body.invars) == len(reads)
    if in_place and len(body.outvars) == len(eqn.outvars):
        constants = [_external(v.aval) for v in body.constvars]
        return _inline(body, [*constants, *reads], runs, stack)
    level = max((v.level for v in reads), default=0)
    runs.keep(reads, level)
    times = runs.times * eqn.params["length"] if name == "scan" else runs.times
    for each in bodies:
        runs.found += _body(each, times, stack)
    made = [Value(_size(v.aval), _dtype(v.aval), level=level + 1) for v in eqn.outvars]
    if name == "shard_map":
        runs.divided = True
        within = zip((*reads, *made), (*body.invars, *body.outvars), strict=True)
        for value, inner in within:
            value.parts = max(value.parts, value.bytes // max(1, _size(inner.aval)))
    return made


def _heavy(eqn: Any, reads: list[Value], made: list[Value], times: int, stack: str) -> Work:
    """An op that reads its operands from memory and writes its results to it."""
    name, scope = eqn.primitive.name, scope_of(stack)
    moved, flops, dtype, precision, kind = sum(v.bytes for v in (*reads, *made)), 0, made[0].dtype, "", name
    if name in PRODUCTS:
        kind = "convolution" if name == "conv_general_dilated" else "product"
        flops, dtype, precision = product_flops(eqn), reads[0].dtype, _precision(eqn.params.get("precision"))
    elif name in KINDS:
        kind = "collective"
    elif name == "gather":
        kind, moved = "gather", 2 * made[0].bytes + reads[1].bytes
    elif name.startswith("scatter"):  # in place: only the rows that it changes move
        kind, moved = (
            "gather",
            (1 if name == "scatter" else 2) * reads[2].bytes + reads[1].bytes + reads[2].bytes,
        )
    elif name == "dynamic_update_slice":
        moved = 2 * reads[1].bytes
    return Work(kind, dtype, precision, flops, moved, times, scope)


def _precision(asked: Any) -> str:
    """Empty for jax's default, else the word of the higher of what is asked for both operands."""
    both = asked if isinstance(asked, tuple) else (asked,)
    words = {str(p).rpartition(".")[2].lower() for p in both if p is not None} - {"default"}
    return next((w for w in ("highest", "high", *sorted(words)) if w in words), "")


def _external(aval: Any) -> Value:
    return Value(_size(aval), _dtype(aval))


def _part(whole: Value, aval: Any) -> Value:
    return Value(_size(aval), whole.dtype, whole.node, whole.level, whole)


def _size(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ())) * getattr(getattr(aval, "dtype", None), "itemsize", 0)


def _dtype(aval: Any) -> str:
    return str(getattr(aval, "dtype", ""))


_FREE = frozenset(
    {
        "reshape", "squeeze", "expand_dims", "transpose", "bitcast_convert_type", "copy_p", "copy", "name", "stop_gradient",
        "pvary", "pcast", "sharding_constraint", "reshard", "mesh_cast", "optimization_barrier",
    }
)  # fmt: skip
"""Primitives that hand their operands on, in another shape at most."""

_PARTS = frozenset({"slice", "dynamic_slice", "split"})
"""Primitives whose results are parts of their first operand, read where they are used."""

_PLAIN = frozenset(
    {"sort", "top_k", "pallas_call", "custom_call", "reduce", "reduce_window", "select_and_scatter_add"}
)
"""Primitives whose bodies are no work of their own."""

_HEAVY = _PLAIN | frozenset(
    {
        "gather", "dynamic_update_slice", "fft", "cholesky", "eigh", "qr", "lu", "svd", "triangular_solve", "approx_top_k",
        "reduce_window_max", "reduce_window_sum", "reduce_window_min", "select_and_gather_add", "rng_bit_generator",
    }
)  # fmt: skip
"""Primitives that read their operands from memory and write their results to it."""
