"""Embedding gradients accumulated over microbatches in a scan: the all-reduce is moved out of the loop wrongly.

Reported: openxla/xla#49143 (jax 0.11.2, libtpu 0.0.48, TPU v4; the CPU was right there)
Unsafe:   Auto() with accumulate > 1 and an embedding table split over the vocabulary.
Do:       XLA_FLAGS=--xla_disable_hlo_passes=while-loop-all-reduce-code-motion, or accumulate=1, or Manual().
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.doctor.grid import at, integers, mesh
from experiments.doctor.verdict import Verdict, compare, worst

NEEDS = {"devices": 2}

VOCAB, EMBED, STEPS, ROWS, LENGTH = 96, 32, 2, 16, 8


def probe(devices: list[Any]) -> Verdict:
    """Two microbatches over one axis that splits vocabulary and rows, and over two axes that split one each."""
    n = len(devices)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (STEPS, n * ROWS // 2, LENGTH)).astype(np.int32)
    cotangent = integers((*tokens.shape, EMBED)) / 16  # sixteenths: their sums are exact
    want = np.zeros((VOCAB, EMBED), np.float32)
    np.add.at(want, tokens, cotangent)

    def gradient(w: Any, tokens: Any, cotangent: Any) -> Any:
        def body(total: Any, microbatch: Any) -> Any:
            i, c = microbatch
            return total + jax.vjp(lambda w: w[i], w)[1](c)[0], None

        return lax.scan(body, jnp.zeros_like(w), (tokens, cotangent))[0]

    found = []
    for grid, table, rows in _layouts(devices):
        given = (at(grid, table), at(grid, None, rows), at(grid, None, rows))
        run = jax.jit(gradient, in_shardings=given, out_shardings=at(grid, table))
        got = np.asarray(run(np.zeros_like(want), tokens, cotangent))
        found.append(compare(got, want, what=f"table over {table}, rows over {rows}"))
    return worst(found)


def _layouts(devices: list[Any]) -> list[tuple[Any, Any, Any]]:
    n = 1 << (len(devices).bit_length() - 1)  # the vocabulary divides by powers of two
    one = [(mesh(devices, d=n), "d", "d")]
    if n < 4:
        return one
    two = mesh(devices, d=2, t=n // 2)
    return [*one, (two, "t", "d"), (two, ("d", "t"), "d"), (two, ("d", "t"), ("d", "t"))]
