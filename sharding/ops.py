"""The named ops that models speak: they compute what `jax.numpy` computes, and derive their collectives from layouts.

Arrays carry no wrapper: the op's text names the dims, and an activation with given names lies by the rules' layout for
those names. Parameters (`sharding.params.param`) carry their own names. The same call serves one device, the manual
region (local shards, explicit collectives) and XLA's partitioner (global arrays, sharding constraints).
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from sharding.contraction import parse
from sharding.errors import InputError
from sharding.layout import Dims
from sharding.operands import Operand, operand_lies, operands_of, split_axes
from sharding.ordered import natural, ordered
from sharding.overlap import ring_product
from sharding.partitioner import Manual
from sharding.product import product
from sharding.recomputed import recomputed
from sharding.region import Region, current, names_of, tap, value, wide
from sharding.relayout import finish, vary, varying
from sharding.scope import named


@named
def einsum(spec: str, *operands: Operand) -> Array:
    """Named contraction of one or two operands: `einsum("batch length embed, embed mlp -> batch length mlp", x, w)`.

    Names replace letters; a name missing from the result is summed over all of its elements on every device, so
    `einsum("batch length ->", loss)` is the global sum. Parameters are cast to the first activation's dtype before they
    are gathered. Collectives: those of the cheapest `sharding.contraction.plan`. Raises InputError when a parameter's
    names are not those the text gives it.
    """
    terms, result = parse(spec)
    if len(terms) != len(operands):
        raise InputError(f"einsum {spec!r} describes {len(terms)} operands but got {len(operands)}.")
    for names, x in zip(terms, operands, strict=True):
        if len(names) != value(x).ndim:
            raise InputError(
                f"einsum {spec!r}: the operand {' '.join(names)!r} has {len(names)} names but {value(x).ndim} dims."
            )
        if isinstance(x, nnx.Variable) and names_of(x) != names:
            raise InputError(
                f"einsum {spec!r} names a parameter's dims {' '.join(names)!r}, but {x.path} was declared as "
                f"{' '.join(names_of(x) or ())!r}. Write its own names in their order."
            )
    arrays = [x for x in operands if not isinstance(x, nnx.Variable)]
    dtype = arrays[0].dtype if arrays else value(operands[0]).dtype
    formula = _letters(terms, result)
    region = current()
    if region is None or region.mesh is None:
        made = jnp.einsum(formula, *(used_globally(region, x, dtype) for x in operands))
        return tap("einsum", result, _settle(region, made, result))
    ready = operands_of(region, spec, operands, dtype)
    if not region.manual:
        return tap("einsum", result, _settle(region, ready.stated(region, formula), result))
    if isinstance(region.partitioner, Manual) and region.partitioner.overlap == "ring":
        made = ring_product(region, formula, terms, result, ready)
        if made is not None:
            return tap("einsum", result, made)
    moved = ready.moved(region)
    if len(moved) == 2:
        made = product(formula, moved[0], moved[1], ready.plan.reduce if ready.by_matrix() else None)
    else:
        made = jnp.einsum(formula, *moved)
    return tap("einsum", result, finish(made, ready.plan.reduce, ready.plan.produced, ready.wanted))


@named
def embed(table: Operand, ids: Array, names: str, dtype: jnp.dtype | None = None) -> Array:
    """Rows `ids` of a table whose dims are `vocab embed`; `names` are the dims of `ids`. Result: those and `embed`.

    With the vocabulary split, each device looks up the rows that it holds and the partial results are reduced
    (Shoeybi et al. 2019, section 3). The table is cast to `dtype` (default: its own), which is the result's, before it
    is gathered; the gradients of a row's uses are summed in float32. ids: integers in [0, vocab).
    """
    into = tuple(names.split())
    rows, width = names_of(table) or ("vocab", "embed")
    result = (*into, width)
    region = current()
    if region is None or not region.manual:
        held = used_globally(region, table, dtype)
        taken = jnp.take(wide(held), ids, axis=0).astype(dtype or held.dtype)
        return tap("embed", result, _settle(region, taken, result))
    held, dims = in_use(region, table, (rows, width), varying(ids), dtype)
    wanted, lies = region.dims(result), region.dims(into)
    clash = set(dims[0]) | set(dims[1])
    dst = tuple(tuple(a for a in axes if a not in clash) for axes in lies)
    ids = region.move(ids, lies, dst, frozenset(clash))
    if dims[0]:
        ids, here = _own_rows(ids, dims[0], held.shape[0])
        taken = jnp.take(wide(held), jnp.clip(ids, 0, held.shape[0] - 1), axis=0, mode="clip")
        taken = jnp.where(here[..., None], taken, jnp.zeros((), taken.dtype))
    else:
        taken = jnp.take(wide(held), ids, axis=0)
    return tap("embed", result, finish(taken.astype(dtype or held.dtype), dims[0], (*dst, dims[1]), wanted))


@named
def rms_norm(x: Array, scale: Operand, names: str, eps: float = 1e-6) -> Array:
    """Root-mean-square norm over the last of `names` (Zhang and Sennrich 2019), in float32, times `scale`.

    The backward pass computes it again from `x` instead of keeping the result: one pass over an array that is kept
    anyway.
    """
    words = tuple(names.split())
    region = current()
    split: tuple[str, ...] = ()
    if region is None or not region.manual:
        weight = used_globally(region, scale, None)
    else:
        split = region.dims(words)[-1]
        held, lies = in_use(region, scale, words[-1:], varying(x))
        weight = region.move(held, lies, (split,), varying(x))

    @recomputed
    def norm(x: Array, weight: Array) -> Array:
        x32 = wide(x)
        mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        mean = lax.pmean(mean, split) if split else mean
        along = wide(weight).astype(x32.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * lax.rsqrt(mean + eps) * along).astype(x.dtype)

    return tap("rms_norm", words, _settle(region, norm(x, weight), words))


@named
def cross_entropy(logits: Array, labels: Array, names: str) -> Array:
    """Negative log-likelihood in nats of integer `labels` under `logits`, whose dims are `names`; float32.

    The classes are the last of `names`. Where they are split, only the maximum, the sum of exponentials and the label's
    logit cross devices, one number a token each (Shoeybi et al. 2019, section 3). Result: names without the last.
    `sharding.unembed` computes the same without whole logits. A label that is no class has the logit 0: weigh it 0.
    """
    return token_losses(logits, labels, names)[0]


def token_losses(logits: Array, labels: Array, names: str) -> tuple[Array, Array]:
    """`cross_entropy`, and the log-partition beside it: log sum exp of a token's logits, of which z-loss is a square."""
    words = tuple(names.split())
    kept = words[:-1]
    region = current()
    z, classes, dims = wide(logits), (), ()
    if region is not None and region.manual:
        dims = region.dims(words)
        classes = dims[-1]
        labels = region.move(labels, region.dims(kept), dims[:-1])
    top = jnp.max(lax.stop_gradient(z), axis=-1)
    if classes:
        top = lax.pmax(top, classes)
        labels, _ = _own_rows(labels, classes, z.shape[-1])
    total = jnp.sum(jnp.exp(z - top[..., None]), axis=-1)
    own = labels[..., None] == lax.broadcasted_iota(
        labels.dtype, z.shape, z.ndim - 1
    )  # fuses, unlike a gather
    chosen = jnp.sum(jnp.where(own, z, jnp.zeros((), z.dtype)), axis=-1)
    if classes:
        total, chosen = lax.psum((total, chosen), classes)
    partition = jnp.log(total) + top
    nats = partition - chosen
    if region is None or not region.manual:
        return tap("cross_entropy", kept, _settle(region, nats, kept)), _settle(region, partition, kept)
    lies = region.dims(kept)
    return tap("cross_entropy", kept, region.move(nats, dims[:-1], lies)), region.move(
        partition, dims[:-1], lies
    )


