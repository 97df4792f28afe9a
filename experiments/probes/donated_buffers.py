"""Donated arguments that change their layout: the result is written over what is still to be read.

Reported: jax-ml/jax#20088 (jax 0.4.2x, pretend devices on x86 CPUs)
Unsafe:   a train step that donates its state and returns it, or something of its size, laid out otherwise.
Do:       Give in_shardings and out_shardings that are equal for what is donated, or do not donate.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
from jax import lax

from experiments.doctor.grid import at, integers, mesh
from experiments.doctor.verdict import Verdict, compare, worst

NEEDS = {"devices": 2}

STEPS = 5


def probe(devices: list[Any]) -> Verdict:
    """A state donated five times, beside a result of its size in another layout."""
    n = len(devices)
    grid = mesh(devices, x=n)
    x = integers((8 * n, 8 * n))
    rows, columns, whole = at(grid, "x"), at(grid, None, "x"), at(grid)
    found = []
    for here, there in ((whole, rows), (rows, whole), (rows, rows), (columns, rows)):

        def step(state: Any, x: Any, there: Any = there) -> Any:
            return lax.with_sharding_constraint(state + x, there), state * 2

        run = jax.jit(step, donate_argnums=0, in_shardings=(here, whole), out_shardings=(there, here))
        state, seen = jax.device_put(x, here, may_alias=False), None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jax tells which donations it could not use
            for _ in range(STEPS):
                seen, state = run(state, x)
        name = f"{here.spec} beside {there.spec}"
        found.append(compare(np.asarray(state), x * 2**STEPS, what=f"state {name}"))
        found.append(compare(np.asarray(seen), x * (2 ** (STEPS - 1) + 1), what=f"result {name}"))
    return worst(found)
