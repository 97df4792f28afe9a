"""The gradient of an embedding, a scatter-add, under XLA's partitioner: sliced before it is reduced.

Reported: openxla/xla#42481 (jaxlib 0.10.0 to 0.10.2, H100; fixed after 0.10.2)
Unsafe:   Auto() and Explicit meshes with the vocabulary split over an axis that also splits the tokens: rows of the
          gradient leak into unrelated rows of the vocabulary.
Do:       Use Manual(), which scatters into its own rows and reduces by name; or do not split the vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.doctor.grid import P, at, integers, mesh, put
from experiments.doctor.verdict import Verdict, compare, worst

NEEDS = {"devices": 4}

VOCAB, EMBED, ROWS, LENGTH = 32, 4, 4, 8


def probe(devices: list[Any]) -> Verdict:
    """Layouts of table and tokens, under Auto and with the typed `reduced` gather, against np.add.at."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    cotangent = integers((ROWS, LENGTH, EMBED))
    want = np.zeros((VOCAB, EMBED), np.float32)
    np.add.at(want, tokens, cotangent)
    size = len(devices) // 2
    found = [
        compare(
            _auto(mesh(devices, d=2, t=size), table, rows, tokens, cotangent), want, what=f"{table} {rows}"
        )
        for table in (("t",), ("d",), (("d", "t"),), ("t", "d"))
        for rows in (("d",), ("d", "t"), (None, "t"))
    ]
    grid = mesh(devices, "explicit", d=2, t=size)
    for table in ("t", "d", ("d", "t")):
        got = _explicit(grid, table, tokens, cotangent)
        found.append(compare(got, want, what=f"reduced gather, table over {table}"))
    return worst(found)


def _auto(grid: Any, table: tuple, rows: tuple, tokens: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    def gradient(w: Any, i: Any, c: Any) -> Any:
        return jax.vjp(lambda w: jnp.take(w, i, axis=0), w)[1](c)[0]

    given = (at(grid, *table), at(grid, *rows), at(grid, *rows))
    run = jax.jit(gradient, in_shardings=given, out_shardings=at(grid, *table))
    return np.asarray(run(np.zeros((VOCAB, EMBED), np.float32), tokens, cotangent))


def _explicit(grid: Any, table: Any, tokens: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    """The pattern of the report: gathered whole with a cotangent that is unreduced over both axes."""
    with jax.set_mesh(grid):

        def loss(w: Any, i: Any, c: Any) -> Any:
            whole = jax.sharding.reshard(w, P(None, None, reduced=frozenset("dt")))
            return jnp.sum(whole.at[i].get(out_sharding=P("d", "t", None)) * c)

        w = put(np.zeros((VOCAB, EMBED), np.float32), grid, table, None)
        return np.asarray(
            jax.jit(jax.grad(loss))(w, put(tokens, grid, "d", "t"), put(cotangent, grid, "d", "t"))
        )
