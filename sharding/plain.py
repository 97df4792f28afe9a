"""The check that a model uses plain jax only where it is right on shards: never across a dim that an axis splits.

Inside the manual region arrays are shards. Elementwise code does not mind; a softmax, mean, sort or product over a dim
that an axis splits sees only this device's part, and `x[:, 1:]`, a roll, a pad or a concatenation along it takes
positions of the part for positions of the whole. The results are plausible numbers. Types cannot tell. But the same
model traced once whole and once as shards shows it: what one source line asks for runs over other sizes there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

from sharding.errors import InputError
from sharding.layout import Layouts
from sharding.ledger import frame_kind, subjaxprs, user_frames
from sharding.region import Tap

ALONG = {
    "argmax": "axes",
    "argmin": "axes",
    "cumlogsumexp": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumprod": "axis",
    "cumsum": "axis",
    "reduce_and": "axes",
    "reduce_max": "axes",
    "reduce_min": "axes",
    "reduce_or": "axes",
    "reduce_prod": "axes",
    "reduce_sum": "axes",
    "sort": "dimension",
}
"""Primitives that combine the elements of a dim -> the parameter that says which dims."""

PLACED = {"concatenate": "dimension", "rev": "dimensions", "split": "axis"}
"""Primitives that know the positions of a dim -> the parameter that says which dims; others are in `_places`."""

Sizes = dict[tuple[str, str], set[tuple[int, ...]]]
"""(file:line, primitive) -> the sizes of the dims that it runs over."""


def check_plain(whole: ClosedJaxpr, local: ClosedJaxpr) -> None:
    """Refuse, with InputError, a forward pass whose model code combines or picks elements along a dim that is split.

    `whole` is its trace on global arrays, `local` that of the manual region. `iota` is let through: `arange` over the
    size of a split dim is right where it counts local elements, and `sharding.ops.positions` gives global ones.
    """
    expected, found = _sizes(whole, _combines), _sizes(local, _combines)
    for (where, primitive), sizes in found.items():
        wrong = sizes - expected.get((where, primitive), set())
        if wrong:
            full = _listed(expected.get((where, primitive), set())) or "another number of"
            raise InputError(
                f"{where}: plain jax ({primitive}) runs over {_count(min(wrong))} elements of a dim that has {full} in all, "
                f"because an axis splits it: every device would reduce its own part, silently. Use a named op of "
                f"sharding.ops there (an einsum sums over a name), or choose rules that leave the dim whole."
            )
    expected, found = _sizes(whole, _places), _sizes(local, _places)
    for where, primitive in dict.fromkeys((*expected, *found)):  # in the order of the program
        here, there = found.get((where, primitive), set()), expected.get((where, primitive), set())
        if here != there:
            there = there or set().union(*(s for at, s in expected.items() if at[0] == where))
            part = _listed(here - there) or "fewer"
            raise InputError(
                f"{where}: plain jax ({primitive}) picks or joins positions along a dim that has {_listed(there) or 'more'} "
                f"elements in all and {part} on a device, because an axis splits it: every device would take positions of "
                f"its own part, silently. Bring the dim together first (sharding.ops.whole, then back), or choose rules "
                f"that leave it whole."
            )


def refuse_failed(error: Exception, whole: ClosedJaxpr, taps: Iterable[Tap], layouts: Layouts) -> None:
    """Turn jax's error on shards into an InputError when plain jax of the model is to blame; return when it is not.

    The forward pass was traced whole, as `whole` with its `taps`, and failed as shards with `error`. To blame is a line
    that runs along a split dim of an array that a named op made (told by its shape), else the line that failed.
    """
    suspects = {}
    made = {t.shape: layouts.activation(t.names) for t in taps}
    for eqn, frames in _framed(whole.jaxpr, []):
        dims = (*_combines(eqn), *_places(eqn))
        lies = made.get(tuple(eqn.invars[0].aval.shape)) if dims else None
        if lies is None or not frames or frames[0][1]:
            continue
        for d in dims:
            if lies.dims[d]:
                suspects.setdefault(
                    (frames[0][0], eqn.primitive.name), (lies, d, eqn.invars[0].aval.shape[d])
                )
    for (where, primitive), (lies, d, n) in suspects.items():
        parts = math.prod(layouts.sizes[a] for a in lies.dims[d])
        by = next(r for r in lies.reasons if r.name == lies.names[d])
        raise InputError(
            f"{where}: plain jax ({primitive}) runs along {lies.names[d]} = {n}, which rule {by.rule} ({by.source}) splits "
            f"over {' x '.join(lies.dims[d])} into {parts} parts of {n // parts}: the model cannot be traced on shards. "
            f"Choose rules that leave {lies.names[d]} whole, or bring the dim together there (sharding.ops.whole, then "
            f"back)."
        ) from error
    line = _failed_in_model(error)
    if line:
        said = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{line}: plain jax of the model works on whole arrays but fails on shards ({type(error).__name__}: {said}). The "
            f"rules {layouts.rules!r} split a dim that it runs along. Use a named op of sharding.ops there, or choose "
            f"rules that leave the dim whole."
        ) from error


def _sizes(jaxpr: ClosedJaxpr, dims_of: Any) -> Sizes:
    """What model code asks for itself, with no named op between, and the sizes of the dims that it runs over."""
    found: Sizes = {}
    for eqn, frames in _framed(jaxpr.jaxpr, []):
        dims = dims_of(eqn)
        if dims and frames and not frames[0][1]:  # the innermost frame is the model's
            joined = eqn.primitive.name == "concatenate"
            sizes = tuple((eqn.outvars if joined else eqn.invars)[0].aval.shape[d] for d in dims)
            found.setdefault((frames[0][0], eqn.primitive.name), set()).add(sizes)
    return found


def _framed(jaxpr: Jaxpr, outer: list[tuple[str, bool]]) -> Iterator[tuple[Any, list[tuple[str, bool]]]]:
    """Every equation with the frames of whoever asked for it. Those inside a jitted function (`jnp.roll` is one) are those
    of its call: its trace is cached, and names whoever called it first.
    """
    for eqn in jaxpr.eqns:
        inner, frames = list(subjaxprs(eqn.params)), outer or user_frames(eqn)
        if not inner:
            yield eqn, frames
        jitted = eqn.primitive.name in ("jit", "pjit")
        for body in inner:
            yield from _framed(body, frames if jitted else outer)


def _combines(eqn: Any) -> tuple[int, ...]:
    """Dims of the first operand whose elements are combined."""
    name = eqn.primitive.name
    if name == "dot_general":
        return tuple(eqn.params["dimension_numbers"][0][0])
    if name == "top_k":
        return (eqn.invars[0].aval.ndim - 1,)
    return _listed_dims(eqn.params[ALONG[name]]) if name in ALONG else ()


def _places(eqn: Any) -> tuple[int, ...]:
    """Dims of the first operand along which an equation knows one position from another."""
    name, p = eqn.primitive.name, eqn.params
    if name in PLACED:
        return _listed_dims(p[PLACED[name]])
    shape = tuple(getattr(eqn.invars[0].aval, "shape", ())) if eqn.invars else ()
    if name == "slice":
        strides = p["strides"] or (1,) * len(shape)
        taken = zip(p["start_indices"], p["limit_indices"], strides, shape, strict=True)
        return tuple(d for d, (a, z, by, n) in enumerate(taken) if (a, z, by) != (0, n, 1))
    if name in ("dynamic_slice", "dynamic_update_slice"):
        some = p["slice_sizes"] if name == "dynamic_slice" else eqn.invars[1].aval.shape
        return tuple(d for d, (k, n) in enumerate(zip(some, shape, strict=True)) if k != n)
    if name == "pad":
        return tuple(d for d, edges in enumerate(p["padding_config"]) if any(edges))
    if name == "gather":
        return tuple(p["dimension_numbers"].start_index_map)
    if name.startswith("scatter"):
        return tuple(p["dimension_numbers"].scatter_dims_to_operand_dims)
    if name == "tile":
        return tuple(d for d, n in enumerate(p["reps"]) if n > 1)
    if name == "conv_general_dilated":
        of, window = p["dimension_numbers"].lhs_spec, p["dimension_numbers"].rhs_spec[2:]
        kernel = (eqn.invars[1].aval.shape[d] for d in window)
        moves = zip(of[2:], kernel, p["window_strides"], p["padding"], strict=True)
        return (of[1], *(d for d, k, by, edges in moves if k > 1 or by > 1 or any(edges)))
    if name == "fft":
        return tuple(range(len(shape) - len(p["fft_lengths"]), len(shape)))
    if name.startswith("reduce_window") or name in ("cumred_reduce_window", "select_and_gather_add"):
        return tuple(d for d, n in enumerate(p["window_dimensions"]) if n > 1)
    return ()


def _failed_in_model(error: Exception) -> str:
    """file:line of the innermost frame outside libraries when it is the model's; "" when it is this package's."""
    trace, last = error.__traceback__, ("", False)
    while trace is not None:
        kind = frame_kind(trace.tb_frame.f_code.co_filename)
        if kind != "library":
            last = (f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}", kind == "ours")
        trace = trace.tb_next
    return "" if last[1] else last[0]


def _listed_dims(dims: Any) -> tuple[int, ...]:
    return tuple(map(int, dims)) if isinstance(dims, (tuple, list)) else (int(dims),)


def _count(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _listed(sizes: set[tuple[int, ...]]) -> str:
    return ", ".join(_count(s) for s in sorted(sizes))
