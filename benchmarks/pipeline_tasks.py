"""A pipeline's tasks one by one, as the executor makes them, each in a loop of its own on the same devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from sharding.pipeline import execute
from sharding.pipeline.lockstep import Lockstep, _Tick
from sharding.pipeline.traced import Program, program
from sharding.region import enter
from sharding.relayout import vary, varying, varying_of
from sharding.step import TrainStep

Run = Callable[[Lockstep], Any]
Body = Callable[[Array, Any], Any]
NEARLY_NONE = 1e-20
"""A turn of a loop is given its input plus so many times what the turn before made: nothing is taken out of the loop."""


class _Stopped(Exception):
    def __init__(self, made: Any):
        super().__init__()
        self.made = made


@contextmanager
def _instead(run: Run) -> Iterator[None]:
    """Steps that are traced in here do this with their executor in place of its ticks."""
    own = execute.Lockstep

    class Instead(own):
        def run(self) -> Any:
            return run(self)

    execute.Lockstep = Instead  # type: ignore[misc, assignment]  (the one way to time its parts)
    try:
        yield
    finally:
        execute.Lockstep = own  # type: ignore[misc]  (as it was)


def executor(step: TrainStep, run: Run, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    """What `run` makes of the step's executor, in the step's region, as a trace of arrays or types like these."""

    def stop(whole: Lockstep) -> Any:
        raise _Stopped(run(whole))

    def inside(params: dict[str, Array], batch: dict[str, Array]) -> Any:
        with enter(step.region()), _instead(stop):
            try:
                step._sums_and_gradients(step.contributed(params), batch)
            except _Stopped as stopped:
                return stopped.made
        raise AssertionError("the step has no pipeline")

    specs = (step._rest_specs(), step._batch_specs(batch))
    return step._manual(inside, specs, PartitionSpec())(params, batch)


def without_ticks(step: TrainStep) -> Any:
    """The step with a pipeline of no ticks, jitted: weights brought, zero gradients taken back, the update."""

    def update(state: Any, batch: Any) -> Any:
        with _instead(lambda whole: tuple(whole._start()[name] for name in ("sums", "own", "outer"))):
            return step.update(state, batch)

    return jax.jit(update, donate_argnums=0, out_shardings=(step.state_shardings(), None))


def loop(step: TrainStep, name: str) -> Any:
    """(params, batch, turns) -> a number that needs every result of so many turns of `BODIES[name]`; jitted."""

    def timed(params: Any, batch: Any, turns: Any) -> Array:
        def run(whole: Lockstep) -> Array:
            body, state = BODIES[name](whole)
            end = jax.tree.leaves(_turned(body, state, turns))
            parts = [vary(jnp.sum(x.astype(jnp.float32)), frozenset(("stage",))) for x in end]
            total = jnp.sum(jnp.stack(parts))
            return lax.psum(total, tuple(sorted(varying(total))))

        return executor(step, run, params, batch)

    return jax.jit(timed)


def _like(tree: Any, value: float = 0.01) -> Any:
    """Arrays of these types, of small numbers."""
    return jax.tree.map(lambda a: vary(jnp.full(a.shape, value, a.dtype), varying_of(a)), tree)


def _slots(whole: Lockstep, name: str, types: Any) -> list[Array]:
    """Empty slots, as many as the schedule keeps: what a task reads was written some ticks ago and comes from memory."""
    n = _many(whole, name)
    return [vary(jnp.zeros((n, *a.shape), a.dtype), varying_of(a)) for a in jax.tree.leaves(types)]


def _many(whole: Lockstep, name: str) -> int:
    """Slots of a buffer in a loop: the schedule's own, up to as many as no cache holds."""
    return min(8, max(2, whole.table.sizes.get(name, 0)))


def _turned(body: Body, state: Any, turns: Any) -> Any:
    """The state after so many turns."""
    made = jax.eval_shape(body, jnp.int32(0), state)
    state = jax.tree.map(lambda x, a: vary(x, varying_of(a)), state, made)
    turn = lambda i, s: jax.tree.map(lambda x, y: vary(x, varying(y)), body(i, s), state)
    return lax.fori_loop(0, turns, turn, state)


