"""What the doctor found, as tables, advice for each failure, and one JSON document."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from experiments.doctor.catalogue import Probe
from experiments.doctor.children import Finding
from experiments.doctor.examination import Examination, mesh_shape
from experiments.doctor.job import Place
from experiments.doctor.verdict import Verdict, worst
from experiments.progress import clock, terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLLECTIVE_UNSAFE = "A step that uses it there computes other numbers than it says, or hangs."
COLLECTIVE_DO = (
    "Do not train over these axes here. See whether a probe names the cause; try another jax version, axes in "
    "another order, or a mesh without them; then run the doctor again."
)


def document(made: Examination, probes: Sequence[Probe], accepted: Sequence[str]) -> dict[str, Any]:
    """Everything as JSON: versions and devices by place, each check's verdict, error, bound and seconds, and counts."""
    catalogue = {p.name: p for p in probes}
    checks = [_check(f, catalogue, accepted) for f in made.findings]
    return {
        "format": 1,
        "versions": made.about(),
        "places": [{"asked": asdict(place), "found": about} for place, about in made.places],
        "checks": checks,
        "counts": counts([f.verdict for f in made.findings]),
        "notes": made.notes,
        "well": not failures(made, accepted),
        "seconds": made.seconds,
    }


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Outcome -> how many."""
    outcomes = ("ok", "wrong", "could not run", "not applicable")
    return {o: sum(v.outcome == o for v in verdicts) for o in outcomes}


def failures(made: Examination, accepted: Sequence[str]) -> list[Finding]:
    """Findings that make the machine unwell, but for those that the user accepts by name."""
    return [f for f in made.findings if f.verdict.unwell and f.check.name not in accepted]


def show(made: Examination, probes: Sequence[Probe], accepted: Sequence[str]) -> None:
    """Print versions, a table of collectives, one of probes, and what is unsafe and what to do for each failure."""
    piped = not sys.stdout.isatty()
    console = terminal(
        width=400 if piped else shutil.get_terminal_size().columns, highlight=False, emoji=False
    )
    about = made.about()
    if about:
        console.print(
            f"\nPython {about['python']}, jax {about['jax']}, jaxlib {about['jaxlib']}, numpy {about['numpy']}; "
            f"{about['devices']} {about['device_kind']} devices ({about['platform']}), {about['system']}",
            markup=False,
        )
    _collectives(console, made)
    _probes(console, made, {p.name: p for p in probes}, accepted)
    _advice(console, made, {p.name: p for p in probes}, accepted)
    for note in made.notes:
        console.print(note, markup=False)
    total = counts([f.verdict for f in made.findings])
    said = ", ".join(f"{n} {outcome}" for outcome, n in total.items() if n)
    console.print(
        f"\n{len(made.findings)} checks in {clock(made.seconds)}: {said}", style="bold", markup=False
    )


def _check(f: Finding, catalogue: dict[str, Probe], accepted: Sequence[str]) -> dict[str, Any]:
    probe = catalogue.get(f.check.name)
    return {
        "name": f.check.name,
        "kind": "probe" if f.check.probe else "collective" if f.check.case else "start-up",
        "processes": f.place.processes,
        **f.verdict.to_json(),
        "seconds": f.seconds,
        "accepted": f.verdict.unwell and f.check.name in accepted,
        **({"case": f.check.case} if f.check.case else {}),
        **({"title": probe.title, "reported": probe.reported, "unsafe": probe.unsafe, "do": probe.do} if probe else {}),
    }  # fmt: skip


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        right = column in ("checks", "wrong", "could not run", "seconds")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _collectives(console: Console, made: Examination) -> None:
    for place in dict.fromkeys(f.place for f in made.findings if f.check.case):
        mine = [f for f in made.findings if f.check.case and f.place == place]
        devices = next(about["devices"] for p, about in made.places if p == place)
        mesh = mesh_shape(devices).describe().replace("=", " ")
        title = f"\nCollectives, {devices} devices in {_processes(place)} ({mesh})"
        console.print(title, style="bold", markup=False)
        table = _table("collective", "checks", "wrong", "could not run", "rounding error", "seconds")
        for name in dict.fromkeys(f.check.case["collective"] for f in mine):
            rows = [f for f in mine if f.check.case["collective"] == name]
            n = counts([f.verdict for f in rows])
            rounded = [f.verdict for f in rows if f.check.case["values"] == "normal" and not f.verdict.unwell]
            table.add_row(
                name, str(len(rows)), str(n["wrong"]), str(n["could not run"]),
                _used(worst(rounded)) if rounded else "exact", f"{sum(f.seconds for f in rows):.1f}",
                style="red" if n["wrong"] + n["could not run"] else None,
            )  # fmt: skip
        console.print(table)


def _processes(place: Place) -> str:
    kind = ", gloo" if place.gloo else ""
    return f"{place.processes} processes{kind}" if place.processes > 1 else f"one process{kind}"


def _used(verdict: Verdict) -> str:
    """How much of what rounding explains was used, at the most."""
    return f"{verdict.error:.1e} of {verdict.bound:.1e}" if verdict.bound else "exact"


def _probes(
    console: Console, made: Examination, catalogue: dict[str, Probe], accepted: Sequence[str]
) -> None:
    mine = [f for f in made.findings if f.check.probe]
    if not mine:
        return
    console.print("\nKnown bugs", style="bold")
    table = _table("probe", "verdict", "seconds", "what", "reported")
    for f in mine:
        probe = catalogue[f.check.name]
        outcome = f.verdict.outcome + (" (accepted)" if f.verdict.unwell and probe.name in accepted else "")
        why = f" ({f.verdict.detail})" if f.verdict.outcome == "not applicable" else ""
        style = "red" if f.verdict.unwell else "dim" if f.verdict.outcome == "not applicable" else None
        table.add_row(probe.name, outcome + why, f"{f.seconds:.1f}", probe.title, _issues(probe), style=style)
    console.print(table)


def _issues(probe: Probe) -> str:
    """The issues that a probe names; the JSON document has all that it says."""
    return " ".join(re.findall(r"[\w.-]+/[\w.-]+#\d+", probe.reported)) or "-"


def _advice(
    console: Console, made: Examination, catalogue: dict[str, Probe], accepted: Sequence[str]
) -> None:
    """A paragraph a failure: what was found, what is unsafe, what to do. Cases of one collective are told together."""
    for title, found, unsafe, do in _told(failures(made, accepted), catalogue):
        console.print(f"\n[bold red]{title}[/]")
        console.print(f"found   {found}", markup=False)
        if unsafe:
            console.print(f"unsafe  {unsafe}", markup=False)
        console.print(f"do      {do}", markup=False)


def _told(bad: Sequence[Finding], catalogue: dict[str, Probe]) -> Iterator[tuple[str, str, str, str]]:
    groups: dict[str, list[Finding]] = {}
    for f in bad:
        groups.setdefault(f.check.case.get("collective", f.check.name), []).append(f)
    for name, mine in groups.items():
        first = max(mine, key=lambda f: f.verdict.outcome == "wrong")
        if probe := catalogue.get(name):
            yield f"{name}: {probe.title}", first.verdict.detail, probe.unsafe, probe.do
        elif not first.check.case:
            yield name, first.verdict.detail, "", "Mend the installation of jax; nothing else was checked."
        else:
            over = "; ".join(sorted({" ".join(f.check.case["axes"]) for f in mine}))
            where = " and ".join(dict.fromkeys(_processes(f.place) for f in mine))
            dtypes = ", ".join(sorted({f.check.case["dtype"] for f in mine}))
            found = f"{len(mine)} checks, such as {first.check.name}: {first.verdict.detail}"
            unsafe = f"{name} over {over} of {dtypes}, in {where}. {COLLECTIVE_UNSAFE}"
            yield name, found, unsafe, COLLECTIVE_DO
