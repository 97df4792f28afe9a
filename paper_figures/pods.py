"""Modelled scaling over pods that are not there: tokens a second of each chip, and what limits every point.

Claim: What limits a step changes with the pod and with the split: products on small pods, then the collectives of one
    mesh axis on one network. Each split has a size from which on more chips are mostly waiting.

Records: kind "pod", modelled: one for each mode, split and target, with the seconds that the step waits for each thing.
    A picture for each machine.

Reproduce:
    shardlab sweep configs/plan_scaling.py
    mkdir -p paper_figures/records/pods
    cp "$(ls -d runs/plan_scaling/* | tail -n 1)/records.jsonl" paper_figures/records/pods/plan_scaling.jsonl
    shardlab figures pods
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments.records import MissingRecords, Record, RecordError, column
from paper_figures import style
from paper_figures.style import Label

RECORDS = ("pods/*.jsonl",)
MODES = {
    "strong": "Strong scaling, modelled: one batch on every pod",
    "weak": "Weak scaling, modelled: the same rows a device",
}
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
"""Markers of limits; the first two are of products and memory traffic."""
OWN = ("products", "memory traffic")


@dataclass(frozen=True)
class Point:
    """One pod under one split."""

    devices: int
    rate: float
    """Tokens a second of a device, nothing overlapping."""
    compute: float
    """The same where collectives take no time."""
    ideal: float
    """The same where the products at peak rate are all that takes time."""
    fits: bool
    limit: str


@dataclass(frozen=True)
class Series:
    """One line: a split in one mode, by pod size."""

    mode: str
    split: str
    points: tuple[Point, ...]
    ends: str
    """Why there is no point on the next larger pod; "" where there is none larger."""


def draw(records: list[Record]) -> Mapping[str, Figure]:
    """A figure for each machine, one panel for each mode."""
    pods = [r for r in records if r.kind == "pod"]
    if not pods:
        measured = any(r.kind == "sweep" for r in records)
        more = ' Those of kind "sweep" are measured: the figure scaling draws them.' if measured else ""
        raise MissingRecords(f'These records hold no modelled pod (kind "pod").{more}')
    for record in pods:
        if record.provenance != "modelled":
            raise RecordError(
                f"The record of the pod {record.values.get('target')!r} in run {record.run} says that it is "
                f"{record.provenance}, but this figure is of modelled seconds alone, and says so. Draw what was measured with "
                f"the figure scaling."
            )
    limits = {_limit(r) for r in pods if "limit" in r.values}
    shapes = dict(zip([*OWN, *sorted(limits - set(OWN))], itertools.cycle(SHAPES), strict=False))
    machines: dict[str, list[Record]] = {}
    for record in pods:
        machines.setdefault(str(record.values.get("machine")), []).append(record)
    return {name.replace(":", "-"): _figure(name, each, shapes) for name, each in machines.items()}


def _figure(machine: str, pods: list[Record], shapes: Mapping[str, str]) -> Figure:
    """shapes: limit -> marker, the same on all machines."""
    found = _series(pods)
    modes = [m for m in MODES if any(s.mode == m for s in found)]
    splits = list(dict.fromkeys(s.split for s in found))
    used = {p.limit for s in found for p in s.points}
    rows = [_handle(shapes[limit], _short(limit), full=True) for limit in shapes if limit in used]
    if not all(p.fits for s in found for p in s.points):
        rows.append(_handle("o", "hollow: does not fit the memory", full=False))
    columns = 1 if any(len(str(row.get_label())) > 35 for row in rows) else 2
    tall = 0.16 * (1 + -(-len(rows) // columns))
    figure = Figure(figsize=(style.COLUMN, 0.75 + tall + 1.85 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes) + 1, 1, height_ratios=(*(1.55 for _ in modes), tall))
    style.note(figure, _note(found, pods))
    _legend(panels[-1], rows, columns)
    sizes = sorted({p.devices for s in found for p in s.points})
    panels[-2].set_xlabel(f"devices of {machine}")
    ends = []
    for axes, mode in zip(panels[:-1], modes, strict=True):
        axes.set_title(MODES[mode], loc="left")
        _scales(axes, sizes)
        ends.append(_panel(axes, [s for s in found if s.mode == mode], splits, shapes, sizes[-1]))
    for axes, labels in zip(panels[:-1], ends, strict=True):
        style.label_ends(axes, labels)
    return figure


def _series(pods: list[Record]) -> list[Series]:
    lines: dict[tuple[str, str], list[Record]] = {}
    for record in pods:
        mode = record.values.get("mode")
        if mode not in MODES:
            raise RecordError(
                f"A pod record of run {record.run} has the mode {mode!r}; it is 'strong' or 'weak'."
            )
        lines.setdefault((mode, str(record.values.get("split"))), []).append(record)
    return [found for key, each in lines.items() if (found := _line(*key, each)).points]


def _line(mode: str, split: str, each: list[Record]) -> Series:
    counts = [int(n) for n in column(each, "devices").numbers]
    tokens = column(each, "tokens_per_step").numbers
    share = {t if mode == "strong" else t / n for n, t in zip(counts, tokens, strict=True)}
    if len(set(counts)) < len(counts) or len(share) > 1:
        rule = "one batch on every pod" if mode == "strong" else "a batch in proportion to the devices"
        raise RecordError(
            f"{mode.capitalize()} scaling has one point at each size and {rule}, but the records of the split {split!r} have "
            f"sizes {', '.join(map(str, sorted(counts)))} and {len(share)} batches. They are of several sweeps: give "
            f"--records one of them."
        )
    ordered = [r for _, r in sorted(zip(counts, each, strict=True), key=lambda pair: pair[0])]
    laid = [r for r in ordered if "refused" not in r.values]
    after = [r for r in ordered if r not in laid and laid and _devices(r) > _devices(laid[-1])]
    ends = ""
    if after:
        why = re.split(r"\. | \(", str(after[0].values["refused"]))[0]
        ends = f"beyond {_devices(laid[-1])} devices: {why[:1].lower()}{why[1:]}"
    return Series(mode, split, _points(laid), ends)


def _points(laid: list[Record]) -> tuple[Point, ...]:
    if not laid:
        return ()
    names = ("tokens_per_step", "step_seconds", "compute_seconds", "mfu")
    columns = (column(laid, name).numbers for name in names)
    found = []
    for record, tokens, step, compute, mfu in zip(laid, *columns, strict=True):
        each = tokens / _devices(record)
        fits, bound = record.values.get("fits") is True, each / step / mfu
        found.append(Point(_devices(record), each / step, each / compute, bound, fits, _limit(record)))
    return tuple(found)


def _limit(record: Record) -> str:
    """What takes the most seconds; of a network, whether more of them are latency than bytes."""
    what, parts, latency = (record.values.get(name) for name in ("limit", "parts", "latency"))
    if not isinstance(parts, Mapping) or not isinstance(latency, Mapping) or what not in parts:
        raise RecordError(
            f"The record of the pod {record.values.get('target')!r} in run {record.run} does not say what its step waits for: "
            f"it has limit = {what!r}, parts and latency as `shardlab sweep` of a PlanSweep writes them. Model it anew."
        )
    return f"{what}: latency" if latency.get(what, 0.0) > parts[what] / 2 else str(what)


def _devices(record: Record) -> int:
    return int(record.values["devices"])


def _scales(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] * 0.84, sizes[-1] * 1.19)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _size(round(x))))


def _size(devices: int) -> str:
    return f"{devices // 1024}k" if devices % 1024 == 0 else str(devices)


def _panel(
    axes: Axes, found: list[Series], splits: list[str], shapes: Mapping[str, str], largest: int
) -> list[Label]:
    """Tokens a second of a device against devices; what no split can pass is grey. Returns the lines' labels."""
    points = [p for s in found for p in s.points]
    sizes = sorted({p.devices for p in points})
    ends = []
    for text, most, dash in (
        ("products alone", lambda p: p.ideal, (0, (4, 2))),
        ("no collectives", lambda p: p.compute, (0, (1, 1.5))),
    ):
        line = [max(most(p) for p in points if p.devices == n) for n in sizes]
        axes.plot(sizes, line, color=style.GREY, linestyle=dash, lw=0.8, zorder=1)
        ends.append(Label(line[-1], text, style.GREY))
    ideal = max(p.ideal for p in points)
    for series in found:
        index = splits.index(series.split)
        colour, last = style.colour(index), series.points[-1]
        x, y = [p.devices for p in series.points], [p.rate for p in series.points]
        axes.plot(x, y, color=colour, linestyle=style.DASHES[index % len(style.DASHES)], lw=1.0, zorder=2)
        for point in series.points:
            axes.plot(
                [point.devices], [point.rate], marker=shapes[point.limit], color=colour, markersize=4.2,
                markerfacecolor=colour if point.fits else "white", markeredgewidth=0.8, zorder=3,
            )  # fmt: skip
        where = f" at {_size(last.devices)}" if last.devices < largest else ""
        ends.append(Label(last.rate, f"{series.split}: {last.rate / ideal:.0%}{where}", colour))
    axes.set_ylim(0, 1.06 * ideal)
    axes.set_ylabel("tokens/s of a device")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: style.counted(y)))
    return ends


