"""The loud checker: everything that can be known of a split to be wrong or wasteful before anything is compiled.

What is wrong is refused with InputError: conflicts, unknown words, dims that do not divide, rules and axes that do
nothing, plain jax over a split dim. What is right but wastes the machine is a `Finding`. Both come from the abstract
tree, the layouts and traces of the model, in seconds and without devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh

from sharding.errors import InputError
from sharding.finding import Finding, Limits
from sharding.flow import Flow
from sharding.partitioner import Auto, Manual
from sharding.plain import check_plain, refuse_failed
from sharding.region import Tap, enter
from sharding.replication import Array, replicated
from sharding.step import TrainStep
from sharding.waste import repeated_work, wasteful_moves


@dataclass(frozen=True)
class Traced:
    """A step's traces for batches of some rows, and what its named ops made; nothing in it was refused."""

    state: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    taps: tuple[Tap, ...]
    """Every named op's result, global shapes."""
    forward: ClosedJaxpr
    """The forward pass on whole arrays."""
    update: ClosedJaxpr | None = field(repr=False)
    """One update as the devices run it; None under XLA's partitioner, where the trace says nothing of them."""


def check(step: TrainStep, rows: int, limits: Limits = Limits()) -> tuple[Finding, ...]:  # noqa: B008 (a frozen value)
    """Findings of a step for batches of `rows` rows; InputError for what is wrong. Nothing runs or is compiled."""
    return findings(step, traced(step, rows), limits)


def traced(step: TrainStep, rows: int) -> Traced:
    """Trace a step and refuse, with InputError, what would be wrong or fail."""
    state, batch = step.abstract_state(), step.abstract_batch(rows)
    taps: list[Tap] = []
    forward = _forward(step, state["params"], batch, taps)
    _check_divides(taps, step)
    manual = isinstance(step.split.partitioner, Manual) and step.split.mesh is not None
    if manual:
        try:
            local = jax.make_jaxpr(step.evaluation)(state["params"], batch)
        except InputError:
            raise
        except Exception as error:  # its author's code, and jax's where shapes do not fit: of any kind
            refuse_failed(error, forward, taps, step.split.layouts)
            raise
        check_plain(forward, local)
    update = _update(step, state, batch) if manual else None
    step.split.layouts.check_used()
    return Traced(state, batch, tuple(taps), forward, update)


def findings(step: TrainStep, seen: Traced, limits: Limits = Limits()) -> tuple[Finding, ...]:  # noqa: B008
    """What a step that was traced wastes, the gravest first."""
    return tuple(sorted(_found(step, seen, limits), key=lambda f: (f.severity != "error", f.needs - f.has)))


def _found(step: TrainStep, seen: Traced, limits: Limits) -> Iterator[Finding]:
    layouts = step.split.layouts
    moments = optimizer_copies(step, seen.state)
    arrays = {p: Array(s.shape, s.dtype.itemsize, len(moments[p])) for p, s in step.tree.items()}
    yield from replicated(layouts, arrays, limits)
    if seen.update is not None:
        flow = Flow(seen.update, layouts.sizes)
        yield from wasteful_moves(flow, layouts, limits)
        yield from repeated_work(flow, layouts, seen.taps, limits)


def optimizer_copies(step: TrainStep, state: Any) -> dict[str, tuple[str, ...]]:
    """path -> the types of the arrays of optimizer state that are shaped and laid out as that parameter: two for AdamW."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(step.tree, ())
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state["optimizer"])[0]:
        last = str(getattr(keys[-1], "key", "")) if keys else ""
        if last in found and leaf.shape == step.tree[last].shape:
            found[last] += (str(leaf.dtype),)
    return found


def _forward(step: TrainStep, params: Any, batch: Any, taps: list[Tap]) -> ClosedJaxpr:
    """The forward pass on global shapes, without a mesh: what the arrays are."""
    region = step.region(taps)
    region.mesh, region.partitioner = None, Auto()
    with enter(region):
        return jax.make_jaxpr(lambda p, b: step.evaluate_sums(p, b))(params, batch)


def _update(step: TrainStep, state: Any, batch: Any) -> ClosedJaxpr:
    """One update. On real devices it is traced as the compiled step will be called, and kept by jax."""
    if not isinstance(step.split.mesh, Mesh):
        return jax.make_jaxpr(step.update)(state, batch)
    lies = step.batch_shardings()
    put = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies[k]) for k, x in batch.items()}
    return step.step.trace(state, put).jaxpr


def _check_divides(taps: list[Tap], step: TrainStep) -> None:
    """Refuse an activation that the rules split into parts that are not equal."""
    layouts = step.split.layouts
    for tap in taps:
        lies = layouts.activation(tap.names)
        for name, n, axes in zip(tap.names, tap.shape, lies.dims, strict=True):
            parts = math.prod(layouts.sizes[a] for a in axes)
            if n % parts:
                raise InputError(
                    f"{tap.source}: the rules {layouts.rules!r} split {name} = {n} of an activation "
                    f"({' '.join(tap.names)}) into {parts} parts ({' x '.join(f'{a}={layouts.sizes[a]}' for a in axes)}), "
                    f"which does not divide. Make {name} a multiple of {parts}, or these axes smaller."
                )
