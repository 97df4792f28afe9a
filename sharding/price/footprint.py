"""Memory that a traced step needs on each device, predicted from its jaxpr: what is alive when most is.

The assumption is on fusion. Elementwise work is fused into what reads it, so that only some values ever lie in memory: results
of products, collectives and loops, what those read, and what leaves the program (`sharding.price.lifetimes`). A value lies from
the step that makes it to the last that reads it, in the program's own order. What each platform's compiler does besides stands
in `sharding.price.habits`, a term each.

Not predicted: the program's own code, gaps between arrays, padding and copies into another layout; on TPU the rounding to
bfloat16 of float32 arrays that only products read. And of layers unrolled on CPU with remat nothing true: XLA:CPU drops the
barriers that keep what is computed again apart from what it repeats, merges both, and keeps as much as without remat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jax.extend.core import ClosedJaxpr, Jaxpr

from sharding.ledger import subjaxprs
from sharding.price.habits import HABITS
from sharding.price.lifetimes import Program


@dataclass(frozen=True)
class Alive:
    """Bytes of a device's memory when most is alive, beside the step's arguments."""

    kept: int
    """Made in the forward pass: what the backward pass will read, and the forward pass's own work."""
    made: int
    """Made in the backward pass and after it: gradients, and what is being worked on."""
    on_chip: int = 0
    """Alive besides, in the chip's own memory."""

    @property
    def total(self) -> int:
        """Both parts in the device's memory."""
        return self.kept + self.made


def peak(jaxpr: ClosedJaxpr, platform: str, on_chip: int = 0) -> Alive:
    """The most that is alive at once in a step's first manual region, its own inputs left out; of a jaxpr without one the
    whole, in the shapes that it has. A platform without habits of its own ("accelerator") has a TPU's.

    on_chip: bytes of memory on the chip that the compiler manages.
    """
    region = next(_regions(jaxpr.jaxpr), jaxpr.jaxpr)
    habits = replace(HABITS.get(platform, HABITS["tpu"]), on_chip=on_chip)
    most = Program(region, {}, "", habits).peak()
    placed = min(most.short, on_chip)
    of_made = min(placed, most.made)
    return Alive(most.kept - (placed - of_made), most.made - of_made, placed)


def _regions(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    for eqn in jaxpr.eqns:
        for body in subjaxprs(eqn.params):
            if eqn.primitive.name == "shard_map":
                yield body
            else:
                yield from _regions(body)
