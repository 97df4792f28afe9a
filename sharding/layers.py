"""The scan over layers as a named op: a stacked block, rematerialization by name, unrolled or scanned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_policies

from sharding import heard
from sharding.accumulate import zero_like
from sharding.errors import InputError
from sharding.marks import check_words, marks, policy, require_host
from sharding.params import bind, values
from sharding.partitioner import Manual
from sharding.region import current
from sharding.relayout import drops_gathered, varying
from sharding.remat import Remat, parse_remat
from sharding.scope import in_layers

C = TypeVar("C")
Loop = Literal["auto", "scan", "unroll"]

UNROLL_UP_TO = 8
"""Layers up to which `auto` unrolls on CPU, where a scan costs about 1.3 times the step and saves no memory."""


def layers(
    block: nnx.Module, x: Array, remat: str = "none", loop: Loop = "auto", beside: tuple[Array, ...] = ()
) -> Array:
    """Run a stacked block (`sharding.params.stack`) over its layers: `x` goes through `block(x, *beside)` once a layer.

    remat: what the backward pass finds kept: "none" everything it needs, "dots" products of parameters and activations
    only, "full" each layer's input only, "save:attention,mlp" the results of these ops or with these dims,
    "offload:project" the same in host memory (`sharding.remat.Remat`). Parameters that were gathered for use are gathered
    again by every policy but "none", and by that when the region's partitioner says `Manual(gathered="regather")`, except in
    layers unrolled on CPU, where XLA merges both gathers. Work that a block wants computed again by itself goes through
    `sharding.recomputed`: within these policies jax heeds no `jax.checkpoint` of the block's own.
    loop: "scan" compiles one layer, "unroll" all of them, "auto" unrolls few layers on CPU.
    beside: what every layer is given as it is.
    """
    return _run(block, x, lambda bound, x: bound(x, *beside), x, remat, loop)


def layers_and_sums(
    block: nnx.Module, x: Array, remat: str = "none", loop: Loop = "auto", beside: tuple[Array, ...] = ()
) -> tuple[Array, dict[str, Array]]:
    """`layers` of a block that returns `(x, sums)`, a mapping of arrays beside the activation: also their sums over layers."""
    region = current()
    taps, listen = (region.taps, region.listen) if region else (None, None)
    if region:
        region.taps, region.listen = None, None  # this trace is for shapes alone
    first = {path: array[0] for path, array in _whole_stack(block, x).items()}
    alike = jax.eval_shape(lambda x, held: bind(block, held)(x, *beside)[1], x, first)
    if region:
        region.taps, region.listen = taps, listen

    def call(
        bound: Callable[..., Any], carry: tuple[Array, dict[str, Array]]
    ) -> tuple[Array, dict[str, Array]]:
        x, sums = bound(carry[0], *beside)
        return x, {name: carry[1][name] + part for name, part in sums.items()}

    return _run(block, (x, {name: zero_like(s) for name, s in alike.items()}), call, x, remat, loop)


def _run(block: nnx.Module, carry: C, call: Callable[[Any, C], C], x: Array, remat: str, loop: Loop) -> C:
    """`carry` through `call(block, carry)` once a layer; `x` is the activation in it."""
    kept = parse_remat(remat)
    stacked = _whole_stack(block, x)
    depth = next(iter(stacked.values())).shape[0]
    region = current()
    cpu = region is None or region.platform == "cpu"
    scanned = loop == "scan" or (loop == "auto" and (depth > UNROLL_UP_TO or not cpu))
    layer = lambda carry, held: call(bind(block, held), carry)
    if region is not None and region.listen is not None:
        return (
            heard.scanned(region, region.listen, layer, carry, stacked)
            if scanned
            else heard.unrolled(region, layer, carry, stacked)
        )
    # XLA:CPU drops the barriers that keep two gathers of one array apart: unrolled, it merges them whatever we write.
    body = _remat(layer, kept, block, regather=scanned or not cpu)
    with marks() as made, in_layers(depth):
        carry = _through(body, carry, stacked, scanned)
    check_words(kept, made, type(block).__name__)
    return carry


def _through(
    body: Callable[[C, dict[str, Array]], C], carry: C, stacked: dict[str, Array], scanned: bool
) -> C:
    if scanned:
        return lax.scan(lambda carry, held: (body(carry, held), None), carry, stacked)[0]
    depth = next(iter(stacked.values())).shape[0]
    # lax.split, because its transpose is one concatenate; that of `depth` slices is `depth` padded sums
    parts = {path: lax.split(array, (1,) * depth, 0) for path, array in stacked.items()}
    for at in range(depth):
        carry = body(carry, {path: lax.squeeze(part[at], (0,)) for path, part in parts.items()})
    return carry


def _whole_stack(block: nnx.Module, x: Array) -> dict[str, Array]:
    """The block's arrays with every layer on every device: a stack split at rest is gathered before the loop."""
    region, stacked = current(), values(block)
    if region is None or not region.manual:
        return stacked
    for keys, variable in nnx.to_flat_state(nnx.state(block, nnx.Param)):
        path, lies = ".".join(map(str, keys)), region.param(variable)
        if lies.compute.dims[0]:
            raise InputError(
                f"{variable.path}: a rule splits {lies.compute.names[0]} over {' x '.join(lies.compute.dims[0])} in use, but "
                f"every device runs every layer. Split the stack at rest (role param), or another dim."
            )
        rest = lies.param.dims
        if rest[0]:
            stacked[path] = region.move(stacked[path], rest, ((), *rest[1:]), varying(x) & frozenset(rest[0]))
    return stacked


def _remat(body: Callable[..., C], remat: Remat, block: nnx.Module, regather: bool) -> Callable[..., C]:
    if remat.parts:
        if remat.offloads:
            region = current()
            require_host(region.mesh if region else None, f"remat={remat.text!r}")
        return jax.checkpoint(body, policy=policy(remat))
    if remat.text == "full":
        return jax.checkpoint(body)
    if remat.text == "dots":
        return jax.checkpoint(body, policy=checkpoint_policies.dots_with_no_batch_dims_saveable)
    if not (regather and _regathers(block)):
        return body
    return jax.checkpoint(body, policy=drops_gathered)


def _regathers(block: nnx.Module) -> bool:
    """Whether a parameter of this block is gathered for use and the partitioner wants it dropped afterwards."""
    region = current()
    if region is None or not isinstance(region.partitioner, Manual) or region.partitioner.gathered == "keep":
        return False
    layouts = [region.param(v) for _, v in nnx.to_flat_state(nnx.state(block, nnx.Param))]
    return any(p.param.dims != p.compute.dims for p in layouts)
