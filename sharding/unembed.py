"""Token losses straight from the residual stream and the output matrix, without ever holding whole logits.

Logits are the largest array of a language model: tokens x vocabulary. Here they are made for some positions at a time,
of the columns that a device holds, and made again for the backward pass from the log-partition, one number a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from sharding.contraction import Contraction, Plan, plan
from sharding.errors import InputError
from sharding.operands import operands_of
from sharding.ops import einsum, token_losses
from sharding.partitioner import Manual
from sharding.product import wide_product
from sharding.region import Region, current, enter, names_of, tap, value
from sharding.relayout import vary, varying
from sharding.scope import named


@named
def unembed(x: Array, table: nnx.Param, labels: Array, names: str, chunk: int = 0) -> tuple[Array, Array]:
    """(nats, log-partition) of integer `labels` under the scores of `x` with every column of `table`.

    names: the dims of `x`, of which `table` shares the last: "batch length embed" with a table "embed vocab" or
    "vocab embed". The log-partition is log sum exp of a token's scores; nats are it less the label's score. Both have the
    dims of `labels`, the names without the last, in float32 (float64 stays). A label that is no column has the score 0:
    give it weight 0.

    chunk 0 makes all logits at once: `einsum`, then `cross_entropy`. Above 0 it is how many positions of each row, of
    those that a device holds, are scored at once (as many chunks as that takes, as equal as can be): memory is then
    batch x chunk x vocab on a device, scores are not rounded to the type of `x`, and the backward pass takes the product
    once more. Where the vocabulary is split, three numbers a token cross devices, once for all chunks (Shoeybi et al.
    2019, arXiv:1909.08053, section 3); the matrix is brought into use once. Raises InputError for a table that does not
    share the last name, and a chunk below 0.
    """
    words = tuple(names.split())
    own = names_of(table) or ()
    if len(own) != 2 or words[-1] not in own:
        raise InputError(
            f"unembed takes a parameter of two dims of which one is {words[-1]!r}, the last of {names!r}; "
            f"{getattr(table, 'path', 'the table')} has {' '.join(own) or 'no names'}. Declare it as '{words[-1]} vocab'."
        )
    if chunk < 0:
        raise InputError(
            f"unembed is asked for chunks of {chunk} positions. Take 1 or more, or 0 for all at once."
        )
    kept, (classes,) = words[:-1], (n for n in own if n != words[-1])
    spec = f"{names}, {' '.join(own)} -> {' '.join((*kept, classes))}"
    if not chunk:
        return token_losses(einsum(spec, x, table), labels, " ".join((*kept, classes)))
    how = _How(own[0] == classes, chunk)
    region = current()
    if region is None or region.mesh is None:
        nats, partition = _scored(how, x, value(table, x.dtype), labels)
    elif region.manual:
        nats, partition = _on_shards(region, spec, how, x, table, labels)
    else:
        nats, partition = _under_xla(region, spec, how, x, table, labels)
    return tap("unembed", kept, nats), tap("unembed", kept, partition)


@dataclass(frozen=True)
class _How:
    """What the local computation is told."""

    turned: bool
    """Whether the table is "vocab embed"."""
    chunk: int
    axes: tuple[str, ...] = ()
    """Axes that split the columns."""

    def sized(self, length: int) -> tuple[int, int, int]:
        """Positions of a chunk, how many such chunks, and what is left: a last, shorter one."""
        size = -(-length // -(-length // self.chunk))
        return size, length // size, length % size

    def scores(self, x: Array, w: Array) -> Array:
        """Logits of some positions: x (..., positions, embed) -> (..., positions, columns held here), float32."""
        return wide_product("...d,vd->...v" if self.turned else "...d,dv->...v", x, w)


def _on_shards(
    region: Region, spec: str, how: _How, x: Array, table: nnx.Param, labels: Array
) -> tuple[Array, Array]:
    """In the manual region: shards in, both results laid out by their names."""
    ready = operands_of(region, spec, (x, table), x.dtype, _whole_sums)
    held, weight = ready.moved(region)
    *lies, columns = ready.plan.produced
    rows = region.dims(tuple(spec.partition(",")[0].split())[:-1])
    labels = region.move(labels, rows, tuple(lies))
    if columns:
        first = lax.axis_index(columns) * weight.shape[0 if how.turned else 1]
        labels = vary(labels, frozenset(columns)) - first.astype(labels.dtype)
    nats, partition = _scored(_How(how.turned, how.chunk, columns), held, weight, labels)
    return region.move(nats, tuple(lies), rows), region.move(partition, tuple(lies), rows)


def _under_xla(
    region: Region, spec: str, how: _How, x: Array, table: nnx.Param, labels: Array
) -> tuple[Array, Array]:
    """Under XLA's partitioner: a manual region of its own. Left to XLA, the matrix's gradient would be reduced in every
    chunk, and chunks of a split length would be brought together.
    """
    inner = Region(region.layouts, region.mesh, Manual(), None, region.platform)
    names = tuple(spec.partition(",")[0].split())
    rows, stream = (region.layouts.activation(n).spec() for n in (names[:-1], names))

    def run(x: Array, w: Array, labels: Array) -> tuple[Array, Array]:
        with enter(inner):
            bound: Any = table.replace(w)
            return _on_shards(inner, spec, how, x, bound, labels)

    specs = (stream, region.param(table).param.spec(), rows)
    mapped = jax.shard_map(run, mesh=region.mesh, in_specs=specs, out_specs=(rows, rows), check_vma=True)
    return mapped(x, value(table), labels)


def _whole_sums(asked: Contraction) -> Plan:
    """The plan of the product, in which every device has whole scores and not summands of them, which would be reduced
    chunk by chunk and again for the backward pass: axes that split what is summed split rows instead, and the matrix is
    brought together over them. Where they split no row in any layout they split the positions, if those divide.
    """
    best, sizes = plan(asked), dict(asked.sizes)
    if not best.reduce:
        return best
    whole = min((p for p in asked.priced() if not p.reduce), key=lambda p: (p.products, p.bytes))
    stream, table = best.operands
    *rows, positions, _ = stream
    parts = math.prod(sizes[a] for a in (*positions, *best.reduce))
    length = asked.shapes[0][-2] * math.prod(sizes[a] for a in asked.layouts[0][-2])
    if whole.products <= best.products or length % parts:
        return whole
    lies = (*rows, (*positions, *best.reduce))
    table = tuple(tuple(a for a in dim if a not in best.reduce) for dim in table)
    return replace(best, operands=((*lies, ()), table), reduce=(), produced=(*lies, best.produced[-1]))


def _scored(how: _How, x: Array, w: Array, labels: Array) -> tuple[Array, Array]:
    """`_losses`, typed."""
    made: Any = _losses(how, x, w, labels)
    return made


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(how: _How, x: Array, w: Array, labels: Array) -> tuple[Array, Array]:
    """Local arrays: x (..., length, embed), labels (..., length) counted from the first column held here."""
    return _forward(how, x, w, labels)[0]


def _forward(how: _How, x: Array, w: Array, labels: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    size, count, left = how.sized(labels.shape[-1])

    def one(size: int, start: Any) -> tuple[Array, Array, Array]:
        z = how.scores(_cut(x, start, size, -2), w)
        top = jnp.max(z, axis=-1)
        total = jnp.sum(jnp.exp(z - top[..., None]), axis=-1)
        own = _is_label(z, _cut(labels, start, size, -1))
        return top, total, jnp.sum(jnp.where(own, z, jnp.zeros((), z.dtype)), axis=-1)

    _, found = lax.scan(lambda _, start: (None, one(size, start)), None, _starts(size, count))
    top, total, chosen = (_joined(y) for y in found)
    if left:
        last = one(left, size * count)
        top, total, chosen = (
            jnp.concatenate(both, axis=-1) for both in zip((top, total, chosen), last, strict=True)
        )
    if how.axes:
        here, top = top, lax.pmax(top, how.axes)
        total, chosen = lax.psum((total * jnp.exp(here - top), chosen), how.axes)
    partition = jnp.log(total) + top
    return (partition - chosen, partition), (x, w, labels, partition)


def _backward(how: _How, kept: tuple[Array, ...], above: tuple[Array, Array]) -> tuple[Array, Array, None]:
    """What arrives is whole on every device that holds columns, so nothing is reduced here: x and w vary over all axes over
    which their gradients are summands, and the moves that brought them here reduce them.
    """
    x, w, labels, partition = kept
    of_nats, both = above[0], above[0] + above[1]
    size, count, left = how.sized(labels.shape[-1])
    union = varying(x) | varying(w)

    def one(size: int, sums: tuple[Array, Array], start: Any) -> tuple[tuple[Array, Array], None]:
        dx, dw = sums
        rows = _cut(x, start, size, -2)
        z = how.scores(rows, w)
        cut = lambda y: _cut(y, start, size, -1)[..., None]
        dz = jnp.exp(z - cut(partition)) * cut(both)
        dz = jnp.where(_is_label(z, _cut(labels, start, size, -1)), dz - cut(of_nats), dz).astype(x.dtype)
        back = wide_product("...v,vd->...d" if how.turned else "...v,dv->...d", dz, w).astype(x.dtype)
        dx = lax.dynamic_update_slice_in_dim(dx, back, start, x.ndim - 2)
        # (embed, column) whichever way the table lies: XLA:CPU copies the left operand, and the scores are the large one
        letters = "abcdefgh"[: x.ndim - 1]
        return (dx, dw + wide_product(f"{letters}z,{letters}v->zv", rows, dz)), None

    columns = w.shape[::-1] if how.turned else w.shape
    sums = vary(jnp.zeros(x.shape, x.dtype), union), vary(jnp.zeros(columns, partition.dtype), union)
    sums, _ = lax.scan(partial(one, size), sums, _starts(size, count))
    if left:
        sums, _ = one(left, sums, size * count)
    dx, dw = sums
    return dx, (dw.T if how.turned else dw).astype(w.dtype), None


_losses.defvjp(_forward, _backward)


def _is_label(z: Array, labels: Array) -> Array:
    """Where a score is its token's label's: fuses, unlike a gather."""
    return labels[..., None] == lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1)


def _starts(size: int, count: int) -> Array:
    return jnp.arange(count, dtype=jnp.int32) * jnp.int32(size)


def _cut(x: Array, start: Any, size: int, dim: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, x.ndim + dim)


def _joined(chunks: Array) -> Array:
    """(chunk, ..., positions of a chunk) -> (..., positions)."""
    moved = jnp.moveaxis(chunks, 0, -2)
    return moved.reshape(*moved.shape[:-2], -1)


__all__ = ["unembed"]
