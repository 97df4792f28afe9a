"""Any grid inside the one manual region: the sums of a batch and their gradients, as a pipeline of micro-batches gives them.

Each kind of task is traced once, and the tables say what it is done with in each tick. What comes before the layers (enter)
and after them (loss) belongs to all stages: what they hand on is sent from, or to, all of them, and with the vocabulary split
over the stages each does its share. Gradients are taken by hand, task by task: nothing is differentiated through the loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, typeof

from sharding.errors import InputError
from sharding.layout import ParamLayouts
from sharding.params import objective
from sharding.pipeline.grid import Grid
from sharding.pipeline.lockstep import Lockstep
from sharding.pipeline.parts import AXIS, Params, Parts, Shares, Tree, found, gathers_once
from sharding.pipeline.tables import tables
from sharding.pipeline.traced import Passes, Program, apart, passes, program
from sharding.region import Region
from sharding.relayout import relayout, retyped, vary, varying, varying_of


@dataclass(frozen=True)
class Tasks:
    """The programs of a pipeline's tasks on one device."""

    enter: Program
    """(outer, micro-batch) -> carry, equal on all stages."""
    beside: Program
    """micro-batch -> what every layer is given."""
    layers: Passes
    loss: Program
    """(outer, carry, micro-batch) -> (sums, gradients of outer, cotangents of carry), all of them of all stages."""
    entered: Program
    """(outer, micro-batch, cotangents of what entered) -> gradients of outer."""
    carry: Tree
    """Types of what goes from stage to stage."""
    whole: Tree
    """Types of the same where all stages have it."""


def pipelined(
    model: Any, region: Region, grid: Grid, params: Params, batch: Mapping[str, Array]
) -> tuple[dict[str, Array], Params]:
    """Sums over a batch and the gradients of the objective, path -> array as `params` has them: this device's part of both.

    params: as they lie at rest; batch: the device's rows. Raises InputError where rows, layers or rules do not fit the grid.
    """
    batch = _micro_batches(batch, grid.microbatches)
    first = {k: x[0] for k, x in batch.items()}
    parts = Parts(model, region)
    shares = Shares(found(parts, params, first), grid, region)
    once = gathers_once(region)
    over = frozenset().union(*map(varying, batch.values()))
    ready = lambda params: _ready(params, shares, region, once, over)
    (own, outer), back = jax.vjp(ready, params)
    region.brought = _brought(region, shares, once)
    tasks = _traced(parts, shares, own, outer, first)
    sums, d_own, d_outer = Lockstep(tables(grid), tasks, shares, own, outer, batch).run()
    region.brought = {}
    return sums, back((d_own, d_outer))[0]


