"""Loss against tokens for every run given, with held-out points and two compressors to compare with.

Claim: A model trained by shardlab predicts held-out text far better than byte frequencies (unigram) do, and the
    curve runs on through every kill and resumption.

Records: kinds "step" and "eval" of each run, measured; ``details["evaluated"]`` of its header, which
    is of the very text that the held-out points are of, for the two grey lines.

Reproduce:
    shardlab train configs/quickstart.py
    cp runs/quickstart/*/records.jsonl paper_figures/records/loss_curves/quickstart.jsonl
    shardlab figures loss_curves
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.records import Header, MissingRecords, Record, RecordError, column
from paper_figures import style
from paper_figures.style import Label

RECORDS = ("loss_curves/*.jsonl",)
REFERENCES = (("unigram_bits_per_byte", "unigram"), ("xz_bits_per_byte", "xz"))
MANY = 160
"""Above so many points a curve is drawn twice: faintly as measured, and as the median of neighbours."""


@dataclass(frozen=True)
class Text:
    """A held-out text that a run was evaluated on; losses in nats per token (or per example), in the order of steps."""

    known: Mapping[str, Any]
    """What its header knows of it without a model."""
    steps: list[int]
    loss: list[float]
    bits_per_byte: float | None
    """Bits per byte for one nat per token; None where the records do not say how many bytes a token has."""


@dataclass(frozen=True)
class Run:
    """One run's curves in the order of steps; losses in nats per token (or per example), tokens cumulative."""

    header: Header
    steps: list[int]
    loss: list[float]
    tokens: list[float] | None
    texts: list[Text]
    """Most runs have one. A run that was resumed with other rows to evaluate has several, the last of which it ended with."""
    resumed: list[int]

    @property
    def bits_per_byte(self) -> float | None:
        """What turns the training loss into bits per byte: as of the text that the run ended with."""
        return self.texts[-1].bits_per_byte if all(t.bits_per_byte is not None for t in self.texts) else None

    def tokens_at(self, step: int) -> float:
        """Tokens seen after ``step``; batches are of one size, so a step between two records is interpolated."""
        assert self.tokens is not None
        known = sorted(zip(self.steps, self.tokens, strict=True))
        after = next((k for k in known if k[0] >= step), known[-1])
        before = max((k for k in known if k[0] < step), default=(0, 0.0))
        if after[0] == before[0] or after[0] < step:
            return after[1] * step / max(after[0], 1)
        return before[1] + (after[1] - before[1]) * (step - before[0]) / (after[0] - before[0])


def draw(records: list[Record]) -> Figure:
    """Loss of each run: a line for training, rings for held-out data. Bits per byte where every run can say
    so.
    """
    runs = _runs(records)
    in_bits = all(run.bits_per_byte is not None for run in runs)
    in_tokens = all(run.tokens is not None for run in runs)
    figure = Figure(figsize=(style.COLUMN, 2.5), layout="constrained")
    axes = figure.add_subplot()
    names = _names([run.header for run in runs])
    labels: list[Label] = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        labels += _curve(axes, run, name, index, in_bits, in_tokens, alone=len(runs) == 1)
    references = _references(runs, names) if in_bits else []
    for line in references:
        axes.axhline(line.y, color=line.colour, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
    axes.set_title("Loss (bits per byte)" if in_bits else f"Loss (nats per {_unit(runs)})", loc="left")
    axes.set_xlabel("tokens seen in training" if in_tokens else "optimizer steps")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: style.counted(x)))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlim(left=0)
    low, high = axes.get_ylim()
    axes.set_ylim(0 if low < 0.3 * high else low, high)
    style.note(figure, _note(runs, next(r.provenance for r in records if r.kind == "step")))
    style.label_ends(axes, labels + references)
    return figure


def _runs(records: list[Record]) -> list[Run]:
    steps = [r for r in records if r.kind == "step" and r.step is not None]
    if not steps:
        raise MissingRecords('These records hold no training step (kind "step").')
    column(steps, "loss")  # every curve of the picture is of one provenance
    return [_run(records, run) for run in dict.fromkeys(r.run for r in steps)]


