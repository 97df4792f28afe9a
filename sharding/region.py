"""The region in which named ops run: which layouts hold, who partitions, and what was traced.

Without a region the named ops are plain `jax.numpy` on one device; a model is then an ordinary Flax module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.extend.core import get_opaque_trace_state
from jax.sharding import Mesh, NamedSharding

from sharding.layout import Dims, Layouts, ParamLayouts, spec_of
from sharding.marks import INSIDE, mark
from sharding.order import Order
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.relayout import relayout, vary, varying

_current: ContextVar[Region | None] = ContextVar("region", default=None)


@dataclass(frozen=True)
class Tap:
    """One array that a named op produced: what `explain` and `verify` see of a trace."""

    op: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    """As it lies here: a shard in the manual region."""
    dtype: str
    source: str
    """file:line of the model code that called the op."""
    scope: str = ""
    """The layer that it belongs to, "layers 3"; "" outside any, and in a scan, where one trace stands for all."""


class Listener(Protocol):
    """What is told every named op's result as it is traced."""

    def zero(self, tap: Tap, /) -> Array | None:
        """A zero to be added to the result that is heard next, whose gradient is then the result's; None adds nothing."""
        ...

    def hear(self, tap: Tap, x: Array, /) -> None:
        """The result, with its zero."""
        ...


@dataclass
class Region:
    """One trace of a step under one partitioner. Make a new one for each trace."""

    layouts: Layouts
    mesh: Mesh | None
    partitioner: Partitioner
    taps: list[Tap] | None = None
    """Filled with every named op's result when it is a list."""
    platform: str = "cpu"
    """What the trace is for: some ops have a better form on one platform."""
    listen: Listener | None = None
    """Told every named op's result, as a value of the trace that was entered. Nothing is rematerialized then."""
    scope: str = ""
    """Where in the model the trace is, for taps."""
    through: Callable[..., Any] | None = None
    """What takes a stack of layers and what is to go through it (`sharding.layers.Stack`), where it is no plain loop."""
    brought: Mapping[str, ParamLayouts] = field(default_factory=dict)
    """Layouts of parameters that were brought elsewhere than they lie at rest before they came here, by path."""
    entered: Any = None
    """The trace that was entered, in which alone `listen` hears."""
    _memo: dict[tuple, tuple[Any, Array, Array]] = field(default_factory=dict)

    @property
    def manual(self) -> bool:
        """Whether arrays are local shards inside one manual region."""
        return isinstance(self.partitioner, Manual)

    @property
    def hears(self) -> bool:
        """Whether `listen` is told of the trace at hand: a model's own checkpoint or scan is another, whose values cannot
        leave it.
        """
        here = get_opaque_trace_state(convention="nnx")
        return self.listen is not None and self.entered == here

    def dims(self, names: tuple[str, ...]) -> Dims:
        """Layout of an activation with these names."""
        return self.layouts.activation(names).dims

    def ordered(self, name: str) -> tuple[Order | None, int]:
        """The order in which positions of a dim of this name lie here, and the devices of its axis (`Layouts.order`)."""
        return self.layouts.order(name) if self.manual else (None, 1)

    def once(self, x: Array, what: tuple, make: Callable[[], Array]) -> Array:
        """`make()`, made once for this array in this trace.

        q, k and v projections of one activation then share one gather forward and one all-reduce backward (Megatron's
        *f*) although the model's author wrote three einsums.
        """
        key, trace = (id(x), *what), get_opaque_trace_state(convention="nnx")
        held = self._memo.get(key)
        if held is None or held[0] != trace:
            held = (trace, x, make())  # holding x keeps its id from being used again
            self._memo[key] = held
        return held[2]

    def held(self, x: Array) -> frozenset[Dims]:
        """Layouts to which `x` has been brought in this trace already."""
        trace = get_opaque_trace_state(convention="nnx")
        return frozenset(
            key[3] for key, entry in self._memo.items() if key[:2] == (id(x), "move") and entry[0] == trace
        )

    def move(self, x: Array, src: Dims, dst: Dims, stays: frozenset[str] = frozenset()) -> Array:
        """`relayout`, once for each array and target; then typed as varying over `stays` too."""
        if src != dst:
            x = self.once(x, ("move", src, dst, stays), lambda x=x: relayout(x, src, dst, stays))
        if jnp.issubdtype(x.dtype, jnp.inexact) and not stays <= varying(x):
            x = self.once(x, ("vary", stays), lambda x=x: vary(x, stays))
        return x

    def constrain(self, x: Array, dims: Dims) -> Array:
        """XLA's partitioner: state where `x` lies."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec_of(dims)))

    def param(self, variable: nnx.Param) -> ParamLayouts:
        """Layouts of a parameter as the trace holds it: without the stacked dims that a scan has taken away."""
        shape = variable.global_shape
        brought = self.brought.get(variable.path)
        layouts = brought or self.layouts.param(variable.path, variable.names, shape)
        return layouts.drop(len(shape) - variable.get_value().ndim)


def current() -> Region | None:
    """The region of the trace at hand, or None outside any."""
    return _current.get()


@contextmanager
def enter(region: Region) -> Iterator[Region]:
    """Named ops called inside this context belong to `region`."""
    region.entered = get_opaque_trace_state(convention="nnx")
    token = _current.set(region)
    try:
        yield region
    finally:
        _current.reset(token)


def names_of(x: Array | nnx.Param) -> tuple[str, ...] | None:
    """Names of a parameter's dims as the trace holds it; None for an activation, whose names the op's text says."""
    if not isinstance(x, nnx.Variable):
        return None
    return tuple(x.names[len(x.global_shape) - x.get_value().ndim :])


def value(x: Array | nnx.Param, dtype: jnp.dtype | None = None) -> Array:
    """The array of a parameter or an activation, a floating-point parameter cast to `dtype`."""
    if not isinstance(x, nnx.Variable):
        return x
    array = x.get_value()
    if dtype is None or array.dtype == dtype or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    region = current()
    cast = lambda: array.astype(dtype)
    return cast() if region is None else region.once(array, ("cast", str(dtype)), cast)


def wide(x: Array) -> Array:
    """`x` in float32 for what needs its precision, or in float64 where it has that already."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def tap(op: str, names: tuple[str, ...], x: Array) -> Array:
    """Mark the result of a named op for remat policies, and note it where a region listens; returns it."""
    x = mark(x, "" if op in INSIDE else op, names)
    region = current()
    if region is None or (region.taps is None and region.listen is None):
        return x
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("sharding."):
        frame = frame.f_back
    source = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    seen = Tap(op, names, tuple(x.shape), str(x.dtype), source, region.scope)
    if region.taps is not None:
        region.taps.append(seen)
    if region.listen is None or not region.hears:
        return x
    zero = region.listen.zero(seen)
    x = x if zero is None else x + zero
    region.listen.hear(seen, x)
    return x


__all__ = [
    "Auto",
    "Listener",
    "Manual",
    "Region",
    "Tap",
    "current",
    "enter",
    "names_of",
    "tap",
    "value",
    "wide",
]
