"""What a step will do on a mesh, read from its trace: what moves, what is computed, what lies in memory. No device is needed.

Predicted, not compiled: `sharding.module.compiled` reads what a compiler made of it, `sharding.module.differences` holds the
two together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import ClosedJaxpr

from sharding.ledger import Collective, collectives
from sharding.marks import HOST
from sharding.price.footprint import peak
from sharding.price.work import Work, work

if TYPE_CHECKING:
    from sharding.price.machine import Machine
    from sharding.step import TrainStep


@dataclass(frozen=True)
class Footprint:
    """Predicted bytes on each device while most is alive."""

    parameters: int
    optimizer: int
    batch: int
    kept: int
    """Of what the forward pass makes: what the backward pass will read."""
    made: int
    """Of the backward pass and after: gradients, and what is being worked on."""
    host: int = 0
    """Bytes in the host's memory for each device, not in `total`."""
    on_chip: int = 0
    """Bytes that are alive then in the chip's own memory, not in `total`."""

    @property
    def arguments(self) -> int:
        """What lies there between steps, and the batch."""
        return self.parameters + self.optimizer + self.batch

    @property
    def total(self) -> int:
        """All parts on the device."""
        return self.arguments + self.kept + self.made


@dataclass(frozen=True)
class Prediction:
    """What is read from one traced step."""

    collectives: tuple[Collective, ...]
    work: tuple[Work, ...]
    memory: Footprint


def predict(
    step: TrainStep, rows: int, update: ClosedJaxpr | None = None, machine: Machine | None = None
) -> Prediction:
    """The prediction for a batch of `rows` rows under the manual partitioner; XLA's decides after tracing.

    update: the traced step, where it is at hand (`sharding.check.traced`); it is traced here otherwise, for which jax must be
    in a trace already if no backend is to start. machine: of the devices; without it nothing is put into memory on the chip.
    Raises InputError for what cannot be laid out.
    """
    state, batch = step.abstract_state(), step.abstract_batch(rows)
    update = jax.make_jaxpr(step.update)(state, batch) if update is None else update
    sizes = step.split.layouts.sizes
    alive = peak(update, step.split.target(), machine.on_chip if machine else 0)
    lies = step.batch_shardings()
    laid = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies[k]) for k, x in batch.items()]
    moments = jax.tree.leaves(state["optimizer"])
    away = [x for x in moments if getattr(x.sharding, "memory_kind", None) == HOST]
    here = [x for x in (*moments, state["step"]) if not any(x is y for y in away)]
    memory = Footprint(
        parameters=_bytes(state["params"].values()),
        optimizer=_bytes(here),
        batch=_bytes(laid),
        kept=alive.kept,
        made=alive.made,
        host=_bytes(away),
        on_chip=alive.on_chip,
    )
    return Prediction(tuple(collectives(update, sizes)), tuple(work(update)), memory)


def _bytes(arrays: Iterable[Any]) -> int:
    """Bytes of these on one device."""
    shape = lambda x: x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in arrays)
