"""The scan over layers as a named op: a stacked block, rematerialization by name, unrolled or scanned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_policies

from sharding.errors import InputError
from sharding.params import bind, values
from sharding.partitioner import Manual
from sharding.region import Region, current
from sharding.relayout import drops_gathered, varying

Remat = Literal["none", "dots", "full"]
Loop = Literal["auto", "scan", "unroll"]

UNROLL_UP_TO = 8
"""Layers up to which `auto` unrolls on CPU, where a scan costs about 1.3 times the step and saves no memory."""


def layers(block: nnx.Module, x: Array, remat: Remat = "none", loop: Loop = "auto") -> Array:
    """Run a stacked block (`sharding.params.stack`) over its layers: `x` goes through `block(x)` once a layer.

    remat: what the backward pass finds kept: "none" everything it needs, "dots" products of parameters and activations
    only, "full" each layer's input only. Parameters that were gathered for use are gathered again when the region's
    partitioner says `Manual(gathered="regather")`, except in layers unrolled on CPU, where XLA merges both gathers.
    loop: "scan" compiles one layer, "unroll" all of them, "auto" unrolls few layers on CPU.
    """
    if remat not in ("none", "dots", "full"):
        raise InputError(f"The remat policy {remat!r} does not exist. The policies are none, dots and full.")
    stacked = _whole_stack(block, x)
    depth = next(iter(stacked.values())).shape[0]
    region = current()
    if region is not None and region.listen is not None:
        return _heard(region, block, x, stacked, depth)
    cpu = region is None or region.platform == "cpu"
    scanned = loop == "scan" or (loop == "auto" and (depth > UNROLL_UP_TO or not cpu))
    # XLA:CPU drops the barriers that keep two gathers of one array apart: unrolled, it merges them whatever we write.
    body = _remat(lambda x, held: bind(block, held)(x), remat, block, regather=scanned or not cpu)
    if scanned:
        return lax.scan(lambda x, held: (body(x, held), None), x, stacked)[0]
    # lax.split, because its transpose is one concatenate; that of `depth` slices is `depth` padded sums
    parts = {path: lax.split(array, (1,) * depth, 0) for path, array in stacked.items()}
    for at in range(depth):
        x = body(x, {path: lax.squeeze(part[at], (0,)) for path, part in parts.items()})
    return x


def _heard(region: Region, block: nnx.Module, x: Array, stacked: dict[str, Array], depth: int) -> Array:
    """The layers one by one in the caller's own trace, so that a listener may keep what it hears."""
    outer = region.scope
    for at in range(depth):
        region.scope = f"{outer} layer {at}".strip()
        x = bind(block, {path: array[at] for path, array in stacked.items()})(x)
    region.scope = outer
    return x


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


def _remat(
    body: Callable[..., Array], remat: Remat, block: nnx.Module, regather: bool
) -> Callable[..., Array]:
    if remat == "full":
        return jax.checkpoint(body)
    if remat == "dots":
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
