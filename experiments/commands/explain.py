"""Show where every array of a config lies on its mesh, which rule put it there, and what moves in a step.

Nothing is run and no device is touched: the step is traced for devices that need not be there.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from experiments import cli
from experiments.json_file import write_json
from sharding.finding import Limits

ASSUMED = 8
"""Devices explained for when the config takes whatever is present."""


@dataclass(frozen=True)
class Flags:
    """Options of `shardlab explain`."""

    json: Path | None = None
    """Write the whole explanation to this file as one JSON document."""
    record: Path | None = None
    """Append where every array lies to this file of records: `shardlab figures split --records FILE` draws it."""
    draw: tuple[str, ...] = ()
    """What that picture shows, each a path of a parameter or batch entry or an activation's names, such as
    "batch length embed"; nothing: it chooses."""
    warn: Limits = field(default_factory=Limits)
    """From what size on waste is told."""


def main(argv: list[str]) -> int:
    """Print the explanation; 0."""
    experiment, flags, _ = cli.read(argv, Flags)
    if flags.record:
        cli.check_file(flags.record, "--record")
    from experiments.explanation import explain
    from experiments.pictured import check_drawn, write_records
    from experiments.tables import print_explanation

    devices = ASSUMED if experiment.devices.count == -1 else experiment.devices.count
    told = explain(experiment, devices, flags.warn)
    check_drawn(told, flags.draw)
    print_explanation(told)
    if experiment.devices.count == -1:
        print(
            f"The config takes all devices present; explained for {devices}. --devices.count N explains for N."
        )
    write_json(flags.json, told.to_json())
    write_records(flags.record, experiment, told, flags.draw, shlex.join(["shardlab", "explain", *argv]))
    return 0
