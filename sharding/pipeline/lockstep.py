"""The ticks of a pipeline on one device: every device does the same in each, on what it has to do or, masked, on whatever
lies there.

What a masked task makes counts nowhere: its gradients are left out by a choice, not by a product, so that they may be of any
value; its results go to slots that nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sharding.pipeline.parts import AXIS, Params, Shares, Tree
from sharding.pipeline.tables import Slot, Tables
from sharding.relayout import vary, varying, varying_of
from sharding.scope import in_task

if TYPE_CHECKING:
    from sharding.pipeline.execute import Tasks

State = dict[str, Any]
Rows = Mapping[str, Array]


class Lockstep:
    """One step's ticks."""

    def __init__(
        self,
        table: Tables,
        tasks: Tasks,
        shares: Shares,
        own: Params,
        outer: Params,
        batch: Mapping[str, Array],
    ):
        self.table, self.grid, self.tasks, self.shares = table, table.grid, tasks, shares
        self.own, self.outer, self.batch = own, outer, batch
        each = [self._fixed({p: w[c] for p, w in own.items()}) for c in range(self.grid.chunks)]
        self.fixed = [jnp.stack(xs) for xs in zip(*each, strict=True)]
        self.structure = jax.tree.structure(tasks.carry)

    def run(self) -> tuple[dict[str, Array], Params, Params]:
        """(sums, gradients of this stage's layers [chunk, layer, ...], those of all other parameters)."""
        state = self._start()
        for block in self.table.blocks:
            end = block.first + block.repeats * block.ticks
            turns = {
                k: row[block.first : end].reshape(block.repeats, block.ticks, -1)
                for k, row in self.table.rows.items()
            }
            runs = _Runs(self, block.runs, turns)
            if block.repeats == 1:
                state = runs(state, {name: jnp.asarray(row[0]) for name, row in turns.items()})
            else:
                rows = {name: jnp.asarray(row) for name, row in turns.items()}
                state = lax.scan(lambda s, r, runs=runs: (runs(s, r), None), state, rows)[0]
        return state["sums"], state["own"], state["outer"]

    def _start(self) -> State:
        """Empty buffers and sums that are zero, of the types that the tasks make."""
        layers, sizes, stage = self.tasks.layers, self.table.sizes, frozenset((AXIS,))

        def zeros(a: Any, *more: int, over: frozenset[str] = frozenset()) -> Array:
            return vary(jnp.zeros((*more, *a.shape), a.dtype), varying_of(a) | over)

        pool = lambda name, types: [zeros(a, sizes[name], over=stage) for a in jax.tree.leaves(types)]
        stashed, left = layers.forward.gives()[1], layers.backward.gives()[1]
        d_own = left if layers.weights is None else layers.weights.gives()
        sums, d_outer, _ = self.tasks.loss.gives()
        entered = self.tasks.entered.gives()
        return {
            "own": {p: zeros(a, self.grid.chunks, over=stage) for p, a in d_own.items()},
            "outer": {p: zeros(a, over=varying_of(entered[p])) for p, a in d_outer.items()},
            "sums": jax.tree.map(zeros, sums),
            "residuals": pool("residuals", stashed[0]),
            "kept": pool("kept", stashed[1]) if layers.weights else [],
            "cotangents": pool("cotangents", left) if layers.weights else [],
            "inbox": pool("inbox", self.tasks.carry),
            "outbox": pool("outbox", self.tasks.carry),
            "last": pool("last", self.tasks.carry),
        }

    def _fixed(self, weights: Params) -> list[Array]:
        # They do not depend on a micro-batch, so that any will do.
        fixed = self.tasks.layers.fixed
        avals: list[Any] = [v.aval for v in fixed.jaxpr.invars[len(jax.tree.leaves(weights)) :]]
        rest = [vary(jnp.zeros(a.shape, a.dtype), varying_of(a)) for a in avals]
        return fixed.flat([*jax.tree.leaves(weights), *rest])


