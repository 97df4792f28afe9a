"""The scan over layers as a named op: a stacked block, rematerialization by name, unrolled or scanned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
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
from sharding.relayout import drops_gathered, vary, varying, varying_of
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
    return _run(
        Stack(block, lambda bound, x, *beside: bound(x, *beside), parse_remat(remat), loop), x, beside
    )


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
        bound: Callable[..., Any], carry: tuple[Array, dict[str, Array]], *beside: Array
    ) -> tuple[Array, dict[str, Array]]:
        x, sums = bound(carry[0], *beside)
        return x, {name: carry[1][name] + part for name, part in sums.items()}

    start = (x, {name: zero_like(s) for name, s in alike.items()})
    return _run(Stack(block, call, parse_remat(remat), loop), start, beside)


@dataclass(frozen=True)
class Stack:
    """A stacked block and how it is run over its layers."""

    block: nnx.Module
    call: Callable[..., Any]
    """(the block of one layer, what goes through, *beside) -> what goes through."""
    remat: Remat
    loop: Loop

    @property
    def depth(self) -> int:
        """Layers of the whole model."""
        return next(iter(self.variables().values())).global_shape[0]

    def variables(self) -> dict[str, nnx.Param]:
        """The stacked parameters, by their path in the block."""
        flat = nnx.to_flat_state(nnx.state(self.block, nnx.Param))
        return {".".join(map(str, keys)): variable for keys, variable in flat}

    def over(self) -> tuple[str, ...]:
        """The axes over which the layers are split in use: each device runs its own."""
        region = current()
        if region is None or not region.manual:
            return ()
        split = {region.param(variable).compute.dims[0] for variable in self.variables().values()}
        if len(split) > 1:
            ways = " and over ".join(" x ".join(axes) or "nothing" for axes in sorted(split))
            raise InputError(
                f"The layers of {type(self.block).__name__} are split over {ways}, but all parameters of a layer are used "
                f"on the same device. Split the dim layers of all of them alike."
            )
        return split.pop()

    def run(
        self, stacked: dict[str, Array], carry: C, beside: tuple[Array, ...], live: Array | None = None
    ) -> C:
        """`carry` through some of the layers, one after another: those whose arrays `stacked` holds, by path in the block.

        live: for each of them whether it is a layer at all, or only fills the stack.
        """
        stacked = stacked if live is None else {**stacked, LIVE: live}
        here = next(iter(stacked.values())).shape[0]
        region = current()
        cpu = region is None or region.platform == "cpu"
        scanned = self.loop == "scan" or (self.loop == "auto" and (here > UNROLL_UP_TO or not cpu))

        def layer(carry: C, held: dict[str, Array]) -> C:
            on = held.get(LIVE)
            if on is None:
                return self.call(bind(self.block, held), carry, *beside)
            own = {path: w for path, w in held.items() if path != LIVE}
            made = self.call(bind(self.block, _heeded(on, own)), _heeded(on, carry), *beside)
            return jax.tree.map(lambda x, y: jnp.where(on, x, y), made, carry)

        if region is not None and region.listen is not None:
            return (
                heard.scanned(region, region.listen, layer, carry, stacked)
                if scanned
                else heard.unrolled(region, layer, carry, stacked)
            )
        # XLA:CPU drops the barriers that keep two gathers of one array apart: unrolled, it merges them whatever we write.
        body = _remat(layer, self.remat, self.block, regather=scanned or not cpu)
        with marks() as made, in_layers(self.depth):
            carry = _through(body, carry, stacked, scanned)
        check_words(self.remat, made, type(self.block).__name__)
        return carry


@jax.custom_vjp
def _heeded(on: Array, tree: C) -> C:
    """`tree`, whose gradient is zero unless `on`, also where what comes back is infinite or no number."""
    return tree


def _heeded_back(on: Array, cotangents: C) -> tuple[np.ndarray, C]:
    none = np.zeros(on.shape, jax.dtypes.float0)
    return none, jax.tree.map(lambda g: jnp.where(on, g, jnp.zeros_like(g)), cotangents)


_heeded.defvjp(lambda on, tree: (tree, on), _heeded_back)

LIVE = ""
"""The path under which a stack that is not full says of each layer whether it is one."""


def _run(stack: Stack, carry: C, beside: tuple[Array, ...]) -> C:
    region = current()
    if region is not None and region.through is not None:
        return region.through(stack, carry, beside)
    axes = stack.over()
    if axes and (region is None or region.listen is None):
        return _relayed(stack, carry, beside, axes)
    return stack.run(_whole_stack(stack.block, jax.tree.leaves(carry)[0]), carry, beside)


def _relayed(stack: Stack, carry: C, beside: tuple[Array, ...], axes: tuple[str, ...]) -> C:
    """Through layers that are split over devices, one device's after another's: each waits for the one before it.

    Every device computes in every turn and all but one in vain, so the time is that of all layers: for evaluation and for
    writing samples. Training has pipelines (`sharding.pipeline`).
    """
    held, index = values(stack.block), lax.axis_index(axes)

    def turn(carry: C, at: Array) -> tuple[C, None]:
        made = stack.run(held, jax.tree.map(lambda x: vary(x, frozenset(axes)), carry), beside)
        mine = jax.tree.map(lambda x: jnp.where(index == at, x, jnp.zeros_like(x)), made)
        return jax.tree.map(lambda x: lax.psum(x, axes), mine), None

    given = jax.eval_shape(lambda carry: turn(carry, jnp.int32(0))[0], carry)
    start = jax.tree.map(lambda x, like: vary(x, varying_of(like)), carry, given)
    return lax.scan(turn, start, jnp.arange(lax.axis_size(axes)))[0]


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
