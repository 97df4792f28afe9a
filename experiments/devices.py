"""The devices of a run: pretend CPU devices, those present, and several processes. Here alone a backend is started."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import Devices
from experiments.record_schema import RecordError
from sharding.errors import InputError, first_line


@dataclass(frozen=True)
class Processes:
    """This process's place among several. Under SLURM, Open MPI or on a TPU pod jax finds it by itself ("auto")."""

    coordinator: str = ""
    """host:port of process 0; "auto" asks the environment; empty for one process."""
    count: int = 1
    """Processes in all."""
    index: int = 0
    """This process, from 0."""


def start(devices: Devices, processes: Processes | None = None, keep_memory: bool = True) -> list[Any]:
    """Start jax's backend as asked for and return the run's devices, those of every process.

    Pretend devices are CPU devices that share this machine's cores, split evenly over the processes. keep_memory: they
    keep a program's scratch memory from one run to the next, which pays where few programs run often. Raises InputError
    when more are asked for than are present, or when a backend with other devices has been started before.
    """
    processes = processes or Processes()
    _check(processes, devices)
    import jax

    if devices.kind == "pretend":
        _pretend(devices.count, processes.count, keep_memory)
    if processes.coordinator:
        _connect(processes, devices)
    try:
        found = jax.devices()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # what a backend raises that cannot start, each its own kind
        asked = getattr(jax.config, "jax_platforms", "") or "any"
        raise InputError(
            f"jax cannot start the devices that are asked for (platform {asked}): {first_line(error)}. Install what the "
            f'platform needs, set JAX_PLATFORMS to one that is there, or set devices.kind to "pretend".'
        ) from error
    count = len(found) if devices.count == -1 else devices.count
    if count > len(found):
        raise InputError(
            f"The config asks for {count} devices, but {len(found)} are present ({found[0].device_kind}, "
            f"{jax.process_count()} processes). Set devices.count to {len(found)} or -1 (all), or devices.kind to "
            f'"pretend" to share the CPU among {count} pretend devices.'
        )
    if jax.process_count() > 1 and count != len(found):
        raise InputError(
            f"The config asks for {count} of the {len(found)} devices of {jax.process_count()} processes, but every process "
            f"takes part with all that it has. Set devices.count to {len(found)} or -1, or start fewer processes."
        )
    return found[:count]


def _check(p: Processes, devices: Devices) -> None:
    """Refuse a place among processes that cannot be."""
    if p.coordinator == "auto" and p.count < 2 and devices.kind == "pretend":
        raise InputError(
            "Pretend devices are split over the processes before these find each other, so their number must be given: "
            "add --processes.count N (1 process needs no processes.coordinator)."
        )
    if not p.coordinator and p != Processes():
        raise InputError(
            f"There are to be {p.count} processes (this one {p.index}), but no processes.coordinator says where they meet. "
            f"Give every process --processes.coordinator HOST:PORT of process 0, or auto under a launcher that jax knows."
        )
    if not p.coordinator or p.coordinator == "auto":
        return
    host, _, port = p.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(
            f"processes.coordinator is {p.coordinator!r}, but it is the host:port at which process 0 listens, such as "
            f"127.0.0.1:9876, or auto. Change it."
        )
    if p.count < 1 or not 0 <= p.index < p.count:
        raise InputError(
            f"This is process {p.index} of {p.count}, but the processes are numbered from 0 to {p.count - 1}. Change "
            f"processes.index or processes.count."
        )


MOST_PRETEND = 2048
"""Pretend devices of one process: from 2049 on XLA:CPU takes some for those of another process, and runs no program."""


def check_pretend(count: int, processes: int, name: str = "devices.count") -> None:
    """InputError unless `count` pretend devices can be shared out over `processes` and started; `name`: what says so."""
    if count % processes:
        raise InputError(
            f"{count} pretend devices cannot be split evenly over {processes} processes. Make {name} a multiple of "
            f"{processes}, or start another number of processes."
        )
    if count > MOST_PRETEND * processes:
        raise InputError(
            f"{count} pretend devices over {processes} process(es) are more than the {MOST_PRETEND} that one process "
            f"starts. Make {name} at most {MOST_PRETEND * processes}; `shardlab explain` starts none and takes any number."
        )


def _pretend(count: int, processes: int, keep_memory: bool) -> None:
    import jax

    from experiments.malloc import keep_freed_memory

    check_pretend(count, processes)
    if keep_memory:
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


@contextmanager
def together(processes: Processes) -> Iterator[None]:
    """An error inside ends this process for good, and with it the others, who would wait for it in a collective.

    jax leaves only when all processes do, so Python's own end is cut short, after every message is out.
    """
    try:
        yield
    except BaseException as error:
        if processes.coordinator and _connected():
            code = (
                2
                if isinstance(error, (InputError, RecordError))
                else 130
                if isinstance(error, KeyboardInterrupt)
                else 1
            )
            atexit.register(_leave, code)
        raise


def _connected() -> bool:
    """Whether other processes wait for this one; not so for what is refused before it has met them."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def cache_compilations(folder: str) -> None:
    """Keep compiled programs in a folder, so that the same step starts at once the next time.

    A folder that the user chose (JAX_COMPILATION_CACHE_DIR) stays. The first compilation makes the folder: a command that is
    refused before leaves nothing. Raises InputError when it cannot be made.
    """
    import jax

    from experiments.cli import check_folder

    if jax.config.values.get("jax_compilation_cache_dir"):
        return
    # Not by JAX_COMPILATION_CACHE_DIR: data that are made ready lie beside it, so another folder for programs would not do.
    change = "Work in a folder that is writable, and in which nothing else has that name."
    check_folder(Path(folder), "The cache of compiled programs", change)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