def _read(pool: list[Array], turn: Array) -> list[Array]:
    return [lax.dynamic_index_in_dim(x, turn % x.shape[0], keepdims=False) for x in pool]


def _write(pool: list[Array], arrays: list[Array], turn: Array) -> list[Array]:
    return [
        lax.dynamic_update_index_in_dim(x, new, turn % x.shape[0], 0)
        for x, new in zip(pool, arrays, strict=True)
    ]


def _again(start: Any, made: Any) -> Any:
    return jax.tree.map(lambda a, b: a + NEARLY_NONE * b, start, made)


def _parts(whole: Lockstep) -> tuple[Any, ...]:
    """The weights of one chunk, the residuals that are always the same, what every layer is given, what enters."""
    weights, zero = {p: w[0] for p, w in whole.own.items()}, vary(jnp.int32(0), frozenset(("stage",)))
    micro = {k: x[0] for k, x in whole.batch.items()}
    beside = whole.tasks.beside({k: vary(x, frozenset(("stage",))) for k, x in micro.items()})
    return weights, [x[0] for x in whole.fixed], (whole.shares.fills(zero), beside), micro


def _forward(whole: Lockstep) -> tuple[Body, Any]:
    """A forward pass, whose stash goes to the next slot."""
    weights, _, given, _ = _parts(whole)
    start, types = _like(whole.tasks.carry), whole.tasks.layers.forward.gives()[1]

    def body(i: Array, s: Any) -> Any:
        made, left = whole.tasks.layers.forward(weights, _again(start, s[0]), given)
        return made, [_write(pool, x, i) for pool, x in zip(s[1], left, strict=True)]

    return body, (
        start,
        [_slots(whole, name, x) for name, x in zip(("residuals", "kept"), types, strict=True)],
    )


def _stashed(whole: Lockstep) -> list[list[Array]]:
    """Full slots."""
    return _turned(*_forward(whole), max(_many(whole, name) for name in ("residuals", "kept")))[1]


def _backward(whole: Lockstep) -> tuple[Body, Any]:
    """A backward pass from the next slot: its gradients are added up, or what W needs of it goes to the next slot."""
    weights, fixed, given, _ = _parts(whole)
    early, late = _stashed(whole)
    start, layers = _like(whole.tasks.carry), whole.tasks.layers
    splits, types = layers.weights is not None, layers.backward.gives()[1]

    def body(i: Array, s: Any) -> Any:
        stashed = (_read(early, i), _read(late, i))
        made, left = layers.backward(weights, fixed, stashed, given, _again(start, s[0]))
        kept = _write(s[1], jax.tree.leaves(left), i) if splits else jax.tree.map(jnp.add, s[1], left)
        return made, kept

    return body, (start, _slots(whole, "cotangents", types) if splits else _like(types))


def _weights(whole: Lockstep) -> tuple[Body, Any]:
    """Gradients of the weights from what F and B have left, added up."""
    weights, fixed, given, _ = _parts(whole)
    layers, late = whole.tasks.layers, _stashed(whole)[1]
    handed = _turned(*_backward(whole), _many(whole, "cotangents"))[1]
    structure = jax.tree.structure(layers.backward.gives()[1])

    def body(i: Array, s: Any) -> Any:
        left = jax.tree.unflatten(structure, _read(handed, i))
        return jax.tree.map(jnp.add, s, layers.weights(weights, fixed, _read(late, i), given, left))  # type: ignore[misc]  (a W)

    return body, _like(layers.weights.gives())  # type: ignore[union-attr]  (a grid with W has it)


def _loss(whole: Lockstep) -> tuple[Body, Any]:
    *_, micro = _parts(whole)
    start, mine = _like(whole.tasks.carry), lax.axis_index("stage") == whole.grid.path[-1].stage

    def body(i: Array, s: Any) -> Any:
        of = _again(start, s[2])
        shared = jax.tree.map(lambda x: lax.psum(jnp.where(mine, x, jnp.zeros_like(x)), "stage"), of)
        sums, d_outer, d_carry = whole.tasks.loss(whole.outer, _typed(shared, whole.tasks.whole), micro)
        return (
            jax.tree.map(jnp.add, s[0], sums),
            jax.tree.map(jnp.add, s[1], d_outer),
            jax.tree.map(lambda x, a: vary(x, varying(a)), d_carry, start),
        )

    sums, d_outer, _ = whole.tasks.loss.gives()
    return body, (_like(sums), _like(d_outer), start)