def positions(x: Array, names: str, name: str = "length") -> Array:
    """Global positions along the dim `name` of `x` as it lies here: int32, local length. `names` are the dims of `x`.

    They count up from one device to the next unless a rule lays this name in an order of its own.
    """
    words = tuple(names.split())
    at = words.index(name)
    region = current()
    index = jnp.arange(x.shape[at], dtype=jnp.int32)
    if region is None or not region.manual:
        return index
    axes, size = region.dims(words)[at], x.shape[at]
    if axes:
        index = index + (lax.axis_index(axes) * size).astype(jnp.int32)
        size = size * lax.axis_size(axes)
    order, parts = region.ordered(name)
    return index if order is None else order.position(index, size, parts)


def whole(x: Array, names: str, *full: str) -> tuple[Array, Dims]:
    """`x` with the dims `full` gathered on every device, and the layout it then has: for ops that need a whole dim.

    Its positions then count in their own order, whatever order the rules lay them in.
    """
    words = tuple(names.split())
    region = current()
    if region is None or not region.manual:
        return x, ((),) * x.ndim
    src = region.dims(words)
    dst = tuple(() if n in full else axes for n, axes in zip(words, src, strict=True))
    x = region.move(x, src, dst)
    for at, name in enumerate(words):
        if name in full:
            x = natural(region, x, at, name)
    return x, dst


