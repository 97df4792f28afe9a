"""Functions traced once to programs that can be run often, and a stage's layers with what the forward pass leaves for the
backward.

A jaxpr tells of each residual what it depends on. What is one of the weights is no residual: it lies there anyway. What
depends on nothing but weights is made once a step. The rest is stashed for each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.core
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from jax.interpreters.partial_eval import dce_jaxpr

from sharding.errors import InputError
from sharding.pipeline.halves import Halves

Tree = Any

OUTSIDE = (
    "A layer uses a parameter or a batch entry that it is not given: a pipeline gives each stage its own layers, what goes "
    "through them and `beside`. Put the parameter into the block, or pass the entry to the layers as beside=(...)."
)


@dataclass(frozen=True)
class Program:
    """A traced function: call it with trees like those with which it was traced."""

    jaxpr: Jaxpr
    consts: Sequence[Any]
    out: Any
    """Structure of what it returns."""

    def __call__(self, *args: Tree) -> Tree:
        return jax.tree.unflatten(self.out, self.flat(jax.tree.leaves(args)))

    def flat(self, leaves: Sequence[Any]) -> list[Any]:
        """The same from leaves to leaves."""
        return jax.core.eval_jaxpr(self.jaxpr, self.consts, *leaves)

    def gives(self) -> Tree:
        """Types of what it returns."""
        return jax.tree.unflatten(self.out, _types(self.jaxpr.outvars))


def program(f: Callable[..., Tree], *args: Tree) -> Program:
    """`f` traced for arrays, or types, like these, without what its results do not need: not one collective in vain."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    return _giving(closed, closed.jaxpr.outvars, jax.tree.structure(shape))


def apart(f: Callable[..., Tree], unused: Tree, *args: Tree) -> tuple[Program, list[bool]]:
    """The program of `f(unused, *args)` as one of `args` alone, and which leaves of `unused` its results need after all."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(unused, *args)
    n, inputs = len(jax.tree.leaves(unused)), closed.jaxpr.invars
    jaxpr, used = dce_jaxpr(
        closed.jaxpr, [True] * len(closed.jaxpr.outvars), [i >= n for i in range(len(inputs))]
    )
    return Program(jaxpr, closed.consts, jax.tree.structure(shape)), list(used[:n])


def _giving(closed: ClosedJaxpr, outvars: Sequence[Any], out: Any) -> Program:
    """The program of some of a jaxpr's values."""
    jaxpr, _ = dce_jaxpr(_of(closed, outvars), [True] * len(outvars), instantiate=True)
    return Program(jaxpr, closed.consts, out)


def _of(closed: ClosedJaxpr, outvars: Sequence[Any]) -> Jaxpr:
    return closed.jaxpr.replace(
        outvars=list(outvars), debug_info=closed.jaxpr.debug_info.with_unknown_names()
    )


@dataclass(frozen=True)
class Passes:
    """A stage's layers: the pass forward, and the pass backward in one task or two, from what the first has left.

    `stashed` is in two lists: what only the gradients of the inputs need, and what those of the weights need. A backward pass
    in one task leaves the second empty.
    """

    forward: Program
    """(weights, carry, beside) -> (carry, stashed)."""
    fixed: Program
    """(weights, carry, beside) -> residuals that are the same whatever the micro-batch."""
    backward: Program
    """(weights, fixed, stashed, beside, cotangents of the carry) -> (cotangents of the carry, gradients of the weights, or
    what the second task needs of the first)."""
    weights: Program | None
    """(weights, fixed, stashed[1], beside, what the first task leaves) -> gradients of the weights; None: backward gives
    them."""


