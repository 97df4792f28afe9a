"""Every tensor that a step's named ops produce, and its gradient, whole: what tells where two computations part.

The forward pass runs with a listener at every named op. To each result it adds a zero; the gradient with respect to that
zero is the gradient with respect to the result. Nothing is rematerialized meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from sharding.layout import Layout
from sharding.partitioner import Manual
from sharding.proof.double import of_double, widely, widened
from sharding.proof.trial import copies, host
from sharding.region import Tap, enter
from sharding.relayout import varying
from sharding.step import TrainStep


@dataclass(frozen=True)
class Seen:
    """One tensor of a forward pass and its gradient, whole, on the host.

    `replicas` names the axes along which devices should hold the same, but nothing in the types says that they do; the
    value then has a leading dim for each, in that order, with what each device holds.
    """

    tap: Tap
    layout: Layout
    value: np.ndarray
    gradient: np.ndarray | None
    """Of the summed loss; None for a tensor of integers."""
    replicas: tuple[str, ...] = ()
    places: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of a name whose positions lie in an order of their own: position -> its place in that order."""

    @property
    def title(self) -> str:
        """`layer 3, attention (models/transformer.py:31)` without the folder of the file."""
        place = f"{self.tap.scope}, " if self.tap.scope else ""
        return f"{place}{self.tap.op} ({self.tap.source})"


def witness(
    step: TrainStep,
    params: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    double: bool = False,
    wide: bool = False,
) -> list[Seen]:
    """Every tensor of the step's forward pass from whole parameters and a whole batch, in program order. `double` and `wide`
    as in `Ready`.
    """
    with jax.enable_x64(double):
        grown = lambda x: x.astype(widened(x.dtype)) if double else x
        put = lambda x, s: jnp.asarray(grown(x)) if s is None else jax.device_put(grown(x), s)
        rest = {p: step.sharding(lies.param) for p, lies in step.layouts.items()}
        held = {p: put(params[p], rest[p]) for p in step.layouts}
        rows = {k: put(batch[k], s) for k, s in step.batch_shardings().items()}
        return _Listening(step, held, rows, wide).run()


def _natural(
    x: np.ndarray, names: tuple[str, ...], orders: Mapping[str, np.ndarray], leading: int
) -> np.ndarray:
    """`x`, whose dims after the first `leading` have these names, with every dim in its natural order."""
    for dim, name in enumerate(names, leading):
        if name in orders:
            x = np.take(x, np.argsort(orders[name]), axis=dim)
    return x


class _Listener:
    """Gives each named op the next of some zeros, while there are any, and tells each result to `hear`."""

    def __init__(self, zeros: list[Any], hear: Callable[[Tap, Array], None]):
        self.left, self.hear = iter(zeros), hear

    def zero(self, tap: Tap) -> Array | None:
        """The next zero."""
        return next(self.left, None)


