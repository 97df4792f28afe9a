"""Explanations as tables for a terminal of 120 columns; with every rule's file and line in each row when piped."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from typing import TYPE_CHECKING

from experiments.explanation import Explanation, Line
from experiments.progress import terminal
from sharding.finding import human

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED = 400
"""Columns when nobody's window limits them: every row stays one line, so that `| grep` finds whole lines."""


def print_explanation(told: Explanation, full: bool = True) -> None:
    """Print an explanation; without `full` what a run shows at its start: rules, parameters and traffic."""
    piped = not sys.stdout.isatty()
    width = PIPED if piped else shutil.get_terminal_size().columns
    console = terminal(width=width, highlight=False, soft_wrap=False, emoji=False)
    _head(console, told)
    marks = {rule: _mark(i) for i, rule in enumerate(told.chain)}
    _parameters(console, told, marks, piped)
    if full:
        _like_parameters(console, told, marks, piped)
        _arrays(console, f"Batch: {_held(told, 'batch')}", told.of("batch"), marks, piped)
        if made := told.of("activation"):
            _arrays(console, "Activations, as the named ops make them (a layer's once)", made, marks, piped)
        else:
            console.print("[bold]Activations[/]: the model calls no named op, so XLA lays them out\n")
        if made := told.of("inside"):
            _arrays(console, "Inside attention, which no op returns (a layer's once)", made, marks, piped)
    _left(console, told, ("parameter", "batch", "activation") if full else ("parameter",))
    _traffic(console, told)
    if full:
        _sources(console, told, piped)
        _findings(console, told)


def _head(console: Console, told: Explanation) -> None:
    mesh = " x ".join(f"{a} {n}" for a, n in told.mesh.items()) or "one device"
    count = f"{human(told.parameters, '', 1000)} parameters on {told.devices} devices"
    console.print(f"[bold]{told.name}[/]: {count} ({mesh})")
    width = max((len(call) for call, _ in told.chain), default=0)
    for at, (call, source) in enumerate(told.chain):
        console.print(f"{'rules' if at == 0 else '':<12}{_mark(at)} {call:<{width}}  {source}", markup=False)
    console.print(f"{'partitioner':<12}{told.partitioner}", markup=False)
    if told.pipeline:
        console.print(f"{'pipeline':<12}{told.pipeline}", markup=False)
    parts = [
        f"{what} {_held(told, kind)}"
        for kind, what in (
            ("parameter", "parameters"),
            ("gradient", "gradients"),
            ("optimizer", "optimizer state"),
        )
    ]
    console.print(f"{'per device':<12}{', '.join(parts)}\n", markup=False)


def _held(told: Explanation, kind: str) -> str:
    away = sum(line.bytes_per_device for line in told.of(kind) if line.memory == "host")
    here = human(told.bytes_per_device[kind])
    return (
        f"{human(away)} of the host's memory"
        if away and not told.bytes_per_device[kind]
        else (f"{here} and {human(away)} of the host's memory" if away else here)
    )


def _mark(at: int) -> str:
    """The sign of the rule at this place in the chain: ¹ for the first."""
    return "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(at + 1))


def _lies(line: Line, marks: dict[tuple[str, str], str]) -> str:
    """`embed/fsdp² mlp/tensor³`: each axis with the sign of the rule that chose it."""
    by = {(p.name, p.axis): marks.get((p.rule, p.source), "") for p in line.placed}
    dims = zip(line.names, line.dims, strict=True)
    return " ".join(name + "".join(f"/{a}{by.get((name, a), '')}" for a in axes) for name, axes in dims)


def _placed(line: Line) -> str:
    """Every placement with its rule's file and line, or why there is none; then what rules left out."""
    split = {(name, axis) for name, axes in zip(line.names, line.dims, strict=True) for axis in axes}
    placed = [f"{p.name}/{p.axis} by {p.rule} {p.source}" for p in line.placed if (p.name, p.axis) in split]
    return "; ".join([*placed, *((f"whole: {line.whole}",) if line.whole else ()), *line.notes])


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
    )
    right = ("per device", "times", "each device sends")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _parameters(console: Console, told: Explanation, marks: dict[tuple[str, str], str], piped: bool) -> None:
    title = f"Parameters at rest: {_held(told, 'parameter')} per device"
    gathers = any(line.in_use for line in told.of("parameter"))
    columns = ["array", "shape", "layout", "per device", *(["gathered for use"] if gathers else [])]
    table = _table(title, *columns, *(["placed by"] if piped else []))
    for line in told.of("parameter"):
        cells = [
            line.path,
            _shape(line),
            _lies(line, marks),
            human(line.bytes_per_device),
            *(["/".join(line.gathered)] if gathers else []),
        ]
        table.add_row(*cells, *([_placed(line)] if piped else []))
    console.print(table)
    console.print()


