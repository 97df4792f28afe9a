"""What is wrong with a split that cannot be traced, though one device can: the model's line, and the reduction it lacks.

The types of the manual region hold over which axes a value differs between devices. A sum that was never reduced is a
type error then, but one that jax finds at the end of the region, far from the line that is to blame.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sharding.ledger import asked_by, frame_kind
from sharding.partitioner import Manual
from sharding.proof.bisect import Departure
from sharding.proof.double import widened
from sharding.proof.trial import Untraced
from sharding.region import enter
from sharding.relayout import varying
from sharding.step import TrainStep


def at_trace(step: TrainStep, rows: int, double: bool, error: Untraced) -> Departure:
    """Where a trace of batches of `rows` rows failed: the model's line on the way to the error, else one whose result
    differs between devices that should hold the same, else the line of this package.
    """
    own, line = _lines(error.__cause__ or error)
    said = " ".join(str(error).split())[:400]
    if not line and isinstance(step.split.partitioner, Manual) and step.split.mesh is not None:
        for name, where, axes in _varying(step, rows, double):
            over = " x ".join(axes)
            looks = (
                f"a missing reduction over {over}: each device has the sum of its own part, and the types of the manual "
                f"region say so. Sum it with a named op of sharding.ops (an einsum sums over a name)"
            )
            return Departure("trace", f"the model's sum {name!r} ({where})", "", (), math.inf, 0.0, looks)
    looks = f"an error that one device does not have: {said}"
    where = f"the model's line {line}" if line else f"no line of the model, but {own}" if own else "the step"
    return Departure("trace", where, "", (), math.inf, 0.0, looks)


def line_of(error: BaseException) -> str:
    """file:line of the model's innermost line on the way to an error; "" where it has none."""
    return _lines(error)[1]


def _lines(error: BaseException) -> tuple[str, str]:
    """file:line of the innermost frame outside libraries, and of the innermost that is the model's, "" for none."""
    own = model = ""
    trace = error.__traceback__
    while trace is not None:
        kind = frame_kind(trace.tb_frame.f_code.co_filename)
        line = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        if kind == "ours":
            own = line
        elif kind == "model" and own:  # whoever stands further out called the step
            model = line
        trace = trace.tb_next
    return own, model


def _varying(step: TrainStep, rows: int, double: bool) -> list[tuple[str, str, tuple[str, ...]]]:
    """The model's sums that differ between devices: name, file:line and op of what made each, the axes."""
    found: list[tuple[str, str, tuple[str, ...]]] = []

    def look(params: Any, batch: Any) -> Any:
        def sums(params: Any, batch: Any) -> Any:
            with enter(step.region()):
                made = step.evaluate_sums(params, batch)
            axes.extend((name, tuple(sorted(varying(x)))) for name, x in sorted(made.items()))
            return made

        axes: list[tuple[str, tuple[str, ...]]] = []
        jaxpr = jax.make_jaxpr(sums)(step.contributed(params), batch).jaxpr
        for (name, over), var in zip(axes, jaxpr.outvars, strict=True):
            if over:
                maker = next((e for e in jaxpr.eqns if any(v is var for v in e.outvars)), None)
                found.append((name, ", ".join(asked_by(maker)) if maker else "as it was given", over))
        return jnp.zeros(())

    with jax.enable_x64(double):
        given = step.abstract_batch(rows)
        batch = {
            k: jax.ShapeDtypeStruct(x.shape, widened(x.dtype) if double else x.dtype)
            for k, x in given.items()
        }
        specs = (
            {p: x.param.spec() for p, x in step.layouts.items()},
            {k: step.inputs[k].spec() for k in batch},
        )
        mapped = jax.shard_map(
            look, mesh=step.split.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=True
        )
        with contextlib.suppress(Exception):  # where the forward pass fails, that is the error that is told
            jax.eval_shape(mapped, step.abstract_state()["params"], batch)
    return found
