"""The check that a model reduces nothing over a split dim with plain jax, which would be silently wrong.

Inside the manual region arrays are shards. Elementwise code does not mind; a softmax, mean, sort or product over a dim
that an axis splits sees only this device's part, and its result is a plausible number. Types cannot tell. But the same
model traced once whole and once as shards shows it: the reduction at one source line runs over fewer elements.
"""

from __future__ import annotations

from typing import Any

from jax.extend.core import ClosedJaxpr

from sharding.errors import InputError
from sharding.ledger import equations, user_frames

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
    "rev": "dimensions",
    "sort": "dimension",
}
"""Primitives that mix the elements of a dim -> the parameter that says which dims."""


def check_reductions(whole: ClosedJaxpr, local: ClosedJaxpr) -> None:
    """Refuse, with InputError, a forward pass whose model code reduces over a dim that is split.

    `whole` is its trace on global arrays, `local` that of the manual region.
    """
    expected, found = _reductions(whole), _reductions(local)
    for (where, primitive), sizes in found.items():
        wrong = sizes - expected.get((where, primitive), set())
        if wrong:
            part = min(wrong)
            full = ", ".join(map(str, sorted(expected.get((where, primitive), set())))) or "another number of"
            raise InputError(
                f"{where}: plain jax ({primitive}) runs over {part} elements of a dim that has {full} in all, because an "
                f"axis splits it: every device would reduce its own part, silently. Use a named op of sharding.ops there "
                f"(an einsum sums over a name), or choose rules that leave the dim whole."
            )


def _reductions(jaxpr: ClosedJaxpr) -> dict[tuple[str, str], set[tuple[int, ...]]]:
    """(file:line, primitive) of every reduction that model code asks for itself -> the sizes it runs over."""
    found: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for eqn, _ in equations(jaxpr.jaxpr, 1):
        dims = _dims(eqn)
        frames = user_frames(eqn) if dims else []
        if frames and not frames[0][1]:  # the innermost frame is the model's: no named op stands between
            sizes = tuple(eqn.invars[0].aval.shape[d] for d in dims)
            found.setdefault((frames[0][0], eqn.primitive.name), set()).add(sizes)
    return found


def _dims(eqn: Any) -> tuple[int, ...]:
    name = eqn.primitive.name
    if name == "dot_general":
        return tuple(eqn.params["dimension_numbers"][0][0])
    if name == "top_k":
        return (eqn.invars[0].aval.ndim - 1,)
    dims = eqn.params[ALONG[name]] if name in ALONG else ()
    return (dims,) if isinstance(dims, int) else tuple(dims)