def _run(records: list[Record], name: str) -> Run:
    mine = sorted((r for r in records if r.run == name and r.step is not None), key=lambda r: r.step or 0)
    steps, evals = ([r for r in mine if r.kind == kind] for kind in ("step", "eval"))
    if evals and evals[0].provenance != steps[0].provenance:
        column(steps + evals, "loss")  # raises: one picture, one provenance
    tokens = column(steps, "tokens").numbers if all("tokens" in r.values for r in steps) else None
    return Run(
        header=steps[-1].header,
        steps=[r.step or 0 for r in steps],
        loss=column(steps, "loss").numbers,
        tokens=tokens,
        texts=_texts(evals, steps[-1].header),
        resumed=sorted({r.header.resumed_step for r in mine if r.header.resumed_step is not None}),
    )


def _texts(evals: list[Record], last: Header) -> list[Text]:
    """The evaluations of a run apart by the text that they are of; without any, the text that they would be of."""
    known: list[Mapping[str, Any]] = []
    for header in (*(r.header for r in evals), *(() if evals else (last,))):
        if (facts := header.details.get("evaluated", {})) not in known:
            known.append(facts)
    texts = []
    for facts in known:
        mine = [r for r in evals if r.header.details.get("evaluated", {}) == facts]
        loss = column(mine, "loss").numbers if mine else []
        texts.append(Text(facts, [r.step or 0 for r in mine], loss, _bits_per_byte(mine, facts)))
    return sorted(texts, key=lambda text: text.steps[-1:])


def _bits_per_byte(evals: list[Record], known: Mapping[str, Any]) -> float | None:
    """What one nat per token is in bits per byte: as the evaluations of a text say, else from its bytes per token."""
    for record in evals:
        loss, bits = record.values.get("loss"), record.values.get("bits_per_byte")
        if bits is not None and loss and math.isfinite(loss) and math.isfinite(bits):
            return bits / loss
    size = known.get("bytes_per_token")
    return None if size is None else 1 / math.log(2) / size


