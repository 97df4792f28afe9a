"""The colours of tasks, alike in a terminal, in SVG and on a page: a hue for each kind, a shade for each chunk."""

from __future__ import annotations

from sharding.pipeline.grid import Kind

SHADES: dict[Kind, tuple[str, str]] = {
    "F": ("#b5d3f5", "#6fa3e2"),
    "B": ("#ffd59e", "#f0a04b"),
    "W": ("#c3e7cb", "#7cc492"),
}
"""Of the first and the last chunk; all are light enough for INK, on white and on black."""

INK = "#10151f"


def colour(kind: Kind, chunk: int = 0, chunks: int = 1) -> str:
    """The fill of a task."""
    pale, full = (tuple(int(shade[i : i + 2], 16) for i in (1, 3, 5)) for shade in SHADES[kind])
    share = chunk / (chunks - 1) if chunks > 1 else 0.5
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(pale, full, strict=True))
