"""FLOPs of each slot of a pipeline's ticks, from the trace."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr
from pipeline_tasks import executor

from sharding.ledger import flops
from sharding.pipeline.lockstep import Lockstep
from sharding.step import TrainStep


def flops_of_tasks(step: TrainStep, rows: int) -> tuple[dict[str, int], dict[str, int]]:
    """(FLOPs of each kind of slot on a device, how often it stands in the ticks)."""
    each: dict[str, int] = {}
    often: Counter[str] = Counter()

    def look(whole: Lockstep) -> Array:
        layers = whole.tasks.layers
        programs = {"enter": whole.tasks.enter, "F": layers.forward, "loss": whole.tasks.loss, "B": layers.backward,
                    "W": layers.weights, "entered": whole.tasks.entered}  # fmt: skip
        each.update(
            {slot: flops(ClosedJaxpr(p.jaxpr, p.consts)) for slot, p in programs.items() if p is not None}
        )
        for block in whole.table.blocks:
            for slots, ticks in block.runs:
                often.update(dict.fromkeys(slots, block.repeats * ticks))
        return jnp.zeros(())

    params = {p: s.abstract() for p, s in step.tree.items()}
    jax.eval_shape(lambda p, b: executor(step, look, p, b), params, step.abstract_batch(rows))
    return each, dict(often)
