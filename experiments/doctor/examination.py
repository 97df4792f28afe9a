"""The whole examination: which checks run where, and the document that comes of them. No jax here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from experiments.doctor.cases import cases
from experiments.doctor.catalogue import Probe
from experiments.doctor.children import Finding, run_checks
from experiments.doctor.job import Check, Place
from sharding.axes import MeshShape

PRETEND = 8
"""Pretend devices where the machine has only a CPU and nobody says how many."""
START_UP = 120.0
"""Seconds that processes have to start jax and to find each other."""


@dataclass(frozen=True)
class Order:
    """What to examine, as the command line says it."""

    devices: int | None = None
    """Pretend CPU devices; None takes those present."""
    processes: int = 2
    quick: bool = False
    limit: float = 60.0
    """Seconds that a check may take, where a probe does not ask for more."""
    only: tuple[str, ...] = ()
    """Run only checks in whose name one of these occurs."""

    def wants(self, name: str) -> bool:
        """Whether a check of that name is to run."""
        return not self.only or any(part in name for part in self.only)


@dataclass
class Examination:
    """What is known so far: versions and devices of each place, and every finding in order."""

    places: list[tuple[Place, dict[str, Any]]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was left out of the plan and why."""
    seconds: float = 0.0

    def about(self) -> dict[str, Any]:
        """Versions and devices of the first place; empty when nothing started."""
        return self.places[0][1] if self.places else {}


def mesh_shape(devices: int) -> MeshShape:
    """Devices laid out over up to three axes as evenly as their prime factors allow: 8 is data 2, fsdp 2, tensor 2."""
    sizes, left, factor = [1, 1, 1], devices, 2
    factors = []
    while left > 1:
        while left % factor == 0:
            factors.append(factor)
            left //= factor
        factor += 1
    for prime in reversed(factors):
        sizes[sizes.index(min(sizes))] *= prime
    return MeshShape(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])


def examine_machine(
    order: Order, probes: Sequence[Probe], tell: Callable[[Finding], None], starts: Callable[[str], None]
) -> Examination:
    """Run everything; `starts` hears what begins, `tell` every finding as it comes."""
    began, made = time.perf_counter(), Examination()

    def go(what: str, place: Place, checks: Sequence[Check]) -> None:
        if not checks:
            return
        starts(what)

        def heard(about: dict[str, Any]) -> None:
            made.places.append((place, about))

        def found(finding: Finding) -> None:
            made.findings.append(finding)
            tell(finding)

        run_checks(place, checks, START_UP, found, heard)

    wanted = [p for p in probes if order.wants(p.name) and (p.needs.quick or not order.quick)]
    one = Place(pretend=order.devices or 0, spare=PRETEND)
    here = [_check(p, order) for p in wanted if not p.needs.gloo]
    go("start-up and probes", one, [Check("start-up", START_UP), *here])
    if not made.places:
        return replace(made, seconds=time.perf_counter() - began)  # nothing starts: the finding says why
    count = made.about()["devices"]
    if count == 1:
        made.notes.append("One device has no collectives. --devices 8 checks them on pretend CPU devices.")
    go("collectives in one process", one, _collectives(order, count))
    if order.processes > 1:
        place = _several(order, made)
        count = place.pretend or place.local * place.processes
        go(f"collectives in {order.processes} processes", place, _collectives(order, count))
    for probe in (p for p in wanted if p.needs.gloo):
        place = Place(pretend=probe.needs.devices, processes=probe.needs.processes, gloo=True)
        go(f"probe {probe.name}", place, [_check(probe, order)])
    return replace(made, seconds=time.perf_counter() - began)


def nothing_wanted(order: Order, probes: Sequence[Probe]) -> bool:
    """Whether an order leaves no check, whatever the machine: known before anything starts."""
    if any(order.wants(p.name) and (p.needs.quick or not order.quick) for p in probes):
        return False
    # Where the devices are not counted yet, meshes of one, two and three axes: any other number has the names of one of these.
    return not any(_collectives(order, n) for n in ((order.devices,) if order.devices else (2, 4, 8)))


def _check(probe: Probe, order: Order) -> Check:
    limit = max(order.limit, probe.needs.seconds)
    return Check(probe.name, limit, probe=str(probe.path.resolve()), devices=probe.needs.devices)


def _collectives(order: Order, devices: int) -> list[Check]:
    made = cases(mesh_shape(devices).sizes(), order.quick)
    return [Check(c.name, order.limit, case=asdict(c)) for c in made if order.wants(c.name)]


def _several(order: Order, made: Examination) -> Place:
    """Where several processes run: on the accelerators present, when they can be shared out, else on a CPU with gloo."""
    here, n = made.about(), order.processes
    if order.devices is None and here["platform"] != "cpu":
        if here["devices"] % n == 0:
            return Place(processes=n, local=here["devices"] // n)
        made.notes.append(
            f"{here['devices']} {here['device_kind']} cannot be shared out to {n} processes, so these ran on pretend CPU "
            f"devices. --processes {here['devices']} gives each its own."
        )
    return Place(pretend=order.devices or -(-PRETEND // n) * n, processes=n, gloo=True)