def _micro_batches(batch: Mapping[str, Array], n: int) -> dict[str, Array]:
    rows = next(iter(batch.values())).shape[0]
    if rows % n:
        raise InputError(
            f"{rows} rows on a device do not divide into the pipeline's {n} micro-batches. Make the batch a multiple of "
            f"accumulate x micro-batches x the devices that split it, or take a number of micro-batches that divides {rows}."
        )
    return {k: x.reshape(n, rows // n, *x.shape[1:]) for k, x in batch.items()}


def _ready(
    params: Params, shares: Shares, region: Region, once: bool, over: frozenset[str]
) -> tuple[Params, Params]:
    """(this stage's layers by path in the block, all other parameters by path). over: the axes that split the batch."""
    own = {inner: shares.own(p, params[p], once, over) for p, inner in shares.paths.items()}
    outer = {p: w for p, w in params.items() if p not in shares.paths}
    if once:
        lies = region.layouts.params
        outer = {p: relayout(w, lies[p].param.dims, lies[p].compute.dims, over) for p, w in outer.items()}
    return own, outer


def _brought(region: Region, shares: Shares, once: bool) -> dict[str, ParamLayouts]:
    """Where parameters lie for the tasks: the layers on their stages, and all of them whole where that is done once."""
    whole = {p: replace(lies, param=lies.compute) for p, lies in region.layouts.params.items()}
    return {**(whole if once else {}), **shares.lie(once)}


def _traced(parts: Parts, shares: Shares, own: Params, outer: Params, first: Mapping[str, Array]) -> Tasks:
    """Each task's program. The stack of layers has one chunk's arrays wherever only its place is looked for."""
    stack = found(parts, {**outer, **{p: own[inner][0] for p, inner in shares.paths.items()}}, first)
    chunk = {inner: w[0] for inner, w in own.items()}
    # Before and after the layers their parameters are only looked at: equal on all stages, as all else there is.
    looked = {p: retyped(typeof(w), varying(w) - {AXIS}) for p, w in chunk.items()}
    params = lambda chunk, outer: {**outer, **{p: chunk[inner] for p, inner in shares.paths.items()}}
    enter = _without(
        shares, looked, lambda c, outer, batch: parts.reached(params(c, outer), batch).carry, outer, first
    )
    _check_carried(enter.gives())
    mine = {k: vary(x, frozenset((AXIS,))) for k, x in first.items()}
    beside = _beside(
        shares, looked, lambda c, outer, batch: parts.reached(params(c, outer), batch).beside, outer, mine
    )
    lead = shares.fills(vary(jnp.int32(0), frozenset((AXIS,))))
    given = (lead, beside.gives())
    run = lambda weights, carry, given: stack.run(weights, carry, given[1], given[0])
    carry = _settled(run, chunk, enter.gives(), given)
    alike = lambda *args: jax.tree.map(lambda x, a: vary(x, varying_of(a)), run(*args), carry)
    whole = jax.tree.map(lambda a: retyped(a, varying_of(a) - {AXIS}), carry)

    def loss(chunk: Params, outer: Params, carry: Tree, batch: Mapping[str, Array]) -> Tree:
        def of(outer: Params, carry: Tree) -> Tree:
            sums = parts.sums(params(chunk, outer), carry, batch)
            return objective(sums), sums

        (_, sums), (d_outer, d_carry) = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(outer, carry)
        return sums, d_outer, d_carry

    def entered(outer: Params, batch: Mapping[str, Array], cotangents: Tree) -> Params:
        made = lambda outer: jax.tree.map(lambda x, a: vary(x, varying_of(a)), enter(outer, batch), whole)
        return jax.vjp(made, outer)[1](cotangents)[0]

    return Tasks(
        enter,
        beside,
        passes(alike, shares.grid.splits, chunk, carry, given),
        _without(shares, looked, loss, outer, whole, first),
        program(entered, outer, first, whole),
        carry,
        whole,
    )


def _without(shares: Shares, looked: Params, f: Callable[..., Tree], *args: Tree) -> Program:
    """`f(the layers' parameters, *args)` as a program of `args`. Raises InputError where it needs the parameters after all."""
    made, used = apart(f, looked, *args)
    if any(used):
        (path, *_) = (p for p, u in zip(sorted(looked), used, strict=True) if u)
        (path,) = (p for p, inner in shares.paths.items() if inner == path)
        raise InputError(
            f"The model uses {path} outside its layers as well, but in a pipeline a stage has its own layers' parameters "
            f"alone. Give the model a parameter of its own for it, or set pipeline to none."
        )
    return made


def _beside(shares: Shares, looked: Params, f: Callable[..., Tree], outer: Params, batch: Tree) -> Program:
    """What every layer is given, as a program of the batch. Raises InputError where it depends on parameters."""
    made, used = apart(lambda given, batch: f(*given, batch), (looked, outer), batch)
    named = [*(p for inner in sorted(looked) for p, i in shares.paths.items() if i == inner), *sorted(outer)]
    if any(used):
        path = next(p for p, u in zip(named, used, strict=True) if u)
        raise InputError(
            f"What every layer is given (beside) depends on the parameter {path}, but in a pipeline each stage makes it anew "
            f"from the batch alone, and it has no gradient. Let it go through the layers with the activation, or set "
            f"pipeline to none."
        )
    return made


def _check_carried(carry: Tree) -> None:
    for keys, a in jax.tree_util.tree_flatten_with_path(carry)[0]:
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            raise InputError(
                f"What goes through the layers has whole numbers ({a.dtype}) at {jax.tree_util.keystr(keys)}, but a pipeline "
                f"sends back a gradient for all that it sends on. Make this sum a float."
            )


def _settled(run: Callable[..., Tree], weights: Params, carry: Tree, given: Tree) -> Tree:
    """The types of what goes from stage to stage: what a stage makes of it is of the type that the next one takes."""
    carry = jax.tree.map(lambda a: retyped(a, varying_of(a) | {AXIS}), carry)
    while True:
        made = program(run, weights, carry, given).gives()
        wider = jax.tree.map(lambda a, b: retyped(a, varying_of(a) | varying_of(b)), carry, made)
        if [varying_of(a) for a in jax.tree.leaves(wider)] == [varying_of(a) for a in jax.tree.leaves(carry)]:
            return carry
        carry = wider
