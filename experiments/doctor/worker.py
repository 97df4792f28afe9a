"""A process of the doctor: starts jax as told, runs checks one by one, and writes a line before and after each.

    python -m experiments.doctor.worker RESULTS JOB      two open file descriptors

It leaves at once when its standard input closes, so that it never outlives who started it, however stuck it is.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from experiments.doctor.job import Check, Job
from experiments.doctor.verdict import Verdict, could_not_run, not_applicable


def main() -> None:
    """Run the job; never returns."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()
    out = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    with os.fdopen(int(sys.argv[2])) as told:
        job = Job.from_json(told.read())

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")

    devices = start(job)
    say(ready=about(devices))
    for check in job.checks:
        say(begin=check.name)
        began = time.perf_counter()
        verdict = run(check, devices)
        say(end=check.name, seconds=time.perf_counter() - began, verdict=verdict.to_json())
    say(done=True)
    threading.Event().wait()


def start(job: Job) -> list[Any]:
    """jax's devices, those of every process. Its errors come out as they are."""
    import jax

    place = job.place
    count = (place.pretend or place.spare) // place.processes
    jax.config.update("jax_num_cpu_devices", count)
    if place.pretend:
        jax.config.update("jax_platforms", "cpu")
        if place.gloo:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if place.gloo or place.processes > 1:
        mine = range(job.index * place.local, (job.index + 1) * place.local) if place.local else None
        jax.distributed.initialize(
            job.coordinator,
            place.processes,
            job.index,
            local_device_ids=mine,
            initialization_timeout=int(job.deadline),
        )
    return jax.devices()


def about(devices: list[Any]) -> dict[str, Any]:
    """Versions and devices, as the report shows them."""
    import jax
    import numpy

    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": numpy.__version__,
        "platform": devices[0].platform,
        "platform_version": devices[0].client.platform_version,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "machine": platform.machine(),
        "system": platform.platform(),
    }


def run(check: Check, devices: list[Any]) -> Verdict:
    """The verdict of one check; what it raises becomes "could not run"."""
    try:
        if check.case:
            return _collective(check.case, devices)
        if not check.probe:
            return Verdict("ok", f"{len(devices)} {devices[0].device_kind}")
        if len(devices) < check.devices:
            return not_applicable(f"it takes {check.devices} devices, and {len(devices)} are here")
        from experiments.doctor.catalogue import load

        verdict = load(Path(check.probe))(devices)
        if not isinstance(verdict, Verdict):
            return could_not_run(f"probe(devices) returned a {type(verdict).__name__} instead of a Verdict")
        return verdict
    except Exception as error:  # whatever a backend or somebody's probe raises is this check's result
        told = str(error).strip().partition("\n")[0][:300]
        return could_not_run(f"{type(error).__name__}: {told}")


def _collective(case: dict[str, Any], devices: list[Any]) -> Verdict:
    from experiments.doctor.cases import Case
    from experiments.doctor.collectives import examine
    from experiments.doctor.examination import mesh_shape
    from sharding.mesh import device_mesh

    mesh = device_mesh(mesh_shape(len(devices)), devices)
    return examine(Case(**{**case, "axes": tuple(case["axes"])}), mesh)


def _wait_for_parent() -> None:
    """Returns never: ends the process when standard input closes. jax's own leaving would wait for the others."""
    pipe: IO[bytes] = sys.stdin.buffer
    while pipe.read(1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