def _legend(axes: Axes, rows: list[Line2D], columns: int) -> None:
    """Which shape stands for what, below the panels."""
    axes.axis("off")
    legend = axes.legend(
        handles=rows, loc="upper left", bbox_to_anchor=(-0.22, 1.0), ncols=columns, frameon=False,
        fontsize=style.SMALL, title="What a step spends most time on", title_fontsize=style.SMALL,
        alignment="left", handletextpad=0.1, columnspacing=0.8, borderpad=0, borderaxespad=0, labelspacing=0.3,
    )  # fmt: skip
    legend.set_in_layout(False)


def _short(limit: str) -> str:
    """`fsdp, network between hosts`."""
    return limit.replace(", the ", ", ").replace("network between", "between")


def _handle(shape: str, text: str, full: bool) -> Line2D:
    face = style.INK if full else "white"
    return Line2D(
        [], [], linestyle="none", marker=shape, color=style.INK, markerfacecolor=face, markersize=4.2,
        markeredgewidth=0.8, label=text,
    )  # fmt: skip


def _note(found: Iterable[Series], pods: list[Record]) -> str:
    text = (
        "Modelled from a trace and published peak rates, with collectives hidden behind nothing: no pod was there, "
        "nothing was compiled or run. Percentages are of products alone: the bound on MFU."
    )
    missing = sorted({str(m) for r in pods for m in r.values.get("missing", ())})
    ended: dict[str, list[str]] = {}
    for series in found:
        if series.ends and series.split not in (named := ended.setdefault(series.ends, [])):
            named.append(series.split)
    ends = (f"{' and '.join(f'{n!r}' for n in names)} {why}." for why, names in ended.items())
    return "\n".join((text, *(f"Without a public figure: {m}." for m in missing), *ends))
