"""Layers under a listener: one by one where the step unrolls them, and from within the scan where it scans.

A listener keeps values of the trace that was entered, and a scan's body is a trace of its own. So a scan carries what the
listener wants: its zeros go in as one more array a layer, and the results come out as one. Each is then told by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import get_opaque_trace_state

from sharding.region import Listener, Region, Tap

C = TypeVar("C")
"""What goes from layer to layer: an activation, or a tree with one. A layer takes it and its parameters, path -> array."""


def unrolled(region: Region, body: Callable[[C, dict[str, Array]], C], x: C, stacked: dict[str, Array]) -> C:
    """The layers one by one in the caller's own trace."""
    outer = region.scope
    for at in range(_depth(stacked)):
        region.scope = f"{outer} layer {at}".strip()
        x = body(x, {path: array[at] for path, array in stacked.items()})
    region.scope = outer
    return x


def scanned(
    region: Region,
    listener: Listener,
    body: Callable[[C, dict[str, Array]], C],
    x: C,
    stacked: dict[str, Array],
) -> C:
    """The layers in one scan, each named op's result in each layer told to the listener where that hears."""
    if not region.hears:
        return lax.scan(lambda x, held: (body(x, held), None), x, stacked)[0]

    def inside(heard: _Inside, x: C, held: dict[str, Array]) -> C:
        outer = region.scope, region.entered
        region.listen, region.scope, region.entered = heard, "", get_opaque_trace_state(convention="nnx")
        made = body(x, held)
        region.listen, (region.scope, region.entered) = listener, outer
        return made

    def layer(x: C, given: tuple[dict[str, Array], list[Array | None]]) -> tuple[C, list[Array]]:
        heard = _Inside(given[1])
        return inside(heard, x, given[0]), heard.values

    found = _Inside(None)
    jax.eval_shape(
        lambda x, held: inside(found, x, held), x, {path: array[0] for path, array in stacked.items()}
    )
    told = [
        [replace(t, scope=f"{region.scope} layer {at} {t.scope}".strip()) for t in found.taps]
        for at in range(_depth(stacked))
    ]
    zeros = [[listener.zero(tap) for tap in taps] for taps in told]
    columns = [None if each[0] is None else jnp.stack(each) for each in zip(*zeros, strict=True)]
    x, values = lax.scan(layer, x, (stacked, columns))
    for at, taps in enumerate(told):
        for tap, value in zip(taps, values, strict=True):
            listener.hear(tap, value[at])
    return x


class _Inside:
    """What listens in the body of a scan: adds the zeros that it was given and keeps the results."""

    def __init__(self, zeros: list[Array | None] | None):
        self.zeros = None if zeros is None else iter(zeros)
        self.taps: list[Tap] = []
        self.values: list[Array] = []

    def zero(self, tap: Tap) -> Array | None:
        """The zero for the next result. Layers within a layer ask for all of theirs before the first is heard."""
        return None if self.zeros is None else next(self.zeros)

    def hear(self, tap: Tap, x: Array) -> None:
        """Keep a result."""
        self.taps.append(tap)
        self.values.append(x)


def _depth(stacked: dict[str, Array]) -> int:
    return next(iter(stacked.values())).shape[0]
