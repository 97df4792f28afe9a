"""The devices of a run: pretend CPU devices, those present, and several processes. Here alone a backend is started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.config import Devices
from sharding.errors import InputError

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True)
class Processes:
    """This process's place among several. Under SLURM, Open MPI or on a TPU pod jax finds it by itself ("auto")."""

    coordinator: str = ""
    """host:port of process 0; "auto" asks the environment; empty for one process."""
    count: int = 1
    """Processes in all."""
    index: int = 0
    """This process, from 0."""


def start(devices: Devices, processes: Processes | None = None) -> list[jax.Device]:
    """Start jax's backend as asked for and return the run's devices, those of every process.

    Pretend devices are CPU devices that share this machine's cores, split evenly over the processes. Raises InputError
    when more are asked for than are present, or when a backend with other devices has been started before.
    """
    processes = processes or Processes()
    import jax

    if devices.kind == "pretend":
        _pretend(devices.count, processes.count)
    if processes.coordinator:
        _connect(processes, devices)
    found = jax.devices()
    count = len(found) if devices.count == -1 else devices.count
    if count > len(found):
        raise InputError(
            f"The config asks for {count} devices, but {len(found)} are present ({found[0].device_kind}, "
            f"{jax.process_count()} processes). Set devices.count to {len(found)} or -1 (all), or devices.kind to "
            f'"pretend" to share the CPU among {count} pretend devices.'
        )
    return found[:count]


def _pretend(count: int, processes: int) -> None:
    import jax

    from experiments.malloc import keep_freed_memory

    if count % processes:
        raise InputError(
            f"{count} pretend devices cannot be split evenly over {processes} processes. Set devices.count to a "
            f"multiple of {processes}."
        )
    keep_freed_memory()
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(count // processes, 1))
    except RuntimeError:  # a backend runs already: it must have enough devices
        if jax.devices()[0].platform != "cpu" or jax.device_count() < count:
            raise InputError(
                f"{count} pretend devices were asked for after jax started with {jax.device_count()} "
                f"{jax.devices()[0].platform} devices. Ask for them before anything else uses jax."
            ) from None


def _connect(processes: Processes, devices: Devices) -> None:
    import jax

    if devices.kind == "pretend":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if processes.coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(processes.coordinator, processes.count, processes.index)


def cache_compilations(folder: str) -> None:
    """Keep compiled programs in a folder, so that the same step starts at once the next time.

    A folder that the user chose (JAX_COMPILATION_CACHE_DIR) stays.
    """
    import jax

    if jax.config.jax_compilation_cache_dir:
        return
    os.makedirs(folder, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
