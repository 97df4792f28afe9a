"""Random named contractions for tests: their layouts, what numpy makes of them, and what plain jax does."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from sharding.axes import MeshShape
from sharding.contraction import parse
from sharding.layout import Layout
from sharding.ops import einsum
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules
from tests.support import Through, departure, placements

MESH = MeshShape(data=2, fsdp=2, tensor=2)
AXES = ("data", "fsdp", "tensor")
NAMES = ("batch", "length", "embed", "mlp")
CASE = tuple[str, dict[str, Any], Rules]


@st.composite
def cases(draw: Any, axes: tuple[str, ...] = AXES) -> CASE:
    """A spec of one or two operands, their arrays (the last may be a parameter) and rules that lay all of them out."""
    terms = draw(
        st.lists(
            st.permutations(NAMES).flatmap(lambda p: st.integers(1, 3).map(lambda n: p[:n])),
            min_size=1,
            max_size=2,
        )
    )
    every = list(dict.fromkeys(n for t in terms for n in t))
    result = draw(st.permutations(every))[: draw(st.integers(0, len(every)))]
    sizes = {n: draw(st.sampled_from([8, 16])) for n in every}
    words = [" ".join(t) for t in terms]
    param = words[-1] if len(words) > 1 and draw(st.booleans()) else None
    random = np.random.default_rng(draw(st.integers(0, 99)))
    arrays = {f"x{i}": random.normal(size=[sizes[n] for n in t]) for i, t in enumerate(terms)}
    rules = draw(placements([*words[: 1 if param else 2], " ".join(result)], [param] if param else [], axes))
    return f"{', '.join(words)} -> {' '.join(result)}", {"arrays": arrays, "param": param is not None}, rules


def through(case: CASE, partitioner: Partitioner = Manual()) -> Through:  # noqa: B008
    spec, drawn, rules = case
    terms, result = parse(spec)
    named = {k: (" ".join(t), a) for t, (k, a) in zip(terms, drawn["arrays"].items(), strict=True)}
    params = {list(named)[-1]: named.pop(list(named)[-1])} if drawn["param"] else {}

    def call(p, x):
        return einsum(spec, *(p[k] if k in p else x[k] for k in drawn["arrays"]))

    return Through(call, params, named, " ".join(result), rules, MESH, partitioner)


def expected(case: CASE) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Value and gradients by numpy alone, each with how far two ways of summing it may lie apart."""
    spec, drawn, _ = case
    terms, result = parse(spec)
    letter: dict[str, str] = dict(zip(NAMES, "abcd", strict=True))
    short, out = ["".join(letter[n] for n in t) for t in terms], "".join(letter[n] for n in result)
    arrays = list(drawn["arrays"].values())
    made = {"": _with_bound(list(zip(short, arrays, strict=True)), out)}
    weigh = np.random.default_rng(1).normal(size=made[""][0].shape)
    for i, (key, array) in enumerate(drawn["arrays"].items()):
        others = [(t, a) for j, (t, a) in enumerate(zip(short, arrays, strict=True)) if j != i]
        missing = [n for n in short[i] if n not in out and not any(n in t for t, _ in others)]
        ones = [(n, np.ones(array.shape[short[i].index(n)])) for n in missing]
        made[key] = _with_bound([(out, weigh), *others, *ones], short[i])
    return made


def _with_bound(operands: list[tuple[str, np.ndarray]], out: str) -> tuple[np.ndarray, np.ndarray]:
    """An einsum in float64 and, for each element, the largest difference between two orders of its n additions.

    Either is within n u / (1 - n u) of the sum of the absolute products, u = 2^-53 (Higham 2002, section 3.1). A bound
    relative to the result would be too tight where the products cancel, as they do in a sum down to a scalar.
    """
    formula = f"{','.join(t for t, _ in operands)}->{out}"
    sizes = {n: size for t, a in operands for n, size in zip(t, a.shape, strict=True)}
    n = math.prod(size for name, size in sizes.items() if name not in out)
    unit = n * 2.0**-53
    return np.einsum(formula, *(a for _, a in operands)), 2 * unit / (1 - unit) * np.einsum(
        formula, *(abs(a) for _, a in operands)
    )


def in_plain_jax(case: CASE) -> dict[str, np.ndarray]:
    """What `jnp.einsum` itself gives under `jax.jit` with the case's layouts: XLA's partitioner without this package."""
    spec, drawn, _ = case
    terms, result = parse(spec)
    made = through(case, Auto())
    letter: dict[str, str] = dict(zip(NAMES, "abcd", strict=True))
    formula = (
        f"{','.join(''.join(letter[n] for n in t) for t in terms)}->{''.join(letter[n] for n in result)}"
    )
    params, inputs = made.arguments()

    def laid(x: Any, layout: Layout) -> Any:
        assert made.mesh is not None
        return jax.lax.with_sharding_constraint(x, NamedSharding(made.mesh, layout.spec()))

    def whole(given: dict[str, Any]) -> Any:
        used = {k: laid(x, made.lies[k].compute) if k in made.lies else x for k, x in given.items()}
        product = jnp.einsum(formula, *(used[k] for k in drawn["arrays"]))
        return laid(product, made.layouts.activation(result))

    @jax.jit
    def both(given: dict[str, Any]) -> tuple[Any, Any]:
        out, pull = jax.vjp(whole, given)
        return out, pull(jnp.array(np.random.default_rng(1).normal(size=out.shape)))[0]

    out, gradients = jax.device_get(both({**params, **inputs}))
    return {"": out, **gradients}


def check(case: CASE, partitioner: Partitioner) -> None:
    """Assert that value ("") and gradients are numpy's."""
    with jax.enable_x64(True):
        found = through(case, partitioner).value_and_gradients()
    for key, (want, bound) in expected(case).items():
        assert _within(found[key], want, bound), (case[0], key or "value", departure(found[key], want))


def _within(a: np.ndarray, b: np.ndarray, bound: np.ndarray) -> bool:
    return a.shape == b.shape and bool((abs(a - b) <= bound).all())
