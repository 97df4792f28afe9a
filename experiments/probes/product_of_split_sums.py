"""A product whose summed dims are split, under XLA's partitioner, with a result that lies otherwise than its operands.

Reported: found here with jaxlib 0.10.2 and 0.12.0 on CPU, with Shardy and with GSPMD; about 1 in 200 random layouts of a
          two-operand einsum on a mesh of 2 x 2 x 2
Unsafe:   jnp.einsum under jax.jit with sharding constraints: rows of the result are exchanged, or partial sums added twice.
          No error, no warning.
Do:       Partitioner Manual(). With XLA's: bring the product to its operands' layout first, then to another one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from experiments.doctor.grid import P, mesh
from experiments.doctor.verdict import Verdict, compare

NEEDS = {"devices": 8}

CASES = (
    ("ik,jk->ij", (P(("b", "c"), "a"), P(None, "a")), P(("c", "b"), "a")),
    ("ik,ik->i", (P("b", ("a", "c")), P("b", ("a", "c"))), P(("a", "b"))),
    ("ijk,ijk->", (P(None, "b", "a"), P("a", "b", None)), P()),
)
"""einsum, layouts of its operands, layout of its result: one of each kind of fault that was found."""


def probe(devices: list[Any]) -> Verdict:
    """Products of small whole numbers, which are exact in any order of summing, against numpy."""
    grid = mesh(devices[:8], a=2, b=2, c=2)
    found, wanted = [], []
    for formula, lies, out in CASES:
        terms = formula.partition("->")[0].split(",")
        draw = np.random.default_rng(0)
        arrays = [draw.integers(-4, 5, (8,) * len(term)).astype(np.float32) for term in terms]
        given = [jax.device_put(x, NamedSharding(grid, spec)) for x, spec in zip(arrays, lies, strict=True)]
        product = jax.jit(lambda *x, f=formula: jnp.einsum(f, *x), out_shardings=NamedSharding(grid, out))
        found.append(np.asarray(product(*given)).ravel())
        wanted.append(np.einsum(formula, *arrays).ravel())
    return compare(np.concatenate(found), np.concatenate(wanted))