def _curve(
    axes: Axes, run: Run, name: str, index: int, in_bits: bool, in_tokens: bool, alone: bool
) -> list[Label]:
    """Draws one run and returns the labels for its end."""
    scale = run.bits_per_byte if in_bits and run.bits_per_byte is not None else 1.0
    x = run.tokens if in_tokens and run.tokens is not None else [float(s) for s in run.steps]
    y = [v * scale for v in run.loss]
    colour, dash = style.colour(index), style.dash(index)
    finite = [i for i, v in enumerate(y) if math.isfinite(v)]
    if not finite:
        raise RecordError(
            f"No training loss of run {run.header.run} is finite, so there is no curve to draw."
        )
    if len(y) > MANY:
        axes.plot(x, y, color=colour, linewidth=0.5, alpha=0.3)
        axes.plot(x, _median_of_neighbours(y, len(y) // 40), color=colour, linestyle=dash)
    else:
        axes.plot(x, y, color=colour, linestyle=dash)
    place = run.tokens_at if in_tokens else float
    sparse = sum(len(text.steps) for text in run.texts) <= 24
    points: list[tuple[float, float]] = []
    for text in run.texts:
        scale = text.bits_per_byte if in_bits and text.bits_per_byte is not None else 1.0
        points = [
            (place(s), v * scale) for s, v in zip(text.steps, text.loss, strict=True) if math.isfinite(v)
        ]
        if points:  # a line that is not clipped and has no point has its box at (0, 0) and squashes the axes
            axes.plot(
                *zip(*points, strict=True), marker=style.marker(index), linestyle="none",
                markerfacecolor="white" if text is run.texts[-1] else colour, markeredgecolor=colour,
                markeredgewidth=1.0 if sparse else 0.6, markersize=3.6 if sparse else 2.0, zorder=3, clip_on=False,
            )  # fmt: skip
    for step in run.resumed:
        axes.axvline(place(step), color=style.PALE, linewidth=0.8, zorder=0)
    broken = next((i for i, v in enumerate(y) if not math.isfinite(v)), None)
    last = y[finite[-1]]
    if broken is not None:
        axes.plot(
            x[finite[-1]], last, marker="X", color=colour, markeredgecolor="white", markersize=7, zorder=4
        )
        return [Label(last, f"{name}\nnot finite at {run.steps[broken]}", colour)]
    if not alone:
        return [Label(last, name, colour)]
    return [
        Label(last, f"training {last:.2f}", colour),
        *(Label(v, f"held-out {v:.2f}", colour) for _, v in points[-1:]),
    ]


def _references(runs: list[Run], names: list[str]) -> list[Label]:
    """One grey line for each compressor and evaluated text; its corpus is named where the runs have several, the runs
    that it is of where they have several values of one corpus, and the step to which a run was evaluated on it where that
    was not the end.
    """
    corpora = [run.header.details.get("data", {}).get("name", "") for run in runs]
    owners: dict[tuple[str, str, str, float], list[str]] = {}  # compressor, corpus, until when, value -> runs
    for run, corpus, owner in zip(runs, corpora, names, strict=True):
        for text in run.texts:
            until = "" if text is run.texts[-1] else f"to step {text.steps[-1]}"
            for key, name in REFERENCES:
                if key in text.known:
                    owners.setdefault((name, corpus, until, float(text.known[key])), []).append(owner)
    values = Counter((name, corpus) for name, corpus, _, _ in owners)
    labels = []
    for (name, corpus, until, value), mine in owners.items():
        several = len(runs) > 1 and values[name, corpus] > 1
        who = mine[0] + (f" and {len(mine) - 1} more" if mine[1:] else "") if several else ""
        of = [text for text in (corpus if len(set(corpora)) > 1 else "", who, until) if text]
        labels.append(Label(value, f"{name} {value:.2f}" + (f" ({', '.join(of)})" if of else ""), style.GREY))
    return labels


def _names(headers: list[Header]) -> list[str]:
    """The shortest texts that tell the runs apart: the config's name, then its mesh, then its seed, then the
    run's id.
    """
    parts = [
        [str(h.details.get("name", h.run)) for h in headers],
        [
            " × ".join(f"{axis} {size}" for axis, size in h.mesh.items() if size > 1) or "1 device"
            for h in headers
        ],
        [f"seed {h.seed}" for h in headers],
        [h.run for h in headers],
    ]
    texts = parts[0]
    for more in parts[1:]:
        if len(set(texts)) == len(texts):
            break
        if len(set(more)) > 1:
            texts = [f"{t}, {m}" for t, m in zip(texts, more, strict=True)]
    common = len(headers) > 1 and len(set(parts[0])) == 1
    return [t.removeprefix(f"{parts[0][0]}, ") for t in texts] if common else texts


def _unit(runs: list[Run]) -> str:
    of = {"token" if "vocab" in run.header.details.get("data", {}) else "example" for run in runs}
    return " or ".join(sorted(of, reverse=True))


def _median_of_neighbours(y: list[float], reach: int) -> list[float]:
    """The median of up to ``reach`` finite neighbours on either side, fewer at the ends; NaN stays NaN."""
    smooth = []
    for i, value in enumerate(y):
        side = min(reach, i, len(y) - 1 - i)
        near = sorted(v for v in y[i - side : i + side + 1] if math.isfinite(v))
        smooth.append(near[len(near) // 2] if math.isfinite(value) else math.nan)
    return smooth


def _devices(header: Header) -> str:
    device = header.device
    kind = "pretend devices" if device["platform"] == "cpu" else f"{device['kind']} devices"
    return f"{device['count']} {kind}" if device["count"] > 1 else f"1 {device['kind']} device"


def _note(runs: list[Run], provenance: str) -> str:
    devices = sorted({_devices(r.header) for r in runs})
    sentences = [
        f"{provenance.capitalize()} on {' and '.join(devices)}. Lines: training batches; points: held-out data."
    ]
    if any(len(r.texts) > 1 for r in runs):
        sentences.append("Filled points: of another held-out text, evaluated before the run was resumed.")
    wide = [len(r.steps) // 40 * 2 + 1 for r in runs if len(r.steps) > MANY]
    if wide:
        sentences.append(
            f"Bold lines: median of {' or '.join(map(str, sorted(set(wide))))} neighbouring points."
        )
    if any(r.resumed for r in runs):
        sentences.append("Vertical hairlines: there the run was resumed from a checkpoint.")
    return "\n".join(sentences)
