"""Explanations as tables for a terminal; plain text when piped."""

from __future__ import annotations

import shutil
import sys

from experiments.explanation import Explanation, Line


def human(n: float, unit: str = "B", base: int = 1024) -> str:
    """A number with a prefix: 3.1 MiB for bytes, 3.28 M for counts (base 1000)."""
    prefixes = ["", "Ki", "Mi", "Gi", "Ti"] if base == 1024 else ["", "k", "M", "G", "T", "P"]
    at = 0
    while n >= base and at < len(prefixes) - 1:
        n, at = n / base, at + 1
    digits = f"{n:.0f}" if at == 0 and n == int(n) else f"{n:.3g}" if n < 100 else f"{n:.0f}"
    return f"{digits} {prefixes[at]}{unit}".rstrip()


def print_explanation(told: Explanation, full: bool = True) -> None:
    """Print an explanation; without `full` parameters and traffic only, as a training run shows at its start."""
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width: give every column what it needs, so that `| grep` finds whole lines.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 250
    console = Console(width=width, highlight=False, soft_wrap=False)
    mesh = " x ".join(f"{a} {n}" for a, n in told.mesh.items()) or "one device"
    console.print(
        f"[bold]{told.name}[/]: {human(told.parameters, '', 1000)} parameters on {told.devices} devices ({mesh})\n"
        f"rules {told.rules}, partitioner {told.partitioner}"
    )
    kinds = ("parameter", "optimizer", "batch", "activation") if full else ("parameter",)
    for kind in kinds:
        lines = [line for line in told.lines if line.kind == kind]
        total = "" if kind == "activation" else f", {human(told.bytes_at_rest(kind))} per device"
        table = Table(
            title=f"{_TITLES[kind]}{total}",
            title_justify="left",
            box=None,
            pad_edge=False,
            header_style="dim",
        )
        for column in ("array", "shape", "layout", "per device", "placed by", *(("",) if full else ())):
            table.add_column(column, overflow="fold", justify="right" if column == "per device" else "left")
        for line in lines:
            table.add_row(*_cells(line, full))
        console.print(table)
        console.print()
    whole = [x.path for x in told.lines if x.kind == "parameter" and "/" not in x.layout]
    if whole:
        console.print(f"{len(whole)} parameters stay whole on every device: {', '.join(whole)}")
    _traffic(console, told)


_TITLES = {
    "parameter": "Parameters at rest",
    "optimizer": "Optimizer state",
    "batch": "Batch",
    "activation": "Activations, as the named ops produce them (one layer shown once)",
}


def _cells(line: Line, full: bool) -> list[str]:
    where = "; ".join(line.placed) if full else "; ".join(p.split(" (")[0] for p in line.placed)
    name = f"{line.path}  {line.source}" if line.source else line.path
    cells = [
        name,
        f"{'x'.join(map(str, line.shape))} {line.dtype}",
        line.layout,
        human(line.bytes_per_device),
        where,
    ]
    return [*cells, "; ".join(line.notes)] if full else cells


def _traffic(console, told: Explanation) -> None:
    if not told.collectives:
        if told.mesh and "Auto" in told.partitioner:
            console.print(
                "XLA's partitioner decides the collectives when it compiles: none can be listed before."
            )
        return
    from rich.table import Table

    table = Table(
        title="Collectives of one step, from the trace",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for column in ("over", "kind", "times", "each device sends"):
        table.add_column(column, justify="right" if column in ("times", "each device sends") else "left")
    for c in told.collectives:
        table.add_row(" x ".join(c["axes"]), c["kind"], str(c["per_step"]), human(c["bytes_sent_per_device"]))
    console.print(table)
