"""A convolution whose positions are split, under XLA's partitioner, on a mesh that has a second axis.

Reported: found here with jaxlib 0.10.2 and 0.12.0 on CPU: wrong kernel gradients where the second axis splits the examples or
          nothing, wrong values and input gradients where it splits channels; right where the mesh has one axis alone
Unsafe:   lax.conv_general_dilated under jax.jit with height or width of its input split. No error, no warning.
Do:       sharding.spatial.convolution, which sends the halo itself under both partitioners; or leave positions whole.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from experiments.doctor.grid import P, mesh
from experiments.doctor.verdict import Verdict, compare

NEEDS = {"devices": 4, "quick": False}

LAYOUTS = (
    (P("b", "a"), P(), P("b", "a")),
    (P(None, "a", None, "b"), P(None, None, "b"), P(None, "a")),
    (P(None, "a"), P(None, None, None, "b"), P(None, "a", None, "b")),
)
"""Of images, kernel and result: the second axis splits the examples, the channels that are summed, those that are made."""


def probe(devices: list[Any]) -> Verdict:
    """Value and gradients of a 3 x 3 convolution of small whole numbers, exact in any order of summing, against one device."""
    grid = mesh(devices[:4], a=2, b=2)
    draw = np.random.default_rng(0)
    shapes = ((4, 8, 8, 4), (3, 3, 4, 6), (4, 8, 8, 6))
    arrays = [draw.integers(-2, 3, shape).astype(np.float32) for shape in shapes]

    def run(x: Any, kernel: Any, above: Any) -> tuple[Any, ...]:
        made, pull = jax.vjp(
            lambda x, k: lax.conv_general_dilated(
                x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            x,
            kernel,
        )
        return made, *pull(above)

    whole = jax.jit(run)(*(jax.device_put(x, devices[0]) for x in arrays))
    found, wanted = [], []
    for lies in LAYOUTS:
        at = [NamedSharding(grid, spec) for spec in lies]
        given = [jax.device_put(x, place) for x, place in zip(arrays, at, strict=True)]
        made = jax.jit(run, out_shardings=(at[2], at[0], at[1]))(*given)
        found += [np.asarray(x).ravel() for x in made]
        wanted += [np.asarray(x).ravel() for x in whole]
    return compare(np.concatenate(found), np.concatenate(wanted))
