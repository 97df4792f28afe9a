"""Double precision: a model in it, the oracle that a split's rounding is measured against, and the same with its own casts left
out.

A step in double still rounds where its model or its optimizer casts by itself (`x.astype(bfloat16)`, products with a
`preferred_element_type`, moments kept in bfloat16), wherever the cast stands: in a scan, a jit, a checkpoint, a backward pass
that was written out. `widely` runs its jaxpr with these casts left out: what lies between the two is what they round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from sharding.ledger import subjaxprs

M = TypeVar("M")

ROUNDS = ("convert_element_type", "reduce_precision")
"""Primitives that do nothing but give a floating or complex value another type, or as many bits as one."""
CALLS = (
    "pjit",
    "jit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
)
"""Primitives that do nothing but run a body. Nothing is differentiated any more, so those of gradients are among them."""
AS_WRITTEN = ("bitcast_convert_type", "pallas_call", "ffi_call", "pure_callback", "io_callback")
"""Primitives that mean the types that they were written for: they run in these."""


def widened(dtype: Any) -> Any:
    """float64 for a floating dtype, complex128 for a complex one, any other (of random keys too) as it is."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex128)
    return np.dtype(np.float64) if jnp.issubdtype(dtype, jnp.floating) else dtype


def doubled(model: M) -> M:
    """The model, whose floating parameters and batch entries are float64 from now on. Its own activations must follow
    them: a model that has a `dtype` is built with "float64".
    """
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        old = variable.get_value()
        variable.set_value(jax.ShapeDtypeStruct(old.shape, widened(old.dtype)))
    inputs = getattr(model, "inputs")  # noqa: B009  (a protocol's field, which a type variable does not show)
    wide = {k: replace(e, dtype=str(widened(e.dtype))) for k, e in inputs.items()}
    setattr(model, "inputs", wide)  # noqa: B010  (as above)
    return model


def widely(function: Callable[..., Any], *types: Any) -> Callable[..., Any]:
    """The function without its own casts to narrower types: what follows one stays in float64 (complex128 of complex numbers).
    To be called where float64 is enabled; all floating results are float64. What is narrower from the start (made of integers)
    stays as it is.

    types: arguments whose shapes and types the function is traced at, where those that it is run with are wider: its own code
    may only fit the types it was written for. None: it is traced at what it is run with. Where none of them is double, it is
    traced with float64 disabled, as it is when it trains: there a default type is float32.
    """

    def run(*given: Any) -> Any:
        with jax.enable_x64(not types or of_double(types)):
            closed, made = jax.make_jaxpr(function, return_shape=True)(*(types or given))
        values = _run(closed.jaxpr, closed.consts, jax.tree.leaves(given))
        return jax.tree.unflatten(jax.tree.structure(made), [_widen(x) for x in values])

    return run


def of_double(types: Any) -> bool:
    """Whether a floating or complex array of a tree is of double precision."""
    return any(x.dtype in (np.float64, np.complex128) for x in jax.tree.leaves(types))


def floats(jaxpr: Jaxpr) -> frozenset[str]:
    """The floating and complex dtypes in which a jaxpr holds or makes anything, inner bodies included."""
    own = [*jaxpr.invars, *jaxpr.constvars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)]
    inner = (floats(body) for eqn in jaxpr.eqns for body in subjaxprs(eqn.params))
    held = [getattr(v.aval, "dtype", None) for v in own]
    mine = (str(to) for to in held if to is not None and jnp.issubdtype(to, jnp.inexact))
    return frozenset(mine).union(*inner)


def narrowed(jaxpr: Jaxpr) -> frozenset[str]:
    """The floating and complex dtypes that a jaxpr itself goes to from finer ones, inner bodies included."""
    return frozenset(to for eqn in jaxpr.eqns for to in _narrowing(eqn))


def unit(dtype: Any) -> float:
    """The unit roundoff of a floating dtype, or of the parts of a complex one."""
    return float(jnp.finfo(dtype).eps) / 2


def _narrowing(eqn: Any) -> Iterator[str]:
    """The dtypes that an equation goes to from finer ones."""
    for body in subjaxprs(eqn.params):
        for inner in body.eqns:
            yield from _narrowing(inner)
    if eqn.primitive.name == "reduce_precision":
        yield from ("bfloat16",) if eqn.params["mantissa_bits"] < 23 else ()
    elif eqn.primitive.name in ROUNDS or eqn.params.get("preferred_element_type") is not None:
        to = eqn.outvars[0].aval.dtype
        among = [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]
        if all(jnp.issubdtype(x, jnp.inexact) for x in among) and unit(to) > min(map(unit, among)):
            yield str(to)


def _run(jaxpr: Jaxpr, consts: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """A jaxpr's results from arguments some of which are widened."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *given], strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else known[v]
    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _made(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _made(eqn: Any, given: list[Any]) -> Sequence[Any]:
    """What an equation makes of operands some of which are widened: if one is, or if the equation casts, of all widened."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        body = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
        return (
            _run(body.jaxpr, body.consts, given) if isinstance(body, ClosedJaxpr) else _run(body, (), given)
        )
    pairs = list(zip(given, eqn.invars, strict=True))
    wide = any(not isinstance(v, Literal) and x.dtype != v.aval.dtype for x, v in pairs)
    if name in AS_WRITTEN:
        given = [x.astype(v.aval.dtype) if not isinstance(v, Literal) else x for x, v in pairs]
    elif wide or any(_narrowing(eqn)):
        given = [_widen(x) for x in given]
        if name in ROUNDS and given[0].dtype == widened(eqn.outvars[0].aval.dtype):
            return given
        params = {k: _parameter(k, v) for k, v in params.items()}
    out = eqn.primitive.bind(*given, **params)
    return out if eqn.primitive.multiple_results else [out]


def _parameter(name: str, value: Any) -> Any:
    """An equation's parameter, for widened operands."""
    if isinstance(value, (jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset)):
        return None  # it names the types of its operands
    if isinstance(value, (tuple, list)):
        made = [_parameter(name, x) for x in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, ClosedJaxpr):
        return _body(value)
    if isinstance(value, Jaxpr):
        return _body(ClosedJaxpr(value, ())).jaxpr
    return widened(value) if isinstance(value, np.dtype) else value


def _body(closed: ClosedJaxpr) -> ClosedJaxpr:
    shapes = [jax.ShapeDtypeStruct(v.shape, widened(v.dtype)) for v in closed.in_avals]
    run = lambda *given: [_widen(x) for x in _run(closed.jaxpr, closed.consts, given)]
    return jax.make_jaxpr(run)(*shapes)


def _widen(x: Any) -> Any:
    """A value, in float64 if it is floating, in complex128 if it is complex."""
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    return jnp.asarray(x, widened(dtype)) if jnp.issubdtype(dtype, jnp.inexact) else x
