"""A run's page: what was trained, how it was split, its loss curve, its sample. One file, nothing to fetch."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from experiments.config import Experiment, to_json
from experiments.schedules.named import show_schedule

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem } table { border-collapse: collapse }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top } td.n { font-variant-numeric: tabular-nums }
pre { background: #f5f5f2; padding: 1rem; overflow-x: auto; font-size: .85rem } img { width: 38rem; max-width: 100% }
"""


def write_report(
    folder: Path,
    experiment: Experiment,
    facts: Mapping[str, Any],
    text: Mapping[str, Any],
    result: Any,
    unit: Literal["tokens", "examples"],
) -> Path:
    """Write report.html, and loss.svg and loss.png where matplotlib is installed, into the run's folder; its path.

    `facts` are of the data, `text` is what is known without a model of the text that was evaluated; `unit` is what
    losses are means over: bits per byte are told of tokens, nats of examples.
    """
    from experiments.commands.figures import draw_run
    from experiments.record_schema import RecordError

    try:
        draw_run(folder)
        picture = '<img src="loss.svg" alt="Training and held-out loss">'
    except RecordError as error:
        picture = f"<p>{html.escape(str(error))}</p>"
    asked = folder / "command.txt"
    command = asked.read_text(encoding="utf-8", errors="replace") if asked.exists() else ""
    heldout = {
        "held-out bits per byte, measured": _number(result.heldout_bits_per_byte)
        + (f": {text['no_bits_per_byte']}" if "no_bits_per_byte" in text else ""),
        "unigram bits per byte of the same text": _number(text.get("unigram_bits_per_byte")),
        "xz bits per byte of the same text": _number(text.get("xz_bits_per_byte")),
    }
    if unit == "examples":
        heldout = {"held-out nats per example, measured": _number(result.heldout_loss)}
    figures = {
        "updates": result.step,
        **heldout,
        "median step, measured": ""
        if result.step_seconds_median is None
        else f"{result.step_seconds_median * 1000:.0f} ms",
        "whole run, measured": f"{result.seconds:.0f} s",
    }
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(experiment.name)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(experiment.name)}</h1><pre>{html.escape(command)}</pre>",
        f"<p>rules {html.escape(repr(experiment.rules))} on mesh {html.escape(experiment.mesh.describe())}, "
        f"partitioner {html.escape(repr(experiment.partitioner))}, "
        f"pipeline {html.escape(show_schedule(experiment.pipeline))}</p>",
        _table(figures),
        f"<h2>Loss</h2>{picture}",
        f"<h2>Sample</h2><pre>{html.escape(result.sample)}</pre>" if result.sample else "",
        f"<h2>Data</h2>{_table({k: v for k, v in facts.items() if isinstance(v, (int, float, str))})}",
        f"<h2>Config</h2><pre>{html.escape(json.dumps(to_json(experiment), indent=1))}</pre></html>",
    ]
    path = folder / "report.html"
    path.write_text("\n".join(parts), encoding="utf-8", errors="replace")  # a path need not be UTF-8
    return path


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _table(rows: dict[str, Any]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(k)}</th><td class=n>{html.escape(str(v))}</td></tr>"
        for k, v in rows.items()
        if v != ""
    )
    return f"<table>{cells}</table>"