class _Listening:
    """Two traces of one forward pass: the first finds what there is to hear, the second returns it."""

    def __init__(self, step: TrainStep, params: dict[str, Any], batch: dict[str, Any], wide: bool):
        self.step, self.params, self.batch, self.wide = step, params, batch, wide
        self.manual = isinstance(step.split.partitioner, Manual) and step.split.mesh is not None
        self.heard: list[tuple[Tap, Layout, tuple[str, ...], Any]] = []

    def run(self) -> list[Seen]:
        self._find()
        zeros = [self._zero(layout, shape) for _, layout, _, shape in self.heard]
        made = jax.jit(widely(self._global, *self._types(), zeros) if self.wide else self._global)
        given = jax.tree.map(lambda x: x.astype(widened(x.dtype)), zeros) if self.wide else zeros
        values, gradients = made(self.params, self.batch, given)
        out = []
        for (tap, layout, replicas, _), value, gradient in zip(self.heard, values, gradients, strict=True):
            told = None if self.manual or self.step.split.mesh is None else copies(value)
            extra, whole = told or (replicas, value)
            back = None if gradient is None else host({"": gradient})[""]
            value = host({"": whole})[""]
            orders = self._orders(dict(zip(layout.names, value.shape[len(extra) :], strict=True)))
            natural = lambda x, leading=0, names=layout.names, orders=orders: _natural(
                x, names, orders, leading
            )
            places = {name: np.argsort(at) for name, at in orders.items()}
            of_loss = None if back is None else natural(back)
            out.append(Seen(tap, layout, natural(value, len(extra)), of_loss, extra, places))
        return out

    def _orders(self, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Of the names that lie in an order of their own: the position at each place."""
        told = {n: self.step.split.layouts.order(n) for n in sizes} if self.manual else {}
        return {
            n: order.position(np.arange(sizes[n]), sizes[n], parts)
            for n, (order, parts) in told.items()
            if order is not None
        }

    def _types(self) -> tuple[Any, Any]:
        """What the model is traced at: what it is run with, or its own types where they may be narrower (`widely`)."""
        if not self.wide:
            return self.params, self.batch
        typed = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype)
        params = {p: typed(x, self.step.tree[p].dtype) for p, x in self.params.items()}
        return params, {k: typed(x, self.step.model.inputs[k].dtype) for k, x in self.batch.items()}

    def _find(self) -> None:
        def note(tap: Tap, x: Array) -> None:
            layout = self.step.split.layouts.activation(tap.names)
            extra = tuple(sorted(varying(x) - set(layout.axes))) if self.manual else ()
            sizes = self.step.split.layouts.sizes
            counts = [
                int(np.prod([sizes[a] for a in dim], dtype=int)) if self.manual else 1 for dim in layout.dims
            ]
            shape = tuple(n * k for n, k in zip(x.shape, counts, strict=True))
            self.heard.append((tap, layout, extra, jax.ShapeDtypeStruct(shape, x.dtype)))

        def forward(params: Any, batch: Any) -> Array:
            with enter(self.step.region(listen=_Listener([], note))):
                return self.step.objective(self._varied(params), batch)

        types = self._types()
        with jax.enable_x64(of_double(types)):
            jax.eval_shape(self._mapped(forward, PartitionSpec()), *types)

    def _varied(self, params: dict[str, Array]) -> dict[str, Array]:
        return self.step.contributed(params) if self.manual else params

    def _zero(self, layout: Layout, shape: Any) -> Any:
        if not jnp.issubdtype(shape.dtype, jnp.inexact):
            return None
        mesh = self.step.split.mesh
        lies = None if mesh is None else NamedSharding(mesh, layout.spec())
        return jnp.zeros(shape.shape, shape.dtype, device=lies)

    def _global(self, params: Any, batch: Any, zeros: list[Any]) -> tuple[list[Array], list[Array]]:
        specs = [layout.spec() for _, layout, _, _ in self.heard]
        stacked = [
            PartitionSpec(*extra, *spec) for (_, _, extra, _), spec in zip(self.heard, specs, strict=True)
        ]
        given = [None if z is None else s for z, s in zip(zeros, specs, strict=True)]
        return self._mapped(self._local, (stacked, given), given)(params, batch, zeros)

    def _local(self, params: Any, batch: Any, zeros: list[Any]) -> tuple[list[Array], list[Array]]:
        def loss(zeros: list[Any]) -> tuple[Array, list[Array]]:
            values: list[Array] = []
            listener = _Listener(zeros, lambda _, x: values.append(x))
            with enter(self.step.region(listen=listener)):
                total = self.step.objective(self._varied(params), batch)
            return total, values

        gradients, values = jax.grad(loss, has_aux=True)(zeros)
        # Each device's own value along the axes over which nothing proves that devices agree.
        grown = [
            x.reshape((1,) * len(extra) + x.shape)
            for x, (_, _, extra, _) in zip(values, self.heard, strict=True)
        ]
        return grown, gradients

    def _mapped(self, function: Any, out: Any, given: Any = None) -> Any:
        if not self.manual:
            return function
        step = self.step
        rest = {p: x.param.spec() for p, x in step.layouts.items()}
        rows = {k: step.inputs[k].spec() for k in self.batch}
        specs = (rest, rows) if given is None else (rest, rows, given)
        return jax.shard_map(function, mesh=step.split.mesh, in_specs=specs, out_specs=out, check_vma=True)