def passes(run: Callable[..., Tree], splits: bool, weights: Tree, carry: Tree, beside: Tree) -> Passes:
    """`run(weights, carry, beside) -> carry` taken apart, for arrays or types like these. splits: the backward in two
    tasks.
    """
    kept: dict[str, Any] = {}

    def forward(weights: Tree, carry: Tree, beside: Tree) -> Tree:
        made, back = jax.vjp(lambda w, c: run(w, c, beside), weights, carry)
        leaves, kept["back"] = jax.tree.flatten(back)
        return made, leaves

    closed, (made, _) = _alone(forward, weights, carry, beside)
    many = len(jax.tree.leaves(made))
    results, residuals = closed.jaxpr.outvars[:many], closed.jaxpr.outvars[many:]
    of_weights, _, of_beside = _grouped(closed.jaxpr.invars, weights, carry, beside)
    places = {v: _place(closed, v, of_weights, of_beside) for v in residuals if isinstance(v, Var)}
    fixed, stashed = ([v for v, place in places.items() if place == p] for p in ("fixed", "stashed"))

    def backward(weights: Tree, fixed_: Tree, stashed_: Tree, beside: Tree, cotangents: Tree) -> Tree:
        held = dict(zip([*of_weights, *of_beside], jax.tree.leaves((weights, beside)), strict=True))
        held |= dict(zip([*fixed, *stashed], [*fixed_, *stashed_], strict=True))
        leaves = [v.val if isinstance(v, Literal) else held[v] for v in residuals]
        d_weights, d_carry = jax.tree.unflatten(kept["back"], leaves)(cotangents)
        return d_carry, d_weights

    given = weights, _types(fixed), _types(stashed), beside, made
    whole = program(backward, *given)
    second, late = (_Second(whole, given), set()) if splits else (None, set())
    if second is not None:
        late = {v for v, needed in zip(stashed, second.needs_stashed, strict=True) if needed}
    order = [v for v in stashed if v not in late], [v for v in stashed if v in late]
    leaves = lambda early, later: [
        dict(zip([*order[0], *order[1]], [*early, *later], strict=True))[v] for v in stashed
    ]
    ordered = tuple(map(_types, order))
    structure = jax.tree.structure((made, tuple(map(list, order))))
    first = _giving(closed, [*results, *order[0], *order[1]], structure)
    once = _giving(closed, fixed, jax.tree.structure(list(fixed)))
    if second is None:
        back = program(
            lambda w, f, s, b, c: whole(w, f, leaves(*s), b, c), weights, _types(fixed), ordered, beside, made
        )
        return Passes(first, once, back, None)
    back = program(
        lambda w, f, s, b, c: second.first(w, f, leaves(*s), b, c),
        weights,
        _types(fixed),
        ordered,
        beside,
        made,
    )
    handed = back.gives()[1]
    missing = [None] * len(order[0])
    rest = program(
        lambda w, f, s, b, h: second.second(w, f, leaves(missing, s), b, h),
        *(weights, _types(fixed), ordered[1], beside, handed),
    )
    return Passes(first, once, back, rest)


def _alone(forward: Callable[..., Tree], *given: Tree) -> tuple[ClosedJaxpr, Tree]:
    """`forward` traced. Raises InputError where it takes values from outside, whose gradients would be lost."""
    try:
        closed, shape = jax.make_jaxpr(forward, return_shape=True)(*given)
    except jax.errors.UnexpectedTracerError as error:
        raise InputError(OUTSIDE) from error
    if any(isinstance(c, jax.core.Tracer) for c in closed.consts):
        raise InputError(OUTSIDE)
    return closed, shape


class _Second:
    """The backward pass in two tasks."""

    def __init__(self, whole: Program, given: tuple[Tree, ...]):
        d_carry, d_weights = whole.gives()
        self.outs = jax.tree.structure(d_carry), jax.tree.structure(d_weights)
        wanted = [True] * self.outs[0].num_leaves + [False] * self.outs[1].num_leaves
        groups = _grouped(whole.jaxpr.invars, *given)
        self.halves = Halves(whole.jaxpr, whole.consts, wanted, frozenset(groups[-1]))
        self.needs_stashed = [v in self.halves.reads_second for v in groups[2]]
        self.none = [None] * len(groups[-1])

    def first(self, *given: Tree) -> Tree:
        """(cotangents of the carry, what the second task needs)."""
        made, handed = self.halves.first(jax.tree.leaves(given))
        return jax.tree.unflatten(self.outs[0], made), handed

    def second(self, weights: Tree, fixed: Tree, stashed: list[Any], beside: Tree, handed: Tree) -> Tree:
        """Gradients of the weights."""
        leaves = [*jax.tree.leaves((weights, fixed)), *stashed, *jax.tree.leaves(beside), *self.none]
        return jax.tree.unflatten(self.outs[1], self.halves.second(leaves, handed))


def _place(closed: ClosedJaxpr, v: Var, weights: Sequence[Var], beside: Sequence[Var]) -> str:
    if v in weights or v in beside:
        return "there"
    _, used = dce_jaxpr(_of(closed, [v]), [True])
    depends = [i for i, needed in zip(closed.jaxpr.invars, used, strict=True) if needed]
    return "fixed" if all(i in weights for i in depends) else "stashed"


def _types(variables: Iterable[Any]) -> list[Any]:
    return [v.aval for v in variables]


def _grouped(variables: Sequence[Var], *trees: Tree) -> list[list[Var]]:
    """The variables of each tree's leaves."""
    rest = iter(variables)
    return [[next(rest) for _ in jax.tree.leaves(tree)] for tree in trees]
