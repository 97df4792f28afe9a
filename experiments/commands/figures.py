"""Draw figures from records: the paper's from the committed ones, or yours from --records.

shardlab figures                                   every figure, from paper_figures/records/
shardlab figures scaling --formats pdf             one figure, for a paper
shardlab figures --records runs/quickstart         whatever these runs' records can draw
shardlab figures my_figure.py --records runs/a/*   a figure of your own
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.json_file import write_json
from experiments.records import MissingRecords, RecordError
from sharding.errors import InputError

if TYPE_CHECKING:
    from paper_figures.build import BrokenFigure, Built


def draw_run(run_folder: str | Path) -> list[Path]:
    """Draws a run's loss curve from its ``records.jsonl`` into ``loss.svg`` and ``loss.png`` in its folder.

    Returns the two paths. RecordError when it has no training step yet or matplotlib is not installed.
    """
    from paper_figures import build

    folder = Path(run_folder)
    built = build.build("loss_curves", folder, ("svg", "png"), [folder / "records.jsonl"])
    return [path.replace(path.with_stem("loss")) for path in built.files]


def main(argv: list[str]) -> int:
    """Runs the command; 0 when every figure asked for was drawn, 2 with a paragraph on stderr otherwise.

    A figure whose own code raises does not keep the others from being drawn; its BrokenFigure is raised at the end.
    """
    options = _parse(argv)
    from paper_figures.build import BrokenFigure

    try:
        return _run(options)
    except BrokenFigure:
        raise
    except RecordError as error:
        print(error, file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from paper_figures import build

    names = options.names or build.figure_names()
    _check_places(options)
    try:
        built, failed = build.build_all(names, options.out, options.formats.split(","), options.records)
    except OSError as error:
        raise RecordError(
            f"The figures cannot be drawn into {options.out}: {error}. Give another folder with --out."
        ) from None
    broken = [error for error in failed.values() if isinstance(error, build.BrokenFigure)]
    for path in (path for figure in built for path in figure.files):
        print(path)
    # Records given by hand feed some figures and not others; only a figure asked for by name must be there.
    optional = bool(options.records and not options.names and built)
    for said in dict.fromkeys(str(error) for error in failed.values() if error not in broken[:1]):
        print(said, file=sys.stderr)
    write_json(options.json, _result(built, failed))
    if broken:
        raise broken[0]  # printed by the command line, with --debug below its traceback
    return 0 if optional or not failed else 2


def _check_places(options: argparse.Namespace) -> None:
    """RecordError for an --out or --json that cannot be written, before anything is drawn."""
    try:
        cli.check_folder(options.out, "--out")
        if options.json:
            cli.check_file(options.json, "--json")
    except InputError as error:
        raise RecordError(str(error)) from None


def _parse(argv: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "shardlab figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a figure, or a .py file of one; none: all there are"
    )
    parser.add_argument(
        "--records",
        nargs="+",
        metavar="PATH",
        help="files, globs or run folders instead of the committed records",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/figures"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--formats", default="svg,pdf,png", metavar="LIST", help="default: %(default)s")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write what was drawn from what as one JSON document"
    )
    return parser.parse_args(argv)


def _result(built: list[Built], failed: dict[str, MissingRecords | BrokenFigure]) -> dict[str, object]:
    def described(path: Path) -> dict[str, object]:
        data = path.read_bytes()
        return {"path": str(path), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    figures = [
        {
            "name": b.name,
            "files": [described(p) for p in b.files],
            "records": [described(p) for p in b.records],
        }
        for b in built
    ]
    missing = {name: str(error) for name, error in failed.items() if isinstance(error, MissingRecords)}
    broken = {name: str(error) for name, error in failed.items() if name not in missing}
    return {"figures": figures, "missing": missing, "broken": broken}
