"""Positions of two dims told as one, and parameters added to activations: what turns an image into a sequence."""

from __future__ import annotations

import math

from jax import Array

from sharding.errors import InputError
from sharding.operands import Operand
from sharding.ops import in_use, used_globally
from sharding.ordered import enter, ordered
from sharding.region import current, names_of, tap
from sharding.relayout import varying
from sharding.scope import named


@named
def merge(x: Array, spec: str) -> Array:
    """Two neighbouring dims as one, row after row: `merge(x, "batch height width embed -> batch length embed")`.

    Where the merged dim is split as the first of the two is, each device holds its rows already and nothing moves;
    otherwise the array is brought there. InputError where an axis that splits the image would split nothing afterwards,
    so that its devices would all do the same.
    """
    words, into, at = _parsed(spec, x.ndim)
    shape = (*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])
    region = current()
    if region is None or not region.manual:
        made = x.reshape(shape)
        return tap("merge", into, made if region is None else region.constrain(made, region.dims(into)))
    src, want = region.dims(words), region.dims(into)
    idle = {a for dim in src for a in dim} - {a for dim in want for a in dim}
    if idle:
        over = " x ".join(sorted(idle))
        raise InputError(
            f"merge {spec!r}: {over} splits the image ({region.layouts.activation(words).text()}) and nothing of what it "
            f"becomes ({region.layouts.activation(into).text()}): its devices would all do the same work. Chain a rule that "
            f"splits {into[at]} over {over}, or leave the image whole."
        )
    parts = math.prod(region.layouts.sizes[a] for a in want[at])
    rows = x.shape[at] * math.prod(region.layouts.sizes[a] for a in src[at])
    first = want[at] if rows % parts == 0 else ()  # fewer rows than parts: whole, then cut
    x = region.move(x, src, (*want[:at], first, (), *want[at + 1 :]))
    made = x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])
    made = region.move(made, (*want[:at], first, *want[at + 1 :]), want)
    return tap("merge", into, enter(region, made, into))


@named
def add(x: Array, names: str, w: Operand) -> Array:
    """`x + w` for a parameter whose dims are some of `names`, the dims of `x`, in their order: a table of positions, a bias.

    The parameter is cast to the dtype of `x` and cut as `x` lies.
    """
    words = tuple(names.split())
    of_w = names_of(w) or words[-w.ndim :]
    if [n for n in words if n in of_w] != list(of_w):
        raise InputError(
            f"add: a parameter of the dims {' '.join(of_w)!r} is to be added to an array of {names!r}. Its dims must be "
            f"some of those, in their order."
        )
    shape = lambda w: tuple(w.shape[of_w.index(n)] if n in of_w else 1 for n in words)
    region = current()
    if region is None or not region.manual:
        whole = used_globally(region, w, x.dtype)
        made = x + whole.reshape(shape(whole))
        return tap("add", words, made if region is None else region.constrain(made, region.dims(words)))
    held, lies = in_use(region, w, of_w, varying(x))
    for d, n in enumerate(of_w):
        if (
            region.ordered(n)[0] is not None
        ):  # positions do not lie as they count: neither may what is added to them
            whole = (*lies[:d], (), *lies[d + 1 :])
            held, lies = ordered(region, region.move(held, lies, whole, varying(x)), d, n), whole
    here = tuple(axes for n, axes in zip(words, region.dims(words), strict=True) if n in of_w)
    held = region.move(held.astype(x.dtype), lies, here, varying(x))
    return tap("add", words, x + held.reshape(shape(held)))


def _parsed(spec: str, ndim: int) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """Names before and after, and the place of the first of the two that become one."""
    left, _, right = spec.partition("->")
    words, into = tuple(left.split()), tuple(right.split())
    at = next((i for i, n in enumerate(into) if n not in words), -1)
    if at < 0 or (*words[:at], into[at], *words[at + 2 :]) != into or len(words) != ndim:
        raise InputError(
            f"merge {spec!r} of an array of {ndim} dims: write its dims, an arrow, and the same with two neighbours replaced "
            f"by one new name, as in 'batch height width embed -> batch length embed'."
        )
    return words, into, at


__all__ = ["add", "merge"]
