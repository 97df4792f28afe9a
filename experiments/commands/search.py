"""Search meshes, rules, remat and micro-batches for the split with the shortest modelled step that fits a target.

Candidates that cannot be laid out fall without a trace; the others are traced on all cores (predicted memory, modelled step),
and the best few are compiled by the target's compiler where it is installed. The pick can be written as a config file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import cli
from experiments.json_file import write_json
from sharding.errors import InputError

NOTHING_FITS = 1
"""Exit code when no candidate fits."""


@dataclass(frozen=True)
class Flags:
    """Options of `shardlab search`."""

    target: str = "cpu:8"
    """The devices, as for plan: cpu:N, tpu:MACHINE:AxBxC, gpu:MACHINE:HOSTSxDEVICES. A machine alone (gpu:h100, tpu:v5p, cpu)
    takes its count from --devices N."""
    axes: tuple[str, ...] = ()
    """Mesh axes that may have more than one device; by default every axis that some rule uses for this model."""
    remat: tuple[str, ...] = ()
    """Remat policies to try; by default none, dots, full and the config's own."""
    microbatches: tuple[int, ...] = ()
    """Numbers of micro-batches to try; by default 1, 2, 4, 8 and the config's own."""
    chains: Literal["all", "library", "own"] = "all"
    """Which rules: chains made of the library's, the config's own, or all of these."""
    most: int = 200
    """Candidates that are traced at most; where there are more, those that are likely to be good."""
    compile: int = 3
    """Of the best, how many are compiled; 0 for none."""
    exhaustive: bool = False
    """Compile every candidate, to see what the search loses: for small spaces."""
    jobs: int = 0
    """Processes that trace; 0: one for each core."""
    show: int = 12
    """Rows of the ranking that are printed."""
    out: Path | None = None
    """Write the pick as a config file, beside CONFIG or anywhere for one of configs/."""
    json: Path | None = None
    """Write every candidate with its figures to this file as one JSON document."""


def main(argv: list[str]) -> int:
    """Print the ranking; 0, or 1 where no candidate fits."""
    experiment, flags, origin = cli.read(argv, Flags)
    for name, least in (("most", 1), ("compile", 0), ("jobs", 0), ("show", 1)):
        if getattr(flags, name) < least:
            raise InputError(f"--{name} is {getattr(flags, name)}, but it is a number of at least {least}.")
    from experiments.search.config import check_out, write_pick
    from experiments.search.searching import Wanted, search
    from experiments.search.space import choices
    from experiments.search.tables import print_found
    from experiments.search.target import target_of

    if flags.out:
        check_out(flags.out, origin)
        cli.check_file(flags.out, "--out")
    found = search(
        origin,
        experiment,
        target_of(flags.target, origin.overrides),
        choices(experiment, flags.axes, flags.remat, flags.microbatches, flags.chains),
        Wanted(flags.most, flags.compile, flags.exhaustive, flags.jobs),
        _tell,
    )
    print_found(found, flags.show)
    write_json(flags.json, found.to_json())
    row = found.picked
    if row is None:
        print(cli.paragraph(f"shardlab: {found.says}"), file=sys.stderr)
        return NOTHING_FITS
    if flags.out:
        write_pick(flags.out, origin, found, row)
        print(f"config      {flags.out}")
    return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