def _like_parameters(
    console: Console, told: Explanation, marks: dict[tuple[str, str], str], piped: bool
) -> None:
    """Gradients and optimizer state: a sentence where they lie as the parameters do, else their own table."""
    rest = {line.path: line.dims for line in told.of("parameter")}
    for kind, what in (("gradient", "Gradients"), ("optimizer", "Optimizer state")):
        lines = told.of(kind)
        held = f"{_held(told, kind)} per device"
        if not lines:
            console.print(f"[bold]{what}[/]: none\n")
        elif all(line.dims == rest[line.path] for line in lines):
            held_by = Counter({line.path: 0 for line in lines})
            for line in lines:
                held_by[line.path] += line.copies
            copies = sorted(set(held_by.values()))
            each = " to ".join(map(str, dict.fromkeys((copies[0], copies[-1]))))
            console.print(
                f"[bold]{what}[/]: {held}, {each} for each parameter, laid out as the parameter at rest\n"
            )
        else:
            _arrays(console, f"{what}: {held}", lines, marks, piped)


def _arrays(
    console: Console, title: str, lines: tuple[Line, ...], marks: dict[tuple[str, str], str], piped: bool
) -> None:
    table = _table(
        title, "made by" if lines[0].source else "array", "shape", "layout", "per device",
        *(["placed by"] if piped else []),
    )  # fmt: skip
    for line in lines:
        source = (
            line.source if piped else line.source.rpartition("/")[2]
        )  # two directories less fit in a window
        name = f"{source} {line.path}" if source else line.path
        cells = (name, _shape(line), _lies(line, marks), human(line.bytes_per_device))
        table.add_row(*cells, *([_placed(line)] if piped else []))
    console.print(table)
    console.print()


def _shape(line: Line) -> str:
    copies = f"{line.copies} x " if line.copies > 1 else ""
    return f"{copies}{'x'.join(map(str, line.shape))} {_SHORT.get(line.dtype, line.dtype)}"


_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int32": "i32"}


def _left(console: Console, told: Explanation, kinds: tuple[str, ...]) -> None:
    """What stays whole and what a rule left out, each reason once with the arrays that it holds for."""
    why: dict[str, list[str]] = {}
    for line in (line for kind in kinds for line in told.of(kind)):
        for reason in (*((f"whole on every device, {line.whole}",) if line.whole else ()), *line.notes):
            why.setdefault(reason, []).append(f"{line.path} ({line.source})" if line.source else line.path)
    if not why:
        return
    console.print("[bold]Not split[/]")
    for reason, paths in why.items():
        console.print(f"{reason}: {', '.join(dict.fromkeys(paths))}", markup=False)
    console.print()


def _traffic(console: Console, told: Explanation) -> None:
    if not told.collectives:
        if told.mesh and "Auto" in told.partitioner:
            console.print(
                "XLA's partitioner decides the collectives when it compiles: none can be listed before."
            )
        return
    table = _table("Collectives of one step, from the trace", "over", "kind", "times", "each device sends")
    for c in told.collectives:
        table.add_row(" x ".join(c["axes"]), c["kind"], str(c["per_step"]), human(c["bytes_sent_per_device"]))
    console.print(table)
    console.print()


MOST = 10
"""Lines of model code whose collectives a terminal shows; the rest is one row, and all are in the JSON."""


def _sources(console: Console, told: Explanation, piped: bool) -> None:
    """Which line of the model, or of the step, each collective is for, the most bytes first."""
    if not told.sources:
        return
    table = _table("What they are for", "asked for by", "over", "kind", "times", "each device sends",
                   *(["axis used by"] if piped else []))  # fmt: skip
    for c in told.sources if piped else told.sources[:MOST]:
        source = c["source"] if piped else c["source"].rpartition("/")[2]
        cells = (" x ".join(c["axes"]), c["kind"], str(c["per_step"]), human(c["bytes_sent_per_device"]))
        table.add_row(f"{source} {c['op']}", *cells, *([", ".join(c["rules"])] if piped else []))
    left = () if piped else told.sources[MOST:]
    if left:
        times, sent = (sum(c[k] for c in left) for k in ("per_step", "bytes_sent_per_device"))
        table.add_row(f"{len(left)} more (--json lists all)", "", "", str(times), human(sent))
    console.print(table)
    console.print()


def _findings(console: Console, told: Explanation) -> None:
    """What the split wastes."""
    if not told.findings:
        return
    console.print(f"[bold]Findings: {len(told.findings)}[/]")
    from rich.padding import Padding
    from rich.text import Text

    for finding in told.findings:
        console.print(f"[{'red' if finding.severity == 'error' else 'yellow'}]{finding.kind}[/]")
        console.print(Padding(Text(finding.says), (0, 0, 0, 2)))
        console.print(Padding(Text(finding.change, style="green"), (0, 0, 0, 2)))
    console.print()
