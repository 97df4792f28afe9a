"""The process that compiles: builds a config's step on devices that need not be there and gives the compiled module's facts.

    python -m experiments.compilers.child JOB RESULTS         a file with the job as JSON, an open file descriptor

`experiments.compilers.ask` starts it, with the environment that the target's compiler needs. It writes lines of JSON: {"at":
what it does}, at the end {"compiled": ...}, or {"refused": why} for input that the user has to change. It leaves at once when
its standard input closes, so that it never outlives who started it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import Experiment
from sharding.errors import InputError
from sharding.partitioner import Auto, Manual, called

if TYPE_CHECKING:
    from sharding.price.target import Target

Say = Callable[..., None]

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
"""Whose versions stand beside what they compiled."""

PARTITIONERS = {"manual": Manual, "auto": Auto}


def main() -> None:
    """Compile the job and leave."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()
    out = os.fdopen(int(sys.argv[2]), "w", buffering=1)

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")

    try:
        say(compiled=compiled(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), say))
    except InputError as error:
        say(refused=str(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a compiler's own threads may take long to end, and nothing of theirs is needed


def compiled(job: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """The facts of one compilation, as plain JSON: see `experiments.compilers.ask.Compiled`."""
    from experiments.run_config import Origin
    from sharding.price.target import parse_target

    target = parse_target(job["target"])
    experiment = split_by(Origin(Path(job["path"]), tuple(job["overrides"])).experiment(), job["partitioner"])
    say(at=f"starting the {target.platform} compiler for {target.text}")
    devices = devices_of(target)
    say(at="tracing the step")
    began = time.monotonic()
    step = step_on(experiment, target, devices)
    traced = step.step.trace(step.abstract_state(), batch_of(step, experiment.batch))
    took = {"trace": time.monotonic() - began}
    say(at=f"compiling for {target.describe()}")
    began = time.monotonic()
    facts, refused = compile_traced(traced, step, target)
    took["compile"] = time.monotonic() - began
    by = called(experiment.partitioner)
    return {
        "target": target.text,
        "partitioner": by,
        "mesh": step.split.layouts.sizes,
        **(predicted(traced.jaxpr, step) if by == "manual" else {"traced": [], "repeated": []}),
        **facts,
        "refused": refused,
        "seconds": took,
        "versions": versions(),
    }


def split_by(experiment: Experiment, partitioner: str) -> Experiment:
    """The experiment under a partitioner, "manual" or "auto", with the options that its own has; "": its own."""
    if not partitioner or isinstance(experiment.partitioner, PARTITIONERS[partitioner]):
        return experiment
    return replace(experiment, partitioner=PARTITIONERS[partitioner]())


def devices_of(target: Target) -> list[Any]:
    """The target's devices as its compiler describes them: none of them is there, except for pretend ones.

    InputError with the compiler's own words where it knows no such devices.
    """
    import jax
    from jax.experimental import topologies

    if target.platform == "cpu":
        from experiments.config import Devices
        from experiments.devices import start

        return start(Devices("pretend", target.devices), keep_memory=False)
    asked: dict[str, Any] = {}
    if target.platform == "tpu":
        asked = {"platform": "tpu", "topology_name": target.topology, **target.machine.compiler_options}
        asked |= {"num_slices": target.islands} if target.islands > 1 else {}
    else:
        from experiments.compilers.gpus import target_config

        asked = {
            "platform": "cuda",
            "target_config": target_config(target.machine.name),
            "topology": f"1x{target.islands}x{target.island_devices}",
        }
    try:
        found = list(topologies.get_topology_desc(**asked).devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"The {target.platform} compiler does not know the devices of {target.text}: {_first(error)}. Take another "
            f"target, or a newer jax with the compiler that belongs to it."
        ) from error
    if len(found) != target.devices:
        raise InputError(
            f"The target {target.text} has {target.devices} devices, but for its compiler they are {len(found)}. Take "
            f"another target."
        )
    return found


def step_on(experiment: Experiment, target: Target, devices: list[Any]) -> Any:
    """The train step on the target's devices, TPU slices being islands of the mesh whatever the config says of islands."""
    from experiments.assemble import train_step

    if target.platform == "tpu" and target.islands != experiment.mesh.slices:
        experiment = replace(experiment, mesh=replace(experiment.mesh, slices=target.islands))
    return train_step(experiment, devices)


def batch_of(step: Any, rows: int) -> dict[str, Any]:
    """The abstract batch of so many rows, laid as the step takes it."""
    import jax

    lies = step.batch_shardings()
    return {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies[k])
        for k, x in step.abstract_batch(rows).items()
    }


def compile_traced(traced: Any, step: Any, target: Target) -> tuple[dict[str, Any], dict[str, Any]]:
    """(collectives and memory, what the compiler refused): one of the two says something."""
    import jax

    from sharding.module.compiled import compiled_collectives
    from sharding.module.hlo import module_of

    try:
        made = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return {"collectives": [], "memory": {}}, refusal(str(error), target.text)
    found = compiled_collectives(module_of(made), step.split.layouts.sizes)
    return {"collectives": [dataclasses.asdict(c) for c in found], "memory": memory_of(made, target)}, {}


def memory_of(made: Any, target: Target) -> dict[str, int]:
    """Bytes of one device as the compiler has laid them out: `memory_analysis` of a `jax.stages.Compiled`.

    What a TPU's compiler calls temporaries is about a fifth more than lies at once (17.2 GiB were no reason to refuse a v5e of
    15.75 GiB); its peak is what its buffer assignment adds up to, so they are taken from that.
    """
    told = made.memory_analysis()
    temporaries = told.temp_size_in_bytes
    if target.platform == "tpu":
        beside = told.output_size_in_bytes - told.alias_size_in_bytes + told.generated_code_size_in_bytes
        temporaries = max(0, told.peak_memory_in_bytes - told.argument_size_in_bytes - beside)
    return {
        "arguments": told.argument_size_in_bytes,
        "outputs": told.output_size_in_bytes,
        "aliased": told.alias_size_in_bytes,
        "temporaries": temporaries,
        "code": told.generated_code_size_in_bytes,
        "host_arguments": told.host_argument_size_in_bytes,
        "host_temporaries": told.host_temp_size_in_bytes,
    }


OVER = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE),
    re.compile(
        r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
    ),
)
"""How the TPU compiler says that a program needs more memory than there is."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def refusal(said: str, target: str) -> dict[str, Any]:
    """What a compiler's error says: its words, and where memory is what lacks, the bytes used and those there are.

    InputError for an error that is not about memory: it is a limit of the compiler or a fault of ours, and no verdict.
    """
    numbers = next(filter(None, (form.search(said) for form in OVER)), None)
    if numbers is None and "RESOURCE_EXHAUSTED" not in said:
        raise InputError(
            f"The compiler cannot compile this step for {target}: {' '.join(said.split())[:600]}. Take another target or "
            f"partitioner; --debug has no more than this."
        )
    told = {"message": " ".join(said.split())[:400], "used": None, "capacity": None}
    if numbers is not None:
        used, unit, capacity, of = numbers.groups()
        told |= {
            "used": int(float(used) * UNITS[unit.upper()]),
            "capacity": int(float(capacity) * UNITS[of.upper()]),
        }
    return told


def predicted(jaxpr: Any, step: Any) -> dict[str, Any]:
    """The collectives that the traced step holds, and those of them that it asks for again."""
    from sharding.ledger import collectives
    from sharding.module.repeated import repeated

    sizes = step.split.layouts.sizes
    return {
        "traced": [dataclasses.asdict(c) for c in collectives(jaxpr, sizes)],
        "repeated": [dataclasses.asdict(c) for c in repeated(jaxpr, sizes)],
    }


def versions() -> dict[str, str]:
    """Of jax and of the compilers that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _wait_for_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
