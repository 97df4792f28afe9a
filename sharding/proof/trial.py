"""Running a step a few times and keeping all that can be compared: losses, gradients, parameters, optimizer state."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding.errors import InputError
from sharding.proof.double import floats, narrowed, of_double, widely, widened
from sharding.step import TrainStep

Leaves = dict[str, np.ndarray]


class Copies(NamedTuple):
    """What each device holds of one array where devices should hold the same: a leading dim for each of `axes`."""

    axes: tuple[str, ...]
    values: np.ndarray


@dataclass(frozen=True)
class Trial:
    """What some updates from one seed gave. Arrays are whole, on the host, by path."""

    initial: Leaves
    """Parameters before the first update."""
    metrics: tuple[dict[str, float], ...]
    """Loss, gradient norm and whatever else the step reports, an update each."""
    gradients: Leaves
    """Of the first update: means over the batch, before clipping, which would hide a common factor."""
    params: Leaves
    """After the last update."""
    optimizer: Leaves
    """Optimizer state after the last update, by its path in the tree."""
    uneven: dict[str, Copies] = field(default_factory=dict)
    """Arrays of which devices that ought to hold the same hold different values, by kind and path."""

    def broken(self) -> str:
        """The first metric or array that is not finite; "" when all are."""
        arrays = {
            "the gradient of": self.gradients,
            "the parameter": self.params,
            "the optimizer's": self.optimizer,
        }
        metrics = [(f"the metric {k}", np.array(v)) for seen in self.metrics for k, v in seen.items()]
        named = [(f"{kind} {p}", x) for kind, leaves in arrays.items() for p, x in leaves.items()]
        return next((name for name, x in metrics + named if not np.isfinite(x).all()), "")


class Untraced(Exception):
    """A step that cannot be traced as it is split; its cause is what was raised."""


class Ready:
    """A step compiled for a trial; compiling and running are apart so that one can go on while another runs.

    double: in float64. wide: what the step itself casts to narrower types is left out as well; the step may then be one of
    narrower types, at which it is traced (`widely`). `casts` are the types that it casts to from finer ones, `types` those
    that it computes in.

    The norm at which gradients are clipped is an argument of the program, so that it may be another in each update (`Going`).
    """

    def __init__(self, step: TrainStep, rows: int, double: bool = False, wide: bool = False):
        self.step, self.double, self.wide = step, double, wide
        types = step.abstract_batch(rows)
        put = {
            k: jax.ShapeDtypeStruct(
                x.shape, widened(x.dtype) if double else x.dtype, sharding=step.batch_shardings()[k]
            )
            for k, x in types.items()
        }
        own = of_double({p: spec.abstract() for p, spec in step.tree.items()})
        with jax.enable_x64(double and (own or not wide)):
            held = step.abstract_state()
        with jax.enable_x64(double):
            grown = lambda x: jax.ShapeDtypeStruct(x.shape, widened(x.dtype))
            self.state = jax.tree.map(grown, held) if wide else held
            number = np.float64 if own else np.float32
            clip = jax.ShapeDtypeStruct((), number, weak_type=True)  # a number, as `TrainStep.clip` is
            lies = (step.state_shardings(), None, None)
            made = jax.jit(
                widely(self._updated, held, types, clip) if wide else self._updated,
                donate_argnums=0,
                out_shardings=lies,
            )
            try:
                traced = made.trace(self.state, put, 1.0)
            except Exception as error:  # its author's code, and jax's where types do not fit: of any kind
                if isinstance(error, InputError) or step.split.mesh is None:
                    raise
                raise Untraced(f"{type(error).__name__}: {error}") from error
            self.casts, self.types = narrowed(traced.jaxpr.jaxpr), floats(traced.jaxpr.jaxpr)
            self.update = traced.lower().compile()

    def _updated(self, state: Any, batch: Any, clip: Any) -> Any:
        """An update of the step with its gradients clipped at this norm."""
        step = copy.copy(self.step)
        step.clip = clip
        return step.updated(state, batch)

    def run(
        self,
        seed: int,
        batches: Sequence[Mapping[str, np.ndarray]],
        initial: Leaves | None = None,
        clips: Sequence[float] = (),
    ) -> Trial:
        """One update a batch from the parameters of `seed`, or from `initial`; batches are whole, on the host. clips: the norm
        at which the gradients of each update are clipped; none: the step's own.
        """
        going = Going(self, seed, initial, clips)
        for batch in batches:
            going.update(batch)
        return going.trial()

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        lies = self.step.batch_shardings()  # a model may read a part of what its dataset has
        arrays = {k: batch[k].astype(widened(batch[k].dtype)) if self.double else batch[k] for k in lies}
        return {
            k: jnp.asarray(x) if lies[k] is None else jax.device_put(x, lies[k]) for k, x in arrays.items()
        }


class Going:
    """A trial under way: its state stays on the devices, so that it can be looked at after any update."""

    def __init__(self, ready: Ready, seed: int, initial: Leaves | None = None, clips: Sequence[float] = ()):
        self.ready, self.clips = ready, tuple(clips)
        self.metrics: list[dict[str, Any]] = []
        self.gradients: dict[str, Any] = {}
        with jax.enable_x64(ready.double):
            begun = ready.step.init(seed) if initial is None else ready.step.begin(initial)
            self.state = jax.tree.map(lambda x, s: x if _key(x) else x.astype(s.dtype), begun, ready.state)
            self.initial = host(self.state["params"])

    def update(self, batch: Mapping[str, np.ndarray]) -> None:
        """One update on a batch, whole, on the host."""
        with jax.enable_x64(self.ready.double):
            # One at a time: with several queued, XLA:CPU's collectives have waited for each other for ever.
            given = self.state, self.ready.put(batch), self._clip(len(self.metrics))
            made = jax.block_until_ready(self.ready.update(*given))
        self.state, seen, gradients = made
        self.metrics.append(seen)
        self.gradients = self.gradients or gradients

    def _clip(self, at: int) -> float:
        """The norm at which update `at` (from 0) clips."""
        return float(self.clips[at] if self.clips else self.ready.step.clip)

    def trial(self) -> Trial:
        """What the updates so far gave, one at least."""
        with jax.enable_x64(self.ready.double):
            params = self.state["params"]
            flat, _ = jax.tree_util.tree_flatten_with_path(self.state["optimizer"])
            moments = {jax.tree_util.keystr(k): x for k, x in flat} | {"step": self.state["step"]}
            values = tuple({k: float(v) for k, v in seen.items()} for seen in self.metrics)
            clipped = min(1.0, self._clip(0) / max(values[0]["grad_norm"], 1e-12))
            parts = {"gradient": self.gradients, "parameter": params, "optimizer": moments}
            uneven = {f"{k} {p}": c for k, part in parts.items() for p, x in part.items() if (c := copies(x))}
            mean = lambda g: g / g.dtype.type(clipped)
            means = {p: mean(g) for p, g in host(self.gradients).items()}
            norms = copies(self.metrics[0]["grad_norm"])
            for k, c in uneven.items():
                if k.startswith("gradient "):
                    uneven[k] = c._replace(values=_unclipped(c, norms, self._clip(0), clipped))
            return Trial(self.initial, values, means, host(params), host(moments), uneven)


def _unclipped(found: Copies, norms: Copies | None, clip: float, common: float) -> np.ndarray:
    """Copies of a gradient before clipping: each device has clipped by the norm that it holds, all by one where they agree."""
    kind = found.values.dtype.type
    if norms is None or norms.axes != found.axes:
        return found.values / kind(common)
    factors = np.minimum(1.0, clip / np.maximum(norms.values, 1e-12)).astype(found.values.dtype)
    return found.values / factors.reshape(*factors.shape, *(1,) * (found.values.ndim - factors.ndim))


def host(leaves: Mapping[str, Any]) -> Leaves:
    """Arrays whole on the host, bfloat16 as float32."""
    out = {}
    for path, x in leaves.items():
        x = jax.random.key_data(x) if _key(x) else x
        array = np.asarray(x)
        out[path] = array.astype(np.float32) if array.dtype == jnp.bfloat16 else array
    return out


def _key(x: Any) -> bool:
    """Whether an array is one of random keys, which have no numbers of their own."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def copies(x: jax.Array) -> Copies | None:
    """What each device holds of an array, where devices that hold the same part of it differ; else None.

    XLA trusts a program that says that an array is replicated; nothing but its shards shows that it is not.
    """
    x = jax.random.key_data(x) if _key(x) else x
    seen: dict[str, np.ndarray] = {}
    pairs = [
        (seen.setdefault(str(s.index), np.asarray(s.data)), np.asarray(s.data)) for s in x.addressable_shards
    ]
    if all(np.array_equal(a, b, equal_nan=jnp.issubdtype(x.dtype, jnp.inexact)) for a, b in pairs):
        return None
    # Only an array that lies on a mesh by names can differ between its copies here.
    mesh, spec = x.sharding.mesh, x.sharding.spec  # pyright: ignore[reportAttributeAccessIssue]
    used = {a for dim in spec if dim is not None for a in (dim if isinstance(dim, tuple) else (dim,))}
    axes = tuple(a for a, n in mesh.shape.items() if n > 1 and a not in used)
    values = np.zeros(
        (*(mesh.shape[a] for a in axes), *x.shape), np.asarray(x.addressable_shards[0].data).dtype
    )
    for shard in x.addressable_shards:
        (place,) = np.argwhere(mesh.devices == shard.device)
        at = dict(zip(mesh.axis_names, place, strict=True))
        values[(*(int(at[a]) for a in axes), *shard.index)] = np.asarray(shard.data)
    return Copies(axes, values)
