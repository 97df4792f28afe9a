"""A model taken apart where it calls its layers, without knowing of it: what comes before them, the layers, and what comes
after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import get_opaque_trace_state

from sharding.errors import InputError
from sharding.layers import Stack
from sharding.layout import Dims, Layout, ParamLayouts
from sharding.params import bind
from sharding.partitioner import Manual
from sharding.pipeline.grid import Grid
from sharding.region import Region
from sharding.relayout import relayout

AXIS = "stage"
Params = dict[str, Array]
Tree = Any


class Reached(Exception):
    """The model has come to its layers: with this stack, what is to go through it, and what every layer is given as it is."""

    def __init__(self, stack: Stack, carry: Tree, beside: tuple[Array, ...]):
        super().__init__()
        self.stack, self.carry, self.beside = stack, carry, beside


class Parts:
    """A model's loss before and after its layers, in a region."""

    def __init__(self, model: Any, region: Region):
        self.model, self.region = model, region

    def reached(self, params: Params, batch: Mapping[str, Array]) -> Reached:
        """What the model calls its layers with. Raises InputError for one that calls none."""
        here = get_opaque_trace_state(convention="nnx")

        def stop(*given: Any) -> Any:
            self._in_the_open(here)
            raise Reached(*given)

        with self._through(stop):
            try:
                bind(self.model, params).loss(dict(batch))
            except Reached as reached:
                return reached
        raise InputError(
            f"{type(self.model).__name__} calls no stack of layers (sharding.layers), so there is nothing to cut into "
            f"stages. Set mesh axis {AXIS} to 1 and pipeline to none."
        )

    def sums(self, params: Params, carry: Tree, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The model's sums, `carry` being what its layers made. Raises InputError for a model with several stacks."""
        calls, here = [], get_opaque_trace_state(convention="nnx")

        def resume(*given: Any) -> Tree:
            self._in_the_open(here)
            calls.append(given)
            if len(calls) > 1:
                raise InputError(
                    f"{type(self.model).__name__} calls several stacks of layers, but a pipeline cuts one stack into its "
                    f"stages. Set mesh axis {AXIS} to 1 and pipeline to none."
                )
            return carry

        with self._through(resume):
            return bind(self.model, params).loss(dict(batch))

    def _in_the_open(self, here: object) -> None:
        if get_opaque_trace_state(convention="nnx") != here:
            raise InputError(
                f"{type(self.model).__name__} calls its layers within a jax.checkpoint, scan or jit of its own, where a "
                f"pipeline cannot cut them into stages. Call them outside it; their own remat is an option of `layers`."
            )

    @contextmanager
    def _through(self, what: Any) -> Iterator[None]:
        self.region.through = what
        try:
            yield
        finally:
            self.region.through = None


class Shares:
    """Which layers each stage has, and how their parameters get there from where they lie at rest."""

    def __init__(self, stack: Stack, grid: Grid, region: Region):
        self.grid, self.region, depth, parts = grid, region, stack.depth, len(grid.path)
        if grid.stages != lax.axis_size(AXIS):
            raise InputError(
                f"The pipeline's grid has {grid.stages} stages, but mesh axis {AXIS} has {lax.axis_size(AXIS)} devices. "
                f"Change one."
            )
        if depth < parts:
            raise InputError(
                f"{depth} layers cannot be cut into the {parts} parts of this pipeline ({grid.stages} stages of "
                f"{grid.chunks} each). Take fewer stages or chunks, or give the model {parts} layers or more."
            )
        self.paths = {variable.path: path for path, variable in stack.variables().items()}
        sizes = [depth // parts + (part < depth % parts) for part in range(parts)]
        starts = np.cumsum([0, *sizes])
        most = max(sizes)
        table = np.zeros((grid.stages, grid.chunks, most), np.int32)
        live = np.zeros((grid.stages, grid.chunks, most), bool)
        for part, place in enumerate(grid.path):
            inside = np.arange(most)
            table[place.stage, place.chunk] = starts[part] + np.minimum(inside, sizes[part] - 1)
            live[place.stage, place.chunk] = inside < sizes[part]
        self.table, self.live = table, None if live.all() else live
        self.lies = {p: region.layouts.params[p] for p in self.paths}
        self._check(stack)

    def _check(self, stack: Stack) -> None:
        rules = f"The rules {self.region.layouts.rules!r}"
        neighbours = self.live is None and (self.table.reshape(-1) == np.arange(stack.depth)).all()
        over = {lies.compute.dims[0] for lies in self.lies.values()}
        self.contiguous = over == {(AXIS,)}
        if self.contiguous and not neighbours:
            raise InputError(
                f"{rules} lay {stack.depth} layers on {self.grid.stages} stages one after another, but this schedule gives "
                f"each stage others, or not each as many. Give the rule stages order='spread'."
            )
        inside = [
            p for p, lies in self.lies.items() if AXIS in {a for dim in lies.compute.dims[1:] for a in dim}
        ]
        if inside:
            raise InputError(
                f"{rules} split {inside[0]}, a parameter of a layer, over {AXIS} in use, but the stages have different layers, "
                f"which cannot share one. Use other axes within the layers; for a vocabulary there, stages(vocab='whole')."
            )
        if not self.contiguous and over != {()}:
            ways = " and over ".join(" x ".join(axes) or "nothing" for axes in sorted(over))
            raise InputError(
                f"{rules} split layers over {ways}, but those of a pipeline lie on the axis {AXIS}. Use the rule stages "
                f"for them."
            )

    def lie(self, gathered: bool) -> dict[str, ParamLayouts]:
        """Layouts of the layers' parameters once `own` has brought them to their stages."""
        found = {}
        for path, lies in self.lies.items():
            param = lies.compute if gathered else lies.param
            dims = param.dims if self.contiguous else _without(param.dims)
            found[path] = replace(lies, param=Layout(param.names, dims, param.reasons, param.declined))
        return found

    def own(self, path: str, w: Array, gathered: bool, contributed: frozenset[str]) -> Array:
        """A parameter at rest, [layer, ...] -> this stage's layers of it, [chunk, layer, ...]; whole if `gathered`.

        contributed: axes over which gradients are contributions, to be reduced where the parameter was gathered.
        """
        rest, compute = self.lies[path].param.dims, self.lies[path].compute.dims
        if not self.contiguous:
            staged: Dims = ((AXIS,), *_without(rest)[1:])
            w = relayout(jnp.take(w, jnp.asarray(self.table.reshape(-1)), axis=0), rest, staged)
            rest, compute = staged, ((AXIS,), *compute[1:])
        if gathered:
            w = relayout(w, rest, compute, contributed)
        return w.reshape(self.grid.chunks, -1, *w.shape[1:])

    def fills(self, chunk: Array) -> Array | None:
        """Which entries of this stage's chunk are layers; None: all are."""
        return None if self.live is None else jnp.asarray(self.live)[lax.axis_index(AXIS), chunk]


def gathers_once(region: Region) -> bool:
    """Whether parameters that are split at rest are gathered once a step, and not by each micro-batch for each use."""
    return isinstance(region.partitioner, Manual) and region.partitioner.gathered != "regather"


def found(parts: Parts, params: Params, batch: Mapping[str, Array]) -> Stack:
    """The model's stack of layers, without an operation in the trace at hand."""
    stacks: list[Stack] = []

    def look(params: Params, batch: Mapping[str, Array]) -> Array:
        stacks.append(parts.reached(params, batch).stack)
        return jnp.zeros(())

    jax.eval_shape(look, params, batch)
    return stacks[0]


def _without(dims: Dims) -> Dims:
    return tuple(tuple(a for a in dim if a != AXIS) for dim in dims)
