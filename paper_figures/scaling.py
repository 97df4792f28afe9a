"""Strong and weak scaling over device counts: throughput on the left, efficiency on the right.

Claim: Split over more devices, training keeps the throughput that the hardware offers. Pretend devices share the
    cores of one machine, so there the hardware offers the same at every count, and the picture shows what splitting
    costs.

Records: kind "sweep", measured: one for each mode, split and device count, with the step times of several rounds.

Reproduce:
    shardlab sweep configs/scaling_quick.py
    mkdir -p paper_figures/records/scaling
    cp "$(ls -d runs/scaling_quick/* | tail -n 1)/records.jsonl" paper_figures/records/scaling/scaling_quick.jsonl
    shardlab figures scaling
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from experiments.records import MissingRecords, Record, RecordError, column
from paper_figures import style
from paper_figures.style import Label

RECORDS = ("scaling/*.jsonl",)
MODES = {
    "strong": "Strong scaling: one batch, split further",
    "weak": "Weak scaling: the batch grows with the devices",
}


@dataclass(frozen=True)
class Point:
    """One device count of one split: tokens, or what the records count, a second of each round and a step."""

    devices: int
    cores: int
    tokens_per_step: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """One line: a way of splitting in one mode, with its points by device count and the rate that counts as
    1.
    """

    mode: str
    label: str
    shared_cores: bool
    points: tuple[Point, ...]
    base_devices: int
    base_rate: float
    """Median tokens, or what the records count, a second at ``base_devices``."""

    def ideal(self, point: Point) -> float:
        """Speed-up over ``base_devices`` that the hardware allows: by cores where devices share them, else by
        devices.
        """
        if self.shared_cores:
            return point.cores / self.points[0].cores
        return point.devices / self.base_devices


def draw(records: list[Record]) -> Figure:
    """One row for each mode found; medians as points, the range over the rounds as bars."""
    found = _series(records)
    shared = {s.shared_cores for s in found}
    if len(shared) > 1:
        raise RecordError(
            "These sweep records mix pretend devices (platform cpu) with real ones. Their ideals differ, "
            "so each has a "
            "figure of its own: give --records one of them at a time."
        )
    modes = [m for m in MODES if any(s.mode == m for s in found)]
    unit = _unit(records)
    figure = Figure(figsize=(style.PAGE, 0.45 + 2.05 * len(modes)), layout="constrained")
    grid = figure.subplots(len(modes), 2, squeeze=False)
    style.note(
        figure, _note(found, shared == {True}, next(r.provenance for r in records if r.kind == "sweep"))
    )
    splits = list(dict.fromkeys(s.label for s in found))
    for (left, right), mode in zip(grid, modes, strict=True):
        _panels(left, right, [s for s in found if s.mode == mode], splits, unit)
        left.set_title(MODES[mode], loc="left")
        right.set_title("Efficiency: measured over ideal", loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("pretend devices" if shared == {True} else "devices")
    return figure


def _unit(records: list[Record]) -> str:
    """What the sweeps' steps are counted in; a record without the word means tokens."""
    units = {str(r.values.get("unit", "tokens")) for r in records if r.kind == "sweep"}
    if len(units) > 1:
        raise RecordError(
            f"These sweep records count {' and '.join(sorted(units))}, whose rates have no common axis: give --records one of "
            f"them at a time."
        )
    return units.pop()


def _series(records: list[Record]) -> list[Series]:
    sweeps = [r for r in records if r.kind == "sweep"]
    if not sweeps:
        raise MissingRecords('These records hold no point of a sweep (kind "sweep").')
    if (told := column(sweeps, "devices").provenance) != "measured":  # one picture, one provenance
        raise RecordError(
            f"These sweep records are {told}, but this figure is of step times that were measured. Modelled pods are drawn by "
            f"the figure pods."
        )
    kinds, configs = {r.device["kind"] for r in sweeps}, {r.config_hash for r in sweeps}
    groups: dict[tuple[str, str, bool], list[Record]] = {}
    for record in sweeps:
        mode = record.values.get("mode")
        if mode not in MODES:
            raise RecordError(
                f"A sweep record of run {record.run} has the mode {mode!r}; it is 'strong' or 'weak'."
            )
        label = str(record.values.get("split"))
        label += f", {record.details.get('name', record.run)}" if len(configs) > 1 else ""
        label += f", {record.device['kind']}" if len(kinds) > 1 else ""
        groups.setdefault((mode, label, record.device["platform"] == "cpu"), []).append(record)
    lines = {key: _points(group, key) for key, group in groups.items()}
    return [_based(key, points, lines) for key, points in lines.items()]


def _points(records: list[Record], key: tuple[str, str, bool]) -> tuple[Point, ...]:
    """Points by device count; rounds of repeated records are pooled. Checks that the batch is what the mode
    says.
    """
    counts = [int(n) for n in column(records, "devices").numbers]
    tokens = [int(n) for n in column(records, "tokens_per_step").numbers]
    cores = [int(n) for n in column(records, "cores").numbers]
    rates: dict[tuple[int, int, int], list[float]] = {}
    for record, *where in zip(records, counts, cores, tokens, strict=True):
        seconds = record.values.get("step_seconds")
        if (
            not isinstance(seconds, list)
            or not seconds
            or not all(s > 0 and math.isfinite(s) for s in seconds)
        ):
            raise RecordError(
                f"The sweep record of {record.values.get('split')} on {where[0]} devices (run {record.run}) "
                "has step_seconds "
                f"{seconds!r}; it is a list with the median step time of each round, in seconds above 0."
            )
        rates.setdefault((where[0], where[1], where[2]), []).extend(where[2] / s for s in seconds)
    points = tuple(Point(d, c, t, tuple(r)) for (d, c, t), r in sorted(rates.items()))
    per_device = {p.tokens_per_step if key[0] == "strong" else p.tokens_per_step / p.devices for p in points}
    if len(per_device) > 1 or len({p.devices for p in points}) < len(points):
        sizes = ", ".join(
            f"{p.tokens_per_step} {_unit(records)} on {p.devices} devices with {p.cores} cores"
            for p in points
        )
        rule = (
            "one batch at every device count"
            if key[0] == "strong"
            else "a batch in proportion to the devices"
        )
        raise RecordError(
            f"{key[0].capitalize()} scaling means {rule}, but the records of the split {key[1]!r} hold "
            f"{sizes}. They are of "
            "several sweeps: give --records one of them."
        )
    return points


