"""Memory of a pipeline against micro-batches, for every schedule: what its grid's tables count, and what the compiler laid out.

Claim: A schedule's memory follows from its grid: GPipe's stash grows with the micro-batches, that of 1F1B stays at the stages',
    in the compiled program as in the table.

Records: kind "pipeline_buffers", modelled: bytes of the slots that the grid's tables count; kind "pipeline_memory", compiled:
    bytes of temporaries of the compiled step.

Reproduce:
    mkdir -p paper_figures/records/pipeline
    python benchmarks/pipeline.py --only memory flops --records paper_figures/records/pipeline/memory.jsonl
    shardlab figures pipeline_memory
"""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.records import MissingRecords, Record, RecordError, column
from paper_figures import style
from paper_figures.style import Label

RECORDS = ("pipeline/*.jsonl",)
MIB = 2**20
PANELS = (
    ("pipeline_buffers", "modelled", "counted_bytes", "Counted from the grid's tables (MiB)"),
    ("pipeline_memory", "compiled", "temp_bytes", "Compiled: temporaries (MiB)"),
)
"""Kind, provenance, value and title of each panel."""


def draw(records: list[Record]) -> Figure:
    """Counted on the left, compiled on the right, on the same axes."""
    groups = [[r for r in records if r.kind == kind] for kind, *_ in PANELS]
    if not all(groups):
        raise MissingRecords(
            'These records hold no memory of a pipeline (kinds "pipeline_buffers" and "pipeline_memory").'
        )
    if len({int(r.values["stages"]) for group in groups for r in group}) > 1:
        raise RecordError(
            "These records are of pipelines with different numbers of stages: give --records one of them at a time."
        )
    figure = Figure(figsize=(style.PAGE, 2.7), layout="constrained")
    style.note(figure, _note(groups[0]))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    names = list(dict.fromkeys(str(r.values["schedule"]) for group in groups for r in group))
    for axes, group, (kind, wanted, value, title) in zip(panels, groups, PANELS, strict=True):
        if (told := column(group, value).provenance) != wanted:
            raise RecordError(f"These {kind} records are {told}, but this figure draws them as {wanted}.")
        for i, name in enumerate(names):
            rows = sorted(
                (r for r in group if r.values["schedule"] == name), key=lambda r: r.values["microbatches"]
            )
            at = [int(r.values["microbatches"]) for r in rows]
            axes.plot(at, _mib(rows, value), color=style.colour(i), marker=style.marker(i))
        axes.set(title=title, xlabel="micro-batches")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({int(r.values["microbatches"]) for r in group})))
        for each in (axes.xaxis, axes.yaxis):
            each.set_minor_locator(NullLocator())
            each.set_major_formatter(lambda x, _: f"{x:.0f}")
        axes.margins(x=0.04)
    for axes, group, (_, _, value, _) in zip(panels, groups, PANELS, strict=True):
        style.label_ends(axes, _labels(group, names, value))
    return figure


def _mib(records: list[Record], value: str) -> list[float]:
    return [n / MIB for n in column(records, value).numbers]


def _labels(records: list[Record], names: list[str], value: str) -> list[Label]:
    """Each schedule's name beside its last point."""
    found = []
    for i, name in enumerate(names):
        rows = [r for r in records if r.values["schedule"] == name]
        if rows:
            last = max(rows, key=lambda r: r.values["microbatches"])
            found.append(Label(_mib([last], value)[0], name, style.colour(i)))
    return found


def _note(counted: list[Record]) -> str:
    head = counted[0].header
    stages = int(counted[0].values["stages"])
    on = "cpu" if head.device["platform"] == "cpu" else head.device["kind"]
    return (
        f"Bytes on one of {stages} devices, compiled for {on}; micro-batches of one size, so the batch grows with them. "
        f"Counted: slots of the stash, of messages and of what waits for W, times their bytes. Compiled: all temporaries of "
        f"the step, among them gradients and what one task needs while it runs."
    )
