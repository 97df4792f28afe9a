"""Reduce-scatter of chunks of MiBs through gloo: the end of rank 0's chunk is wrong, now and then.

Reported: jax-ml/jax#40830 (jax 0.12.0.dev20260920, CPU with jax.distributed)
Unsafe:   several processes on CPUs, or one with jax.distributed: Manual() with fsdp, zero2 or hsdp, whose gradients are
          reduce-scattered in chunks of MiBs.
Do:       Use data() or zero1(), which all-reduce; or Auto(), which emits none on CPU; or one process without
          jax.distributed.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax

from experiments.doctor.grid import P, at, mesh
from experiments.doctor.verdict import Verdict, compare, worst

NEEDS = {"devices": 24, "gloo": True, "seconds": 90.0}

CHUNK, GROUP, TIMES = 1 << 19, 2, 8


def probe(devices: list[Any]) -> Verdict:
    """24 devices as 12 groups of 2, 4 MiB of float64 a chunk, again and again, as in the report."""
    block = (np.arange(GROUP * CHUNK) % 251).astype(np.float64)
    with jax.enable_x64(True):
        grid = mesh(devices, groups=len(devices) // GROUP, members=GROUP)
        split = at(grid, ("groups", "members"))

        def of_device(index: Any) -> np.ndarray:
            return block * (1 + index[0].start // block.size % GROUP)

        x = jax.make_array_from_callback((len(devices) * block.size,), split, of_device)
        spec = P(("groups", "members"))
        run = jax.jit(
            jax.shard_map(
                lambda x: lax.psum_scatter(x, "members", tiled=True), mesh=grid, in_specs=spec, out_specs=spec
            )
        )
        found = []
        for again in range(TIMES):
            for s in run(x).addressable_shards:
                rank = s.index[0].start // CHUNK % GROUP
                want = block[rank * CHUNK : (rank + 1) * CHUNK] * (GROUP * (GROUP + 1) / 2)
                found.append(compare(np.asarray(s.data), want, what=f"time {again}, {s.device}, rank {rank}"))
    wrong = sum(v.outcome == "wrong" for v in found)
    first = worst(found)
    return Verdict(
        first.outcome, f"{wrong} of {len(found)} chunks wrong; {first.detail}" if wrong else "", first.error
    )