def back(x: Array, names: str, dims: Dims) -> Array:
    """`x`, which lies by `dims`, brought to the layout of its names."""
    words = tuple(names.split())
    region = current()
    if region is None or not region.manual:
        return _settle(region, x, words)
    for at, name in enumerate(words):
        if not dims[at] and region.dims(words)[at]:
            x = ordered(region, x, at, name)
    return region.move(x, dims, region.dims(words))


def _letters(terms: tuple[tuple[str, ...], ...], result: tuple[str, ...]) -> str:
    letter = {n: chr(ord("a") + i) for i, n in enumerate(dict.fromkeys(n for t in terms for n in t))}
    left = ",".join("".join(letter[n] for n in t) for t in terms)
    return f"{left}->{''.join(letter[n] for n in result)}"


def used_globally(region: Region | None, x: Operand, dtype: jnp.dtype | None) -> Array:
    """A parameter as the layer uses it on one device or under XLA's partitioner."""
    array = value(x, dtype)
    if region is None or not isinstance(x, nnx.Variable):
        return array
    return region.constrain(array, region.param(x).compute.dims)


def _settle(region: Region | None, x: Array, names: tuple[str, ...]) -> Array:
    """State the layout of a result under XLA's partitioner; in the manual region it lies there already."""
    return x if region is None or region.manual else region.constrain(x, region.dims(names))


def in_use(
    region: Region, x: Operand, names: tuple[str, ...], beside: frozenset[str], dtype: jnp.dtype | None = None
) -> tuple[Array, Dims]:
    """An operand gathered from rest to its use, and that layout; `beside`: axes over which its neighbour varies."""
    rest, use = operand_lies(region, x, names)
    held = value(x, dtype)
    return region.move(held, rest, use, beside & split_axes(rest)) if rest != use else held, use


def _own_rows(ids: Array, axes: tuple[str, ...], rows: int) -> tuple[Array, Array]:
    """Indices relative to this device's block of `rows` rows, and where they lie in it."""
    local = vary(ids, frozenset(axes)) - (lax.axis_index(axes) * rows).astype(ids.dtype)
    return local, (local >= 0) & (local < rows)


__all__ = [
    "back",
    "cross_entropy",
    "einsum",
    "embed",
    "in_use",
    "positions",
    "rms_norm",
    "token_losses",
    "used_globally",
    "whole",
]
