"""Finds figures by their place, gathers their records, and saves them with the same bytes every time.

A figure is a file ``paper_figures/NAME.py`` (or any Python file, given by its path) with three things: a
docstring of the sections ``Claim:``, ``Records:`` and ``Reproduce:`` (commands, one a line); ``RECORDS``,
globs relative to ``paper_figures/records/``; and ``draw(records) -> matplotlib.figure.Figure``, a pure
function. Where every run has a picture of its own, ``draw`` returns a mapping of names to figures.

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
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
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
_NOT_FIGURES = ("__init__", "blocks", "build", "style")
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
    draw: Callable[[list[Record]], Figure | Mapping[str, Figure]]


@dataclass(frozen=True)
class Built:
    """One figure as saved: the files written and the record files that it was drawn from."""

    name: str
    files: tuple[Path, ...]
    records: tuple[Path, ...]


class BrokenFigure(RecordError):
    """A figure's own code raised, when it was read or when it drew; its cause holds the traceback."""


def figure_names() -> list[str]:
    """Names of the figures in this folder, sorted, found by their place and without importing them."""
    return sorted(p.stem for p in HERE.glob("*.py") if p.stem not in _NOT_FIGURES)


def load(name: str) -> Source:
    """The figure of that name, or in the Python file of that path. RecordError when there is none or it is no
    figure, BrokenFigure when its file cannot be read.
    """
    path = _file_of(name)
    try:
        module = _import(path.resolve())
    except Exception as error:  # the file is its author's code: it may raise anything
        raise _broken(path, error) from error
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


def _file_of(name: str) -> Path:
    """The file of a figure: its own path where the name ends in .py, else the one of that name in this folder."""
    known = figure_names()
    if not name.endswith(".py"):
        if name not in known:
            raise RecordError(
                f"There is no figure {name!r}. The figures are {', '.join(known)}; a file of your own is given by its "
                "path, ending in .py."
            )
        return HERE / f"{name}.py"
    if not (path := Path(name)).is_file():
        near = (
            f" The figure {path.stem} of shardlab's own is asked for without .py."
            if path.stem in known
            else ""
        )
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RecordError(
            f"There is no figure file {name}: it {what} (looked for from {Path.cwd()}).{near} Give the path of a Python "
            f"file, or one of the names {', '.join(known)}."
        )
    return path


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
    """Draws one figure and saves it as ``out/NAME.FORMAT``, or several as
    ``out/NAME-EACH.FORMAT``. RecordError when records are missing or do not
    fit, BrokenFigure when the figure's own code raises.
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
            drawn: Any = source.draw(records)
            figures = _named(source.name, drawn)
            for figure in figures.values():
                if not hasattr(figure, "savefig"):
                    raise TypeError(f"draw(records) returned {drawn!r}, no matplotlib figure")
            pictures = {(n, f): _rendered(figure, f) for n, figure in figures.items() for f in formats}
        except MissingRecords as error:
            raise MissingRecords(
                _missing(source, f"{error} Read: {', '.join(str(f) for f in files)}")
            ) from None
        except RecordError:
            raise
        except Exception as error:  # as above
            raise _broken(source.path, error) from error
    saved = tuple(_save(picture, Path(out), n, f) for (n, f), picture in pictures.items())
    return Built(source.name, saved, files)


def require_matplotlib() -> None:
    """RecordError, naming the extra, where matplotlib is not installed: training and records do without it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RecordError(
            "Figures are drawn with matplotlib, which is not installed. It comes with the extra 'figures': "
            "pip install 'shardlab[figures]', or pip install matplotlib."
        )


def _named(name: str, drawn: Any) -> dict[str, Any]:
    """What `draw` returned, by the name of its file: one figure bears the figure's name alone."""
    each = drawn if isinstance(drawn, Mapping) else {"": drawn}
    return {name if len(each) == 1 else f"{name}-{key}": figure for key, figure in each.items()}


def _rendered(figure: Figure, extension: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=extension, metadata=_METADATA[extension])
    return buffer.getvalue()


def _save(picture: bytes, out: Path, name: str, extension: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path, partial = out / f"{name}.{extension}", out / f".{name}.{extension}.partial"
    partial.write_bytes(picture)
    os.replace(partial, path)  # a reader sees the old picture or the new one, never half of one
    return path


def _broken(path: Path, error: Exception) -> BrokenFigure:
    """Which line of a figure's file raised what, in one paragraph."""
    if isinstance(error, SyntaxError) and Path(error.filename or "").is_file():  # or of what it imports
        return BrokenFigure(
            f"The figure file {error.filename} cannot be read: line {error.lineno}: {error.msg}. Correct that line."
        )
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.resolve()]
    line = f", line {frames[-1].lineno}: `{(frames[-1].line or '').strip()}`" if frames else ""
    what = f"{type(error).__name__}: {error}"
    return BrokenFigure(f"The figure {path.stem} cannot be drawn: {what} ({path}{line}). Correct that.")


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
) -> tuple[list[Built], dict[str, MissingRecords | BrokenFigure]]:
    """Builds each figure; those whose records are missing or whose own code raises are returned by name with the
    reason, beside those built.
    """
    built: list[Built] = []
    failed: dict[str, MissingRecords | BrokenFigure] = {}
    for name in names:
        try:
            built.append(build(name, out, formats, paths))
        except (MissingRecords, BrokenFigure) as error:
            failed[name] = error
    return built, failed