class _Runs:
    """Runs of ticks one after another, each a loop. `turns`: their tables, [repeat, tick, stage], before they are traced."""

    def __init__(
        self, whole: Lockstep, runs: Sequence[tuple[Sequence[Slot], int]], turns: Mapping[str, np.ndarray]
    ):
        self.whole, self.runs, self.turns = whole, runs, turns

    def __call__(self, state: State, rows: Rows) -> State:
        at = 0
        for slots, ticks in self.runs:
            now = slice(at, at + ticks)
            reached = {k: x[:, now].any(axis=(0, 1)) for k, x in self.turns.items() if ".arrives" in k}
            tick = lambda s, row, slots=slots, reached=reached: (
                _Tick(self.whole, frozenset(slots), s, row, reached).done(),
                None,
            )
            state = lax.scan(tick, state, {name: row[now] for name, row in rows.items()})[0]
            at += ticks
        return state


class _Tick:
    """What a device does in one tick. `reached`: for each kind of message the stages that get one in the ticks of this run."""

    def __init__(
        self,
        whole: Lockstep,
        slots: frozenset[str],
        state: State,
        rows: Rows,
        reached: Mapping[str, np.ndarray],
    ):
        self.whole, self.tasks, self.slots, self.rows = whole, whole.tasks, slots, rows
        self.reached = reached
        self.state, self.here = dict(state), lax.axis_index(AXIS)

    def done(self) -> State:
        """The state after it."""
        made = self._do("F", self._forward)
        d_last = self._do("loss", self._loss)
        d_carry = self._do("B", lambda: self._backward(d_last))
        self._do("W", self._weights)
        self._do("entered", lambda: self._entered(d_carry))
        self._do("F", lambda: self._send("F", "inbox", made))
        self._do("B", lambda: self._send("B", "outbox", d_carry))
        return self.state

    def _do(self, slot: Slot, work: Callable[[], Tree]) -> Tree:
        if slot not in self.slots:
            return None
        with in_task(slot):
            return work()

    def _forward(self) -> Tree:
        carry = self._taken("inbox")
        if "enter" in self.slots:
            with in_task("enter"):
                entered = self.tasks.enter(self.whole.outer, self._micro(self.rows["enter.microbatch"][0]))
            carry = _choose(self._mine("F.first"), jax.tree.leaves(entered), carry)
        chunk = self._mine("F.chunk")
        weights, given = self._chunk(chunk), self._given("F", chunk)
        made, stashed = self.tasks.layers.forward(weights, self._tree(carry), given)
        self._put("residuals", stashed[0])
        if self.state["kept"]:
            self._put("kept", stashed[1])
        self._put("last", jax.tree.leaves(made))
        return made

    def _loss(self) -> Tree:
        """The loss of a micro-batch, by all stages; the cotangents of what the last part of the layers made."""
        whole = self._shared(self.here == self.whole.grid.path[-1].stage, self._taken("last"))
        micro = self._micro(self.rows["loss.microbatch"][0])
        sums, d_outer, d_carry = self.tasks.loss(self.whole.outer, whole, micro)
        self.state["sums"] = jax.tree.map(jnp.add, self.state["sums"], sums)
        self._add_outer(d_outer)
        return d_carry

    def _backward(self, d_last: Tree) -> Tree:
        cotangents = self._taken("outbox")
        if d_last is not None:
            cotangents = _choose(self._mine("B.last"), jax.tree.leaves(d_last), cotangents)
        chunk, layers = self._mine("B.chunk"), self.tasks.layers
        stashed = (self._taken("residuals"), [])
        if layers.weights is not None:
            stashed = (stashed[0], self._taken("kept", "kept.early"))
        given = self._chunk(chunk), self._fixed(chunk), stashed, self._given("B", chunk)
        d_carry, left = layers.backward(*given, self._tree(cotangents))
        if layers.weights is None:
            self._add_own("B", chunk, left)
        else:
            self._put("cotangents", jax.tree.leaves(left))
        return d_carry

    def _weights(self) -> None:
        chunk, program = self._mine("W.chunk"), self.tasks.layers.weights
        assert program is not None
        handed = jax.tree.unflatten(
            jax.tree.structure(self.tasks.layers.backward.gives()[1]), self._taken("cotangents")
        )
        given = self._chunk(chunk), self._fixed(chunk), self._taken("kept"), self._given("W", chunk), handed
        self._add_own("W", chunk, program(*given))

    def _entered(self, d_carry: Tree) -> None:
        # The stage with the first part, and that only when it is this part that it has gone back through.
        mine = (self.here == self.whole.grid.path[0].stage) & (self._mine("B.first") > 0)
        whole = self._shared(mine, jax.tree.leaves(d_carry))
        micro = self._micro(self.rows["entered.microbatch"][0])
        self._add_outer(self.tasks.entered(self.whole.outer, micro, whole))

    def _send(self, kind: str, box: str, made: Tree) -> None:
        """What was made in this tick, to the stage that needs it next."""
        n, tables = self.whole.grid.stages, self.whole.table
        for shift in tables.shifts[kind]:
            arrives = f"{box}.arrives{shift}"
            pairs = [((s - shift) % n, s) for s in range(n) if self.reached[arrives][s]]
            if not pairs:
                continue
            slot = self._mine(arrives)
            at = jnp.maximum(slot - 1, 0)
            for i, (pool, x) in enumerate(zip(self.state[box], jax.tree.leaves(made), strict=True)):
                got = x if shift == 0 else lax.ppermute(x, AXIS, pairs)
                kept = vary(jnp.where(slot > 0, got, pool[at]), varying(pool))
                self.state[box] = [*self.state[box]]
                self.state[box][i] = lax.dynamic_update_index_in_dim(pool, kept, at, 0)

    def _shared(self, mine: Array, leaves: list[Array]) -> Tree:
        """What one stage has, on all of them."""
        return self._tree([lax.psum(jnp.where(mine, x, jnp.zeros_like(x)), AXIS) for x in leaves])

    def _add_own(self, kind: str, chunk: Array, grads: Params) -> None:
        on = self._mine(f"{kind}.on")
        self.state["own"] = {p: _add_at(total, chunk, on, grads[p]) for p, total in self.state["own"].items()}

    def _add_outer(self, grads: Params) -> None:
        self.state["outer"] = {
            p: total + vary(grads[p], varying(total)) for p, total in self.state["outer"].items()
        }

    def _mine(self, name: str) -> Array:
        """This stage's entry of a table."""
        return self.rows[name][self.here]

    def _micro(self, at: Array) -> dict[str, Array]:
        return {k: x[at] for k, x in self.whole.batch.items()}

    def _given(self, kind: str, chunk: Array) -> Tree:
        beside = self.tasks.beside(self._micro(self._mine(f"{kind}.microbatch")))
        return self.whole.shares.fills(chunk), beside

    def _chunk(self, chunk: Array) -> Params:
        return {p: _at(w, chunk) for p, w in self.whole.own.items()}

    def _fixed(self, chunk: Array) -> list[Array]:
        return [_at(x, chunk) for x in self.whole.fixed]

    def _taken(self, name: str, at: str = "") -> list[Array]:
        slot = self._mine(at or f"{name}.read")
        return [_at(x, slot) for x in self.state[name]]

    def _put(self, name: str, arrays: list[Array]) -> None:
        slot = self._mine(f"{name}.write")
        put = lambda pool, x: lax.dynamic_update_index_in_dim(pool, vary(x, varying(pool)), slot, 0)
        self.state[name] = [put(pool, x) for pool, x in zip(self.state[name], arrays, strict=True)]

    def _tree(self, leaves: list[Array]) -> Tree:
        return jax.tree.unflatten(self.whole.structure, leaves)


def _at(x: Array, index: Array) -> Array:
    return x[0] if x.shape[0] == 1 else lax.dynamic_index_in_dim(x, index, keepdims=False)


def _choose(on: Array, x: list[Array], y: list[Array]) -> list[Array]:
    return [jnp.where(on > 0, a, b) for a, b in zip(x, y, strict=True)]


def _add_at(total: Array, chunk: Array, on: Array, x: Array) -> Array:
    """`total` with `x` added to its entry `chunk`, where `on`."""
    added = vary(jnp.where(on > 0, x, jnp.zeros_like(x)), varying(total))
    if total.shape[0] == 1:
        return total + added[None]
    return lax.dynamic_update_index_in_dim(total, _at(total, chunk) + added, chunk, 0)
