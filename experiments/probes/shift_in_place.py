"""Rows shifted by one inside a jitted function: the CPU writes in place and reads what it has just overwritten.

Reported: openxla/xla#49176 (September 2026, CPU; open)
Unsafe:   on CPUs, one device or many: x.at[1:].set(x[:-1]) of a computed x, followed by a reshape: shifted labels, causal
          shifts, ring buffers. Every row becomes the first.
Do:       Write jnp.concatenate([x[:1], x[:-1]]) or jnp.roll and mask; or XLA_FLAGS=--xla_disable_hlo_passes=algsimp.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from experiments.doctor.verdict import Verdict, compare


def probe(devices: list[Any]) -> Verdict:
    """8 x 16 integers, shifted down by one row and reshaped, on one device."""

    def shifted(x: Any) -> Any:
        base = x + np.int32(1)
        return base.at[1:].set(base[:-1]).reshape((1, *base.shape))

    x = np.arange(128, dtype=np.int32).reshape(8, 16)
    want = np.concatenate([x[:1], x[:-1]]) + np.int32(1)
    return compare(np.asarray(jax.jit(shifted)(jax.device_put(x, devices[0]))), want[None])
