"""Check this machine: every collective against NumPy, in one process and several, and probes for known bugs.

shardlab doctor                                    the devices present; 8 pretend ones where there is only a CPU
shardlab doctor --devices 8 --processes 2          8 pretend CPU devices
shardlab doctor --quick                            the most telling checks
shardlab doctor --only permute                     checks in whose name that occurs
shardlab doctor --probe my_probe.py                a probe of your own as well

Checks run in processes of their own, so one that hangs or dies is a finding. docs/doctor.md explains the verdicts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.devices import check_pretend
from experiments.json_file import write_json
from sharding.axes import nearest
from sharding.errors import InputError

if TYPE_CHECKING:
    from experiments.doctor.catalogue import Probe
    from experiments.doctor.children import Finding
    from experiments.doctor.examination import Order

WELL, UNWELL = 0, 1
SHOWN = 3
"""Checks of one collective that are shown as they fail."""


@dataclass(frozen=True)
class Flags:
    """Options of `shardlab doctor`."""

    devices: int | None = None
    """This many pretend CPU devices, instead of the devices present."""
    processes: int = 2
    """Processes that talk to each other for the second round of collectives; 1 leaves that round out."""
    quick: bool = False
    """Fewer axes, dtypes and sizes, and no probe that takes long."""
    only: tuple[str, ...] = ()
    """Only checks in whose name one of these occurs."""
    probe: tuple[Path, ...] = ()
    """More probes: files like those in experiments/probes."""
    accept: tuple[str, ...] = ()
    """Checks, by name, whose failure you know of: they are told, but do not count in the exit code."""
    limit: float = 60.0
    """Seconds that a check may take, compilation included, before it counts as stuck; a probe may ask for more."""
    json: Path | None = None
    """Write versions, every check's verdict, error, bound and seconds to this file as one JSON document."""


def main(argv: list[str]) -> int:
    """Examine the machine; 0 when all is well, 1 when a check was wrong or could not run."""
    flags = cli.read_flags(argv, Flags)
    order, probes = _ordered(flags)
    from experiments.doctor.examination import examine_machine, nothing_wanted
    from experiments.doctor.findings import document, failures, show

    if nothing_wanted(order, probes):  # before any process starts
        raise _nothing(flags, probes)
    made = examine_machine(order, probes, Teller(), lambda what: print(f"checking {what} ...", flush=True))
    if flags.only and not [f for f in made.findings if f.check.case or f.check.probe]:
        raise _nothing(flags, probes)
    show(made, probes, flags.accept)
    write_json(flags.json, document(made, probes, flags.accept))
    return UNWELL if failures(made, flags.accept) else WELL


def _nothing(flags: Flags, probes: list[Probe]) -> InputError:
    return InputError(
        f"--only {' '.join(flags.only)} leaves no check to run. Collectives are named such as 'all-reduce float32 over "
        f"data, 64 KiB'; probes by their files: {', '.join(p.name for p in probes)}."
    )


def _ordered(flags: Flags) -> tuple[Order, list[Probe]]:
    """The flags as an order, checked, and the probes there are."""
    from experiments.doctor.catalogue import catalogue
    from experiments.doctor.examination import Order

    if flags.devices is not None and flags.devices < 1:
        raise InputError(f"--devices is {flags.devices}, but it takes at least 1 pretend device.")
    if flags.processes < 1:
        raise InputError(f"--processes is {flags.processes}, but it takes at least 1.")
    if flags.devices is not None:
        for processes in (1, flags.processes):  # one process has them all first
            check_pretend(flags.devices, processes, "--devices")
    if not flags.limit > 0:
        raise InputError(f"--limit is {flags.limit}, but a check needs some seconds. Give it more than 0.")
    probes = catalogue(flags.probe)
    for name in flags.accept:
        known = [p.name for p in probes]
        if name not in known and " over " not in name:
            raise InputError(
                f"--accept names {name!r}, which is no probe{nearest(name, known)} and no collective's check, such as "
                f"'permute float32 over tensor data, 64 B'. The probes are {', '.join(known)}."
            )
    return Order(flags.devices, flags.processes, flags.quick, flags.limit, flags.only), probes


class Teller:
    """One line for a probe, and for the first checks of a collective that are not well; the report counts them all."""

    def __init__(self) -> None:
        self._told: Counter[str] = Counter()

    def __call__(self, finding: Finding) -> None:
        """Print the finding as it comes."""
        verdict, collective = finding.verdict, finding.check.case.get("collective")
        if collective:
            if not verdict.unwell:
                return
            self._told[collective] += 1
            if self._told[collective] > SHOWN:
                return
        line = f"  {verdict.outcome:<14}  {finding.check.name}"
        print(line + (f": {verdict.detail}" if verdict.detail else ""), flush=True)
