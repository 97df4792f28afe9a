"""Finds figures by their place, gathers their records, and saves them with the same bytes every time.

A figure is a file ``paper_figures/NAME.py`` (or any Python file, given by its path) with three things: a
docstring of the sections ``Claim:``, ``Records:`` and ``Reproduce:`` (commands, one a line); ``RECORDS``,
globs relative to ``paper_figures/records/``; and ``draw(records) -> matplotlib.figure.Figure``, a pure
function.

Same records, same version of matplotlib: same bytes. Ids in the SVG are salted with the figure's name, no
file holds a date, and the style does not depend on a user's settings.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from experiments.records import MissingRecords, Record, RecordError, locate, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
FORMATS = ("svg", "pdf", "png")
SECTIONS = ("Claim", "Records", "Reproduce")
_NOT_FIGURES = ("__init__", "build", "style")
_METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": "shardlab"},
    "pdf": {"CreationDate": None, "Creator": "shardlab", "Producer": "matplotlib"},
    "png": {"Software": "shardlab"},
}


@dataclass(frozen=True)
class Source:
    """One figure's file: its name, globs of records, the sections of its docstring, and what draws it."""

    name: str
    path: Path
    globs: tuple[str, ...]
    sections: dict[str, str]
    draw: Callable[[list[Record]], Figure]


@dataclass(frozen=True)
class Built:
    """One figure as saved: the files written and the record files that it was drawn from."""

    name: str
    files: tuple[Path, ...]
    records: tuple[Path, ...]


def figure_names() -> list[str]:
    """Names of the figures in this folder, sorted, found by their place and without importing them."""
    return sorted(p.stem for p in HERE.glob("*.py") if p.stem not in _NOT_FIGURES)


def load(name: str) -> Source:
    """The figure of that name, or in the Python file of that path. RecordError when there is none or it is no
    figure.
    """
    path = Path(name) if name.endswith(".py") else HERE / f"{name}.py"
    if not path.is_file() or path.stem in _NOT_FIGURES:
        raise RecordError(
            f"There is no figure {name!r}. The figures are {', '.join(figure_names())}; a file of your own "
            "is given by "
            "its path, ending in .py."
        )
    module = _import(path.resolve())
    globs = getattr(module, "RECORDS", None)
    sections = _sections(module.__doc__ or "")
    lacking = [f"the docstring's section {s}:" for s in SECTIONS if not sections.get(s)]
    if not isinstance(globs, tuple) or not globs or not all(isinstance(g, str) for g in globs):
        lacking.append("RECORDS, a tuple of globs")
    if not callable(getattr(module, "draw", None)):
        lacking.append("draw(records)")
    if lacking:
        raise RecordError(
            f"{path} is no figure yet: it lacks {', '.join(lacking)}. paper_figures/build.py "
            "says what each is."
        )
    return Source(path.stem, path, module.RECORDS, sections, module.draw)


def gather(
    source: Source, paths: Sequence[str | Path] | None = None
) -> tuple[list[Record], tuple[Path, ...]]:
    """The figure's records and their files: those committed with the repository, or those behind ``paths``.

    Raises MissingRecords, with the commands that make them, when there are none.
    """
    if paths:
        files = locate(paths)
    else:
        files = sorted({f for g in source.globs for f in (HERE / "records").glob(g)})
        if not files:
            raise MissingRecords(
                _missing(source, f"paper_figures/records/ holds no file {' or '.join(source.globs)}")
            )
    return read(files), tuple(files)


def build(
    name: str, out: str | Path, formats: Sequence[str] = FORMATS, paths: Sequence[str | Path] | None = None
) -> Built:
    """Draws one figure and saves it as ``out/NAME.FORMAT``. RecordError when records are missing or do not
    fit.
    """
    unknown = [f for f in formats if f not in FORMATS]
    if unknown or not formats:
        raise RecordError(
            f"A figure is saved as {', '.join(FORMATS)}, not as {', '.join(unknown) or 'nothing'}."
        )
    require_matplotlib()
    source = load(name)
    records, files = gather(source, paths)
    from paper_figures import style

    with style.house(source.name):
        try:
            figure = source.draw(records)
        except MissingRecords as error:
            raise MissingRecords(
                _missing(source, f"{error} Read: {', '.join(str(f) for f in files)}")
            ) from None
        return Built(source.name, tuple(_save(figure, Path(out), source.name, f) for f in formats), files)


def require_matplotlib() -> None:
    """RecordError, naming the extra, where matplotlib is not installed: training and records do without it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RecordError(
            "Figures are drawn with matplotlib, which is not installed. It comes with the extra 'figures': "
            "pip install 'shardlab[figures]', or pip install matplotlib."
        )


def _save(figure: Figure, out: Path, name: str, extension: str) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=extension, metadata=_METADATA[extension])
    out.mkdir(parents=True, exist_ok=True)
    path, partial = out / f"{name}.{extension}", out / f".{name}.{extension}.partial"
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, path)  # a reader sees the old picture or the new one, never half of one
    return path


def _missing(source: Source, reason: str) -> str:
    commands = "; ".join(line.strip() for line in source.sections["Reproduce"].splitlines() if line.strip())
    return (
        f"The figure {source.name} has no records to draw: {reason.rstrip('.')}. Make them with: {commands}"
    )


def _sections(docstring: str) -> dict[str, str]:
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", docstring, flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _import(path: Path) -> ModuleType:
    if path.parent == HERE:
        return importlib.import_module(f"paper_figures.{path.stem}")
    spec = importlib.util.spec_from_file_location(f"figure_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def build_all(
    names: Iterable[str],
    out: str | Path,
    formats: Sequence[str] = FORMATS,
    paths: Sequence[str | Path] | None = None,
) -> tuple[list[Built], dict[str, MissingRecords]]:
    """Builds each figure; those whose records are missing are returned by name with the reason, beside those
    built.
    """
    built: list[Built] = []
    missing: dict[str, MissingRecords] = {}
    for name in names:
        try:
            built.append(build(name, out, formats, paths))
        except MissingRecords as error:
            missing[name] = error
    return built, missing
