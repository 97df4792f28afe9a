"""Prove that a config's split computes what one device computes, on every mesh that its rules can use.

Loss, every gradient, every parameter and optimizer array after some updates are compared with one device, for both
partitioners, against error budgets derived from measured rounding (docs/verify.md). On departure the first tensor that
departs is named. `--steps N` sets the updates compared (5), `--devices N` the most devices of a mesh (8). Exit code 1
when anything departs, or is too coarse to judge.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments import cli
from experiments.json_file import write_json
from sharding.errors import InputError

if TYPE_CHECKING:
    from sharding.axes import MeshShape

STEPS, DEVICES = 5, 8


@dataclass(frozen=True)
class Flags:
    """Options of `shardlab verify`."""

    json: Path | None = None
    """Write every case with its errors and budgets to this file as one JSON document."""
    meshes: tuple[str, ...] = ()
    """Only these meshes, such as data=2,tensor=4; by default all that the rules can use."""
    partitioners: Literal["both", "manual", "auto"] = "both"
    """Who partitions."""
    x64: bool = False
    """Compute in double precision, where the budget is near the rounding of double."""


def main(argv: list[str]) -> int:
    """Verify; 0 when every mesh agrees with one device, 1 when one departs or cannot be judged."""
    experiment, flags, origin = cli.read(argv, Flags)
    meshes = tuple(dict.fromkeys(_mesh(text) for text in flags.meshes))
    if "--meshes" in argv and not meshes:
        raise InputError(
            "--meshes names no mesh. Give some, such as --meshes data=2,tensor=4, or leave it out for all."
        )
    given = {word.partition("=")[0] for word in origin.overrides}
    steps = experiment.steps if "--steps" in given else min(STEPS, experiment.steps)
    own = experiment.devices.count if experiment.devices.kind == "pretend" else 0
    if "--devices.count" not in given and experiment.devices.kind == "pretend":
        most = max([DEVICES, *(m.devices for m in meshes)])
        experiment = replace(experiment, devices=replace(experiment.devices, count=most))
    from experiments import assemble, devices
    from experiments.progress import Progress
    from experiments.verification import cases, verify
    from experiments.verified_tables import print_case, print_verified
    from sharding.partitioner import Auto, Manual

    began = time.perf_counter()
    found = devices.start(experiment.devices, keep_memory=False)  # each program runs a few times
    devices.cache_compilations(str(assemble.CACHE / "jax"))
    by = {"both": (), "auto": (Auto(),), "manual": (Manual(),)}[flags.partitioners]
    with contextlib.suppress(
        InputError
    ):  # where -1 cannot be filled here, the config's own mesh is not among them
        experiment = replace(experiment, mesh=experiment.mesh.resolve(own or len(found)))
    asked = cases(experiment, len(found), meshes, by)
    with Progress(len(asked)) as show:
        if experiment.mesh.sizes() not in [case.mesh.sizes() for case in asked]:
            show.line(f"the config's own mesh, {experiment.mesh.describe()}, is not among those verified")
        dataset = experiment.data.open(assemble.CACHE / "data")
        show.line(
            f"{experiment.name}: {experiment.rules!r} on {len(asked)} meshes and partitioners, {steps} updates each"
        )
        made = verify(
            experiment, dataset, found, asked, steps, flags.x64, lambda *told: print_case(show, *told)
        )
    seconds = time.perf_counter() - began
    print_verified(made, seconds)
    write_json(flags.json, {**made.to_json(), "seconds": seconds})
    return 1 if made.departed or made.coarse else 0


def _mesh(text: str) -> MeshShape:
    """`data=2,tensor=4` as a mesh; InputError when it cannot be read."""
    from sharding.axes import MeshShape

    pairs = []
    for word in text.split(","):
        axis, _, size = word.partition("=")
        if not size.strip().isdecimal() or int(size) < 1:
            raise InputError(
                f"--meshes {text} cannot be read at {word!r}: a mesh is its axes with their sizes, such as "
                f"data=2,tensor=4. Give every axis a whole number of devices."
            )
        pairs.append((axis.strip(), int(size)))
    mesh = MeshShape.of(*pairs)
    if mesh.devices == 1:
        raise InputError(
            f"--meshes {text} is one device, which verify compares every mesh with: it would be held against itself. Give an "
            f"axis 2 devices or more, such as --meshes {pairs[0][0]}=2."
        )
    return mesh
