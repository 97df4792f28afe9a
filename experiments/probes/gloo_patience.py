"""Reduce-scatter through gloo gives up after 30 s of waiting for a slower process, whatever the time limits say.

Reported: jax-ml/jax#40831 (jax 0.12.0.dev20260920, CPU with jax.distributed)
Unsafe:   several processes on CPUs: a run dies when one process is more than 30 s behind (loading data, saving, compiling
          longer). It is loud: an error, no wrong numbers.
Do:       Keep the processes in step: compile and load before the first step, let an all-gather or all-reduce, which wait
          as configured, come first; or use data(), which has no reduce-scatter.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from jax import lax

from experiments.doctor.grid import P, at, mesh
from experiments.doctor.verdict import Verdict, compare, could_not_run

NEEDS = {"devices": 2, "processes": 2, "gloo": True, "seconds": 120.0, "quick": False}

PAUSE = 34.0


def probe(devices: list[Any]) -> Verdict:
    """Two processes reduce-scatter once together, and once with one of them `PAUSE` seconds late."""
    grid = mesh(devices, x=2)
    whole = np.arange(16, dtype=np.float32)
    x = jax.make_array_from_callback((16,), at(grid, "x"), lambda i: whole[i])
    run = jax.jit(
        jax.shard_map(
            lambda x: lax.psum_scatter(x, "x", tiled=True), mesh=grid, in_specs=P("x"), out_specs=P("x")
        )
    )
    jax.block_until_ready(run(x))
    if jax.process_index() == 1:
        time.sleep(PAUSE)
    began = time.monotonic()
    try:
        (shard,) = jax.block_until_ready(run(x)).addressable_shards
    except (RuntimeError, ValueError) as error:  # which of them depends on jax's version
        waited = f"after {time.monotonic() - began:.0f} s, the other process being {PAUSE:g} s late"
        return could_not_run(f"{type(error).__name__} {waited}: {str(error).partition(chr(10))[0][:160]}")
    return compare(np.asarray(shard.data), whole.reshape(2, 8).sum(0)[shard.index])
