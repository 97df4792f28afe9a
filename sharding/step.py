"""One jitted, donated train step from (state, batch) to (state, metrics), for any rules, mesh and partitioner.

Manual partitioner: loss, gradients and every collective run in one `jax.shard_map` over all axes with `check_vma` on, so
that a forgotten reduction is an error at trace time. The optimizer runs outside it in the same jit on arrays that all
lie by the `optimizer` role: an elementwise update then needs no communication, and one that is not elementwise
(Adafactor, Muon) stays right because XLA partitions it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import PartitionSpec

from sharding.accumulate import accumulated
from sharding.errors import InputError
from sharding.laid import Laid, Split, State
from sharding.layout import Layout, contribution_axes
from sharding.ordered import enter as enter_order
from sharding.ordered import leave as leave_order
from sharding.params import Model, bind, initial, lay, objective
from sharding.partitioner import Manual
from sharding.pipeline.execute import pipelined
from sharding.region import Listener, Region, current, enter, wide
from sharding.relayout import finish, relayout, vary, varying
from sharding.scope import about


class TrainStep(Laid):
    """A model, an optimizer and a split, made into compiled functions.

    `init(seed)` gives the state, `step(state, batch)` an updated state and metrics (loss in nats per weight, weight,
    gradient norm before clipping), `evaluate(params, batch)` global sums, `forward(params, method, ...)` any output.
    """

    def __init__(
        self, model: Model, optimizer: optax.GradientTransformation, split: Split, clip: float = math.inf
    ):
        super().__init__(model, optimizer, split)
        self.clip = clip
        self._varies = contribution_axes(self.layouts, list(self.inputs.values()))
        once = self._left_varying()
        self._varies = {p: axes - once for p, axes in self._varies.items()}
        self.step = jax.jit(self.update, donate_argnums=0, out_shardings=(self.state_shardings(), None))
        self.evaluate = jax.jit(self.evaluation)

    def _left_varying(self) -> frozenset[str]:
        """Axes that split a dim of the inputs, other than the rows, over which the sums vary if parameters are typed so.

        A head on pooled positions has them: what it computes is equal on all devices of the axis, its gradient no sum of
        contributions. Parameters are then left as they are over that axis, and each use reduces its own gradient.
        """
        rows = {n: split for x in self.inputs.values() for n, split in zip(x.names, x.dims, strict=True)}.get(
            "batch", ()
        )
        along = frozenset().union(*self._varies.values()) - frozenset(rows)
        if not along or not isinstance(self.split.partitioner, Manual) or self.split.mesh is None:
            return frozenset()
        left: set[str] = set()

        def look(params: dict[str, Array], batch: dict[str, Array]) -> Array:
            with enter(self.region()):
                left.update(*map(varying, self._sums(self.contributed(params), batch)[1].values()))
            return jnp.zeros(())

        batch = self.abstract_batch(math.prod(self.split.layouts.sizes[a] for a in rows))
        specs = (self._rest_specs(), self._batch_specs(batch))
        params = {p: s.abstract() for p, s in self.tree.items()}
        try:
            jax.eval_shape(self._manual(look, specs, PartitionSpec()), params, batch)
        except InputError:
            raise
        except Exception:
            return frozenset()
        return along & left

    def init(self, seed: int) -> State:
        """The state before the first step; parameters are bitwise equal on every mesh."""
        drawn = getattr(self.model, "initial", None)  # a foreign model draws its parameters itself, whole
        if drawn is not None:
            return self.begin(drawn(seed))
        return jax.jit(lambda: self._state(initial(self.tree, seed)), out_shardings=self.state_shardings())()

    def begin(self, params: Mapping[str, Any]) -> State:
        """The state before the first step from parameters that this process has whole, path -> array."""
        held = lay(params, {p: self.sharding(x.param) for p, x in self.layouts.items()})
        return jax.jit(self._state, out_shardings=self.state_shardings())(held)

    def _state(self, params: dict[str, Array]) -> State:
        start = jnp.zeros((), jnp.int32)
        return {"params": params, "optimizer": self.optimizer.init(params), "step": start}

    def update(self, state: State, batch: Mapping[str, Array]) -> tuple[State, dict[str, Array]]:
        """What `step` compiles: one update of the state and its metrics."""
        return self.updated(state, batch)[:2]

    def updated(
        self, state: State, batch: Mapping[str, Array]
    ) -> tuple[State, dict[str, Array], dict[str, Array]]:
        """One update of the state, its metrics, and the gradients that it used: clipped means in the optimizer's layout."""
        grads, metrics = self._gradients(state["params"], batch)
        held = {p: self._lies(w, self.layouts[p].optimizer) for p, w in state["params"].items()}
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its integer count
            updates, moments = self.optimizer.update(grads, self.fetched(state["optimizer"]), held)
        updated: Any = optax.apply_updates(held, updates)
        params = self._at_rest(updated)
        return {"params": params, "optimizer": moments, "step": state["step"] + 1}, metrics, grads

    def _gradients(
        self, params: dict[str, Array], batch: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Mean gradients, clipped, laid out as the optimizer's state; metrics."""
        if not isinstance(self.split.partitioner, Manual) or self.split.mesh is None:
            return self._auto_gradients(params, batch)
        out = {p: x.optimizer.spec() for p, x in self.layouts.items()}
        return self._manual(
            self._manual_gradients, (self._rest_specs(), self._batch_specs(batch)), (out, PartitionSpec())
        )(params, batch)

    def _manual(self, function, in_specs, out_specs):
        return jax.shard_map(
            function, mesh=self.split.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True
        )

    def _rest_specs(self) -> dict[str, PartitionSpec]:
        return {p: x.param.spec() for p, x in self.layouts.items()}

    def _batch_specs(self, batch: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        return {k: self.inputs[k].spec() for k in batch}

    def region(self, taps: list | None = None, listen: Listener | None = None) -> Region:
        """A region for one trace."""
        split = self.split
        return Region(split.layouts, split.mesh, split.partitioner, taps, split.target(), listen)

    def objective(self, params: dict[str, Array], batch: Mapping[str, Array]) -> Array:
        """The sum whose gradient is taken, in whatever region is entered."""
        return self._sums(params, batch)[0]

    def evaluate_sums(self, params: dict[str, Array], batch: Mapping[str, Array]) -> dict[str, Array]:
        """The model's global sums in whatever region is entered."""
        return self._sums(params, batch)[1]

    def _sums(self, params: dict[str, Array], batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        region = current()
        if region is not None:
            batch = {k: enter_order(region, x, self.inputs[k].names) for k, x in batch.items()}
        sums = bind(self.model, params).loss(dict(batch))
        return objective(sums), sums

    def _sums_and_gradients(
        self, params: dict[str, Array], batch: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """The model's sums over a micro-batch and the gradients of its objective, in the manual region that is entered."""
        schedule, region = self.split.schedule, current()
        if schedule is None or region is None:
            (_, sums), grads = jax.value_and_grad(self._sums, has_aux=True)(params, batch)
            return sums, grads
        batch = {k: enter_order(region, x, self.inputs[k].names) for k, x in batch.items()}
        return pipelined(self.model, region, schedule.grid(self.split.layouts.sizes["stage"]), params, batch)

    def contributed(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """Parameters of the manual region typed as varying over the axes that split the tokens: each device's gradient is
        its own contribution then, reduced once a step and not at every use, layer and micro-batch.
        """
        return {p: vary(w, self._varies[p]) for p, w in params.items()}

    def _manual_gradients(self, params, batch):
        held = self.contributed(params)

        def one(batch):
            with enter(self.region()):
                sums, grads = self._sums_and_gradients(held, batch)
            return {p: self._scatter(p, g) for p, g in grads.items()}, sums

        grads, sums = accumulated(one, batch, self.split.accumulate, "consecutive")
        grads = {p: self._reduce(p, g) for p, g in grads.items()}
        squares = {}
        for p, g in grads.items():
            axes = tuple(sorted(self.layouts[p].gradient.axes))
            squares[axes] = squares.get(axes, 0.0) + jnp.sum(jnp.square(wide(g)))
        with about("norm", "gradients"):
            total = sum(lax.psum(x, axes) if axes else x for axes, x in squares.items())
        scale, metrics = self._finished(sums, jnp.sqrt(total))
        laid = {
            p: relayout(g, self.layouts[p].gradient.dims, self.layouts[p].optimizer.dims)
            for p, g in grads.items()
        }
        return {p: g * scale.astype(g.dtype) for p, g in laid.items()}, metrics

    def _auto_gradients(self, params, batch):
        def one(batch):
            with enter(self.region()):
                (_, sums), grads = jax.value_and_grad(self._sums, has_aux=True)(params, batch)
            return {p: self._lies(g, self.layouts[p].gradient) for p, g in grads.items()}, sums

        order = "consecutive" if self.split.mesh is None else "interleaved"
        grads, sums = accumulated(one, batch, self.split.micro_batches, order)
        scale, metrics = self._finished(
            sums, jnp.sqrt(sum(jnp.sum(jnp.square(wide(g))) for g in grads.values()))
        )
        return {
            p: self._lies(g, self.layouts[p].optimizer) * scale.astype(g.dtype) for p, g in grads.items()
        }, metrics

    def _partial(self, g: Array, layout: Layout) -> frozenset[str]:
        return varying(g) - frozenset(layout.axes)

    def _scatter(self, path: str, g: Array) -> Array:
        """A micro-batch's gradient, reduce-scattered where the `gradient` role is split and the parameter is not."""
        x = self.layouts[path]
        over = self._partial(g, x.param) & frozenset(x.gradient.axes)
        with about("gradient", path):
            return finish(g, tuple(a for a in x.gradient.axes if a in over), x.param.dims, x.gradient.dims)

    def _reduce(self, path: str, g: Array) -> Array:
        """The rest of the reduction, once a step: for HSDP the shard over `data`, for data parallelism everything."""
        over = self._partial(g, self.layouts[path].gradient)
        with about("gradient", path):
            return lax.psum(g, tuple(sorted(over))) if over else g

    def _finished(self, sums: dict[str, Array], norm: Array) -> tuple[Array, dict[str, Array]]:
        """Factor that turns summed gradients into clipped means, and the metrics."""
        weight = jnp.maximum(sums["weight"], 1e-6)
        norm = norm / weight
        clip = jnp.minimum(1.0, self.clip / jnp.maximum(norm, 1e-12))
        means = {k: v / weight for k, v in sums.items() if k != "weight"}
        return clip / weight, {**means, "weight": sums["weight"], "grad_norm": norm}

    def _lies(self, x: Array, layout: Layout) -> Array:
        """State where an array lies outside the manual region."""
        sharding = self.sharding(layout)
        return x if sharding is None else lax.with_sharding_constraint(x, sharding)

    def _at_rest(self, params: dict[str, Array]) -> dict[str, Array]:
        """Updated parameters from the optimizer's layout back to rest: a gather for ZeRO-1 and ZeRO-2."""
        split = {p for p, x in self.layouts.items() if x.optimizer.dims != x.param.dims}
        if self.split.mesh is None or not split or not isinstance(self.split.partitioner, Manual):
            return {p: self._lies(w, self.layouts[p].param) for p, w in params.items()}

        def gather(parts):
            return {p: self._gathered(p, w) for p, w in parts.items()}

        specs = {p: self.layouts[p].optimizer.spec() for p in split}
        rest = {p: self.layouts[p].param.spec() for p in split}
        gathered = self._manual(gather, (specs,), rest)({p: params[p] for p in split})
        return {p: gathered.get(p, w) for p, w in params.items()}

    def _gathered(self, path: str, w: Array) -> Array:
        with about("updated", path):
            return relayout(w, self.layouts[path].optimizer.dims, self.layouts[path].param.dims)

    def evaluation(self, params: dict[str, Array], batch: Mapping[str, Array]) -> dict[str, Array]:
        """What `evaluate` compiles: the model's global sums over a batch."""

        def sums(params, batch):
            with enter(self.region()):
                return self.evaluate_sums(params, batch)

        if self.split.mesh is None or not isinstance(self.split.partitioner, Manual):
            return sums(params, batch)
        return self._manual(sums, (self._rest_specs(), self._batch_specs(batch)), PartitionSpec())(
            params, batch
        )

    def forward(self, params: dict[str, Array], method: str, names: str, *inputs: tuple[Array, str]) -> Array:
        """Call a method of the model on (array, names) inputs; the result, whose dims are `names`, is a global array."""

        def run(params, *arrays):
            with enter(self.region()) as region:
                laid = (
                    enter_order(region, x, tuple(n.split())) for x, (_, n) in zip(arrays, inputs, strict=True)
                )
                return leave_order(
                    region, getattr(bind(self.model, params), method)(*laid), tuple(names.split())
                )

        arrays = [x for x, _ in inputs]
        if self.split.mesh is None or not isinstance(self.split.partitioner, Manual):
            return run(params, *arrays)
        spec = lambda words: self.split.layouts.activation(tuple(words.split())).spec()
        return self._manual(run, (self._rest_specs(), *(spec(n) for _, n in inputs)), spec(names))(
            params, *arrays
        )


__all__ = ["Split", "State", "TrainStep"]