def _based(
    key: tuple[str, str, bool],
    points: tuple[Point, ...],
    lines: dict[tuple[str, str, bool], tuple[Point, ...]],
) -> Series:
    """The rate that counts as 1: at the split's fewest devices, or on one device by another split if it lacks
    that.

    One device knows no split, so a sweep may measure it once for all.
    """
    first = points[0]
    if first.devices > 1:
        alike = [
            p for (m, _, s), ps in lines.items() if (m, s) == (key[0], key[2]) for p in ps if p.devices == 1
        ]
        share = [
            p
            for p in alike
            if key[0] == "strong" or p.tokens_per_step * first.devices == first.tokens_per_step
        ]
        share = [p for p in share if key[0] == "weak" or p.tokens_per_step == first.tokens_per_step]
        if share:
            first = share[0]
            points = (first, *points)
    return Series(*key[:2], key[2], points, first.devices, statistics.median(first.rates))


def _panels(left: Axes, right: Axes, found: list[Series], splits: list[str], unit: str) -> None:
    """Left: `unit` (tokens) a second where devices share cores, speed-up where each brings its own; right: efficiency."""
    shared = found[0].shared_cores
    for axes in (left, right):
        _scales(axes, sorted({p.devices for s in found for p in s.points}))
    ends: dict[Axes, list[Label]] = {left: [], right: []}
    for place, series in enumerate(found):
        index = splits.index(series.label)
        aside = 2 ** (0.06 * (place - (len(found) - 1) / 2))  # side by side, so that bars do not hide bars
        rates = [list(p.rates) for p in series.points]
        speedups = [[r / series.base_rate for r in rs] for rs in rates]
        efficiency = [
            [r / series.ideal(p) for r in rs] for p, rs in zip(series.points, speedups, strict=True)
        ]
        for axes, columns in ((left, rates if shared else speedups), (right, efficiency)):
            last = _line(axes, [p.devices * aside for p in series.points], columns, index)
            text = f"{last:.0%}" if axes is right else style.counted(last) if shared else f"{last:.3g}×"
            ends[axes].append(Label(last, f"{series.label} {text}", style.colour(index)))
    rate = statistics.median(s.base_rate for s in found)
    widest = max(found, key=lambda s: s.points[-1].devices)
    for axes, line in (
        (left, [widest.ideal(p) * (rate if shared else 1) for p in widest.points]),
        (right, [1.0 for _ in widest.points]),
    ):
        axes.plot(
            [p.devices for p in widest.points],
            line,
            color=style.GREY,
            linestyle=(0, (4, 2)),
            lw=0.8,
            zorder=1,
        )
        ends[axes].append(Label(line[-1], "ideal", style.GREY))
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set_ylim(0, max(1.08, right.get_ylim()[1]))
    if shared:
        left.set_ylabel(f"{unit}/s")
        left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: style.counted(y)))
        left.set_ylim(0, max(1.08 * rate, left.get_ylim()[1]))
    else:
        left.set_ylabel(
            f"speed-up over {_plural(found[0].base_devices)}\n(1 = {style.counted(rate)} {unit}/s)"
        )
        left.set_yscale("log", base=2)
        left.yaxis.set_major_locator(FixedLocator([2**k for k in range(-3, 21)]))
        left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        left.yaxis.set_minor_locator(NullLocator())
    for axes, labels in ends.items():
        style.label_ends(axes, labels)


def _line(axes: Axes, x: list[float], columns: list[list[float]], index: int) -> float:
    """Medians joined by a line, with bars from the least to the greatest; returns the last median."""
    middle = [statistics.median(c) for c in columns]
    below = [m - min(c) for m, c in zip(middle, columns, strict=True)]
    above = [max(c) - m for m, c in zip(middle, columns, strict=True)]
    axes.errorbar(
        x, middle, [below, above], color=style.colour(index), linestyle=style.dash(index), marker=style.marker(index),
        elinewidth=0.8, capsize=1.8, capthick=0.8, markeredgecolor="white", markeredgewidth=0.4,
    )  # fmt: skip
    return middle[-1]


def _scales(axes: Axes, counts: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(counts[0] * 0.86, counts[-1] * 1.14)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))


def _plural(devices: int) -> str:
    return "1 device" if devices == 1 else f"{devices} devices"


def _note(found: list[Series], shared: bool, provenance: str) -> str:
    rounds = sorted({len(p.rates) for s in found for p in s.points})
    span = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    text = f"{provenance.capitalize()}. Points: median of {span} rounds; bars: fastest and slowest round."
    cores = sorted({p.cores for s in found for p in s.points})
    if shared and len(cores) == 1:
        text += (
            f"\nPretend devices: at every count they share the same {cores[0]} CPU cores, so the ideal is a "
            "flat line, not a "
            "slope, and what falls below it is the cost of splitting."
        )
    return text
