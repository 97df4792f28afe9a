"""What the devices at hand do, measured in a few seconds: products, memory and collectives of pretend devices.

No public figure says what one of several pretend devices gets of a machine, so a plan for `cpu:N` measures it where it is
made. All devices work at once, as in a step, so each rate is a device's share of the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sharding.errors import InputError
from sharding.price.machine import Machine
from sharding.price.machines import CPU
from sharding.price.target import Target

SIDE = 512
"""Rows and columns of the matrices that are multiplied."""
READ = 2**22
"""Elements (float32) of the array that each device reads and writes: more than caches hold."""
SENT = 2**20
"""Elements (float32) of the array that each device all-reduces."""
REPEATS = 8
"""Of each in one program, so that starting the program hardly counts."""
RUNS = 5
"""Of each program; the median counts."""


def measured(target: Target) -> Target:
    """A target of pretend devices with the figures of the machine at hand. jax must have started as many devices
    (`experiments.devices.start`). Takes a few seconds; a machine with other work gives lower rates. InputError for a
    target that is no cpu:N and where fewer devices are present.
    """
    import jax

    if target.platform != "cpu":
        raise InputError(
            f"Rates are measured for pretend devices only, but the target is {target.text}. Its figures stand in "
            f"sharding/price/machines.py; measure a target such as cpu:8."
        )
    devices = jax.devices()
    if devices[0].platform != "cpu" or len(devices) < target.devices:
        raise InputError(
            f"The target {target.text} needs {target.devices} pretend devices to be measured, but jax has "
            f"{len(devices)} {devices[0].platform} devices. Start as many, or plan for the ones that are there."
        )
    return replace(target, machine=machine(devices[: target.devices]))


def machine(devices: Sequence[Any]) -> Machine:
    """The machine that these CPU devices are parts of, with measured figures."""
    said = f"measured on {len(devices)} pretend devices at once, median of {RUNS}"
    start, bandwidth = _network(devices) if len(devices) > 1 else (0.0, float("inf"))
    return replace(
        CPU,
        flops={dtype: _products(devices, dtype) for dtype in ("float32", "bfloat16")},
        memory_bandwidth=_memory(devices),
        inside=replace(CPU.inside, bandwidth=bandwidth, latency=0.0, start=start, source=said),
        sources={"flops": said, "memory_bandwidth": said},
    )


def _products(devices: Sequence[Any], dtype: str) -> float:
    """FLOP/s of a device."""
    import jax.numpy as jnp

    def body(x: Any) -> Any:
        return x @ x * jnp.asarray(1 / SIDE, x.dtype)

    seconds = _seconds(devices, body, (SIDE, SIDE), dtype)
    return 2 * SIDE**3 / seconds


def _memory(devices: Sequence[Any]) -> float:
    """Bytes/s that a device reads and writes in an elementwise run."""
    return 2 * 4 * READ / _seconds(devices, lambda x: x * 0.5 + 1.0, (READ,), "float32")


def _network(devices: Sequence[Any]) -> tuple[float, float]:
    """(seconds that an all-reduce takes to begin, bytes/s that a device sends in a large one)."""
    import jax

    def body(x: Any) -> Any:
        return jax.lax.pcast(jax.lax.psum(x, "all"), ("all",), to="varying") * (1 / len(devices))

    n = len(devices)
    small, large = (_seconds(devices, body, (size,), "float32") for size in (1, SENT))
    return small, 2 * 4 * SENT * (n - 1) / n / max(large - small, 1e-9)


def _seconds(devices: Sequence[Any], body: Callable[[Any], Any], shape: tuple[int, ...], dtype: str) -> float:
    """Median seconds of one `body` on an array of `shape` that each device has of its own, all of them at once."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("all")

    def several(x: Any) -> Any:  # a loop: unrolled, elementwise repeats would become one pass over memory
        return jax.lax.fori_loop(0, REPEATS, lambda _, x: body(x), x)

    region = jax.jit(jax.shard_map(several, mesh=mesh, in_specs=rows, out_specs=rows))
    whole = np.ones((shape[0] * len(devices), *shape[1:]), np.float32)
    x = jax.device_put(jax.numpy.asarray(whole, dtype), NamedSharding(mesh, rows))
    jax.block_until_ready(region(x))
    taken = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        jax.block_until_ready(region(x))
        taken.append((time.perf_counter() - begun) / REPEATS)
    return statistics.median(taken)