def _enter(whole: Lockstep) -> tuple[Body, Any]:
    """Both of its slots: what comes before the layers, and its backward."""
    start, mine = _like(whole.tasks.carry), lax.axis_index("stage") == whole.grid.path[0].stage

    def body(i: Array, s: Any) -> Any:
        micro = {
            k: lax.dynamic_index_in_dim(x, i % x.shape[0], keepdims=False) for k, x in whole.batch.items()
        }
        shared = jax.tree.map(
            lambda x: lax.psum(jnp.where(mine, x, jnp.zeros_like(x)), "stage"), _again(start, s[0])
        )
        made = whole.tasks.enter(whole.outer, micro)
        grads = whole.tasks.entered(whole.outer, micro, _typed(shared, whole.tasks.whole))
        return jax.tree.map(lambda x, a: vary(x, varying(a)), made, start), jax.tree.map(jnp.add, s[1], grads)

    return body, (start, _like(whole.tasks.entered.gives()))


def _typed(tree: Any, types: Any) -> Any:
    return jax.tree.map(lambda x, a: vary(x, varying_of(a)), tree, types)


def _messages(whole: Lockstep) -> tuple[Body, Any]:
    """What goes from stage to stage in one tick, and nothing else."""
    n, start = whole.grid.stages, _like(whole.tasks.carry)

    def sent(kind: str, x: Array) -> Array:
        for shift in whole.table.shifts[kind]:
            if shift:
                x = lax.ppermute(x, "stage", [((s - shift) % n, s) for s in range(n)])
        return x

    return lambda i, s: [jax.tree.map(lambda x, k=k: sent(k, x), y) for k, y in zip("FB", s, strict=True)], [
        start,
        start,
    ]


def _nothing(whole: Lockstep) -> tuple[Body, Any]:
    """Full ticks with their buffers, messages, masks and sums, in which every task only writes down one number."""

    def empty(of: Program) -> Program:
        def made(*leaves: Array) -> list[Array]:
            number = next(x for x in reversed(leaves) if jnp.issubdtype(x.dtype, jnp.floating)).ravel()[0]
            written = lambda a: jnp.full(a.shape, number.astype(a.dtype))
            return [vary(written(a), varying_of(a) - varying(number)) for a in jax.tree.leaves(of.gives())]

        return replace(program(made, *[v.aval for v in of.jaxpr.invars]), out=of.out)

    layers = whole.tasks.layers
    weights = None if layers.weights is None else empty(layers.weights)
    stubs = replace(layers, forward=empty(layers.forward), backward=empty(layers.backward), weights=weights)
    whole.tasks = replace(whole.tasks, layers=stubs)
    rows = {name: jnp.asarray(row) for name, row in whole.table.rows.items()}
    slots = frozenset(whole.grid.slots[whole.grid.ticks // 2])
    reached = {k: np.asarray(row.any(axis=0)) for k, row in whole.table.rows.items() if ".arrives" in k}

    def body(i: Array, s: Any) -> Any:
        row = {name: x[i % whole.grid.ticks] for name, x in rows.items()}
        return _Tick(whole, slots, s, row, reached).done()

    return body, whole._start()


BODIES: Mapping[str, Callable[[Lockstep], tuple[Body, Any]]] = {
    "F": _forward,
    "B": _backward,
    "W": _weights,
    "loss": _loss,
    "enter": _enter,
    "messages": _messages,
    "empty tick": _nothing,
}
"""What can be timed by itself."""


def counted(step: TrainStep, rows: int) -> dict[str, int]:
    """Buffer -> bytes on a device, as the grid's tables give its slots and the tasks their types."""
    found: dict[str, int] = {}

    def look(whole: Lockstep) -> Array:
        start = whole._start()
        for name in ("residuals", "kept", "cotangents", "inbox", "outbox", "last"):
            found[name] = sum(math.prod(x.shape) * x.dtype.itemsize for x in start[name])
        return jnp.zeros(())

    params = {p: s.abstract() for p, s in step.tree.items()}
    jax.eval_shape(lambda p, b: executor(step, look, p, b), params, step.abstract_batch(rows))
    return found
