"""Time a config's points on 1, 2, 4, ... devices in one process: a table, records and the scaling figure.

CONFIG is a file whose `config()` returns a Sweep, such as configs/scaling_quick.py. All points are compiled first, then
take turns, round after round. Ctrl-C and SIGTERM finish the turn and leave the records of every finished round.
Where it returns a PlanSweep, such as configs/plan_scaling.py, nothing is timed: each point is a pod that need not be there,
and its step time is modelled. Its table, records and figure say so.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from experiments import cli
from experiments.commands.train import EXIT_CODES
from experiments.config import config_hash
from experiments.json_file import write_json
from experiments.plan_sweep import PlanSweep
from experiments.run_config import Origin
from experiments.sweep import Sweep, load_either, write_sweep_config
from sharding.errors import InputError

DISAGREE = 1
"""Exit code when two splits of one batch have different losses."""


@dataclass(frozen=True)
class Flags:
    """Options of `shardlab sweep`."""

    rounds: int | None = None
    """Turns of every point, instead of the config's; a sweep of plans has none."""
    json: Path | None = None
    """Write the sweep's result to this file as one JSON document."""
    runs: Path = Path("runs")
    """Where run folders are made."""


@dataclass(frozen=True)
class Result:
    """What a sweep left: its folder, finished rounds, why it stopped early ("" if it did not), the table's rows,
    the largest relative difference of losses that should be equal, seconds spent compiling and in all.
    """

    folder: str
    rounds: int
    stopped: str
    points: list[dict[str, Any]]
    loss_difference: float
    cores: int
    shared_cores: bool
    compile_seconds: float
    seconds: float
    figures: list[str]


@dataclass(frozen=True)
class Modelled:
    """What a sweep of plans left: its folder, every point as its record has it, seconds in all, the figures."""

    folder: str
    points: list[dict[str, Any]]
    seconds: float
    figures: list[str]


def main(argv: list[str]) -> int:
    """Run the sweep; 0, 1 when losses disagree, 130 / 143 when a signal stopped it."""
    if {"-h", "--help"} & set(argv):
        cli.read_flags(["--help"], Flags)
    if not argv or argv[0].startswith("-"):
        raise InputError(
            f"shardlab sweep takes a CONFIG first, then flags{f', but got {argv[0]!r}' if argv else ''}. "
            f"For example: shardlab sweep configs/scaling_quick.py"
        )
    config, flags = Path(argv[0]), cli.read_flags(argv[1:], Flags)
    sweep, rounds = load_either(config), ()
    if isinstance(sweep, PlanSweep):
        if flags.rounds is not None:
            raise InputError(
                f"{config} returns a sweep of plans, which is modelled once and the same each time: it has no rounds. Leave "
                f"--rounds out."
            )
        write_json(flags.json, asdict(model(sweep, Origin(config, (), tuple(argv)), flags)))
        return 0
    if flags.rounds is not None:
        sweep, rounds = replace(sweep, rounds=flags.rounds), ("--rounds", str(flags.rounds))
    from experiments.sweep_run import Disagreement

    try:
        result = run(sweep, Origin(config, rounds, tuple(argv)), flags)
    except Disagreement as error:
        print(cli.paragraph(f"shardlab: {error}"), file=sys.stderr)
        return DISAGREE
    write_json(flags.json, asdict(result))
    return EXIT_CODES[result.stopped]


def run(sweep: Sweep, origin: Origin, flags: Flags) -> Result:
    """Measure a sweep into a new folder of `flags.runs`. Raises InputError, and Disagreement for different losses."""
    from experiments import devices, run_folder
    from experiments.events import Events
    from experiments.progress import Progress
    from experiments.records import Records
    from experiments.stopping import StopRequest
    from experiments.sweep_run import cores, header, measure, prepare, rows

    began = time.perf_counter()
    digest = config_hash(cast(Any, sweep))
    run_folder.check_writable(flags.runs)
    found = devices.start(sweep.base.devices)
    sides, dataset = prepare(sweep, found)
    folder = _folder(origin, flags, sweep, digest)  # only now, when nothing is refused any more
    about = header(sweep, folder.name, digest, found, sides, dataset)
    shared = found[0].platform == "cpu"
    with (
        StopRequest(agree_every=1) as stop,
        Progress(sweep.rounds * len(sides)) as show,
        Records(folder / "records.jsonl", about) as records,
        Events(folder / "events.jsonl", about) as events,
    ):
        size = f"{about.details['parameters'] / 1e6:.2f} M parameters"
        show.line(f"{sweep.name}: {len(sides)} points, {size}, run folder {folder}", "bold")
        if shared:
            show.line(_sharing(cores()))
        measured = measure(sweep, sides, dataset, records, events, show, stop)
        table = list(rows(measured, shared))
        for line in _table(table):
            show.line(line)
        pictures = _draw("scaling", folder, show) if table else []
        result = Result(
            folder=str(folder),
            rounds=measured.rounds,
            stopped=measured.stopped,
            points=table,
            loss_difference=measured.difference,
            cores=cores(),
            shared_cores=shared,
            compile_seconds=sum(s.compile_seconds for s in sides),
            seconds=time.perf_counter() - began,
            figures=pictures,
        )
        _leave(result, sweep, show)
    return result


def model(sweep: PlanSweep, origin: Origin, flags: Flags) -> Modelled:
    """Price a sweep of plans, then leave table, records and figures in a new folder of `flags.runs`. Raises InputError; what is
    refused or interrupted leaves nothing.
    """
    from experiments import run_folder
    from experiments.plan_sweep_run import cells, check_lines, header, price, work
    from experiments.progress import Progress
    from experiments.records import Records

    began, asked, points = time.perf_counter(), list(sweep.points()), []
    run_folder.check_writable(flags.runs)
    of = work(sweep)
    with Progress(len(asked)) as show:
        show.line(
            f"{sweep.name}: modelling {len(asked)} points, {of.parameters / 1e9:.2f} G parameters", "bold"
        )
        for at, point in enumerate(asked, 1):
            points.append(price(sweep, point, of.tokens))
            show.reached(at)
        check_lines(points)
        folder = _folder(origin, flags, sweep, config_hash(cast(Any, sweep)))
        with Records(folder / "records.jsonl", header(sweep, folder.name, of)) as records:
            for values in points:
                records.write("pod", "modelled", values)
        for line in _aligned(list(cells(points)), 3):
            show.line(line)
        pictures = _draw("pods", folder, show)
        for path in pictures:
            show.line(f"figure {path}")
        show.line(f"modelled, not measured; records {folder / 'records.jsonl'}")
    return Modelled(str(folder), points, time.perf_counter() - began, pictures)


def _folder(origin: Origin, flags: Flags, sweep: Sweep | PlanSweep, digest: str) -> Path:
    """The sweep's new folder with what it was asked: config.py that runs it again, what that needs, and command.txt."""
    from experiments import run_folder

    made = run_folder.make(flags.runs / sweep.name, digest)
    try:
        write_sweep_config(made[0], origin, sweep)
        (made[0] / "command.txt").write_bytes(os.fsencode(origin.command("sweep") + "\n"))
    except BaseException:
        run_folder.take_away(made)
        raise
    return made[0]


def _sharing(cores: int) -> str:
    return (
        f"Pretend devices share the same {cores} CPU core{'s' if cores > 1 else ''}: more of them bring nothing. Ideal "
        f"is the throughput of one device at every count, and what is below it is the cost of splitting."
    )


def _table(points: list[dict[str, Any]]) -> list[str]:
    """Lines of the table: one a point, with the range of its rounds' medians. `tokens_per_second` counts what `unit` says."""
    if not points:
        return []
    head = (
        "mode",
        "split",
        "devices",
        "rows",
        "median ms",
        f"{points[0]['unit']}/s",  # all points have the base's data
        "efficiency",
        "min-max ms",
        "cores busy",
    )
    cells: list[tuple[str, ...]] = [head]
    for p in points:
        low, high = (1000 * x for x in p["step_seconds_range"])
        cells.append(
            (
                p["mode"],
                p["split"],
                str(p["devices"]),
                str(p["global_batch"]),
                f"{1000 * p['step_seconds']:.1f}",
                f"{p['tokens_per_second']:,.0f}",
                f"{p['efficiency']:.0%}",
                f"{low:.1f}-{high:.1f}",
                f"{p['cores_busy']:.2f}",
            )
        )
    return _aligned(cells, 2)


def _aligned(cells: list[tuple[str, ...]], words: int) -> list[str]:
    """Rows of texts as lines: the first `words` columns begin alike, the others, which are numbers, end alike."""
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = (*(str.ljust,) * words, *(str.rjust,) * (len(wide) - words))
    return ["  ".join(side(c, w) for c, w, side in zip(row, wide, sides, strict=True)) for row in cells]


def _draw(figure: str, folder: Path, show: Any) -> list[str]:
    """A figure of this sweep's records in its folder; why there is none where it cannot be drawn."""
    from experiments.records import RecordError
    from paper_figures import build

    try:
        files = build.build(figure, folder, ("svg", "png"), [folder / "records.jsonl"]).files
    except RecordError as error:
        show.line(f"no figure: {error}", "yellow")
        return []
    return [str(path) for path in files]


def _leave(result: Result, sweep: Sweep, show: Any) -> None:
    """The last lines of a sweep."""
    if result.points:
        show.line(
            f"points with the same batch have the same losses to {result.loss_difference:.1e} of their size; compiling "
            f"took {result.compile_seconds:.0f} s, everything {result.seconds:.0f} s"
        )
    for path in result.figures:
        show.line(f"figure {path}")
    if result.stopped:
        kept = (
            f"the records of {result.rounds} of {sweep.rounds} rounds are"
            if result.rounds
            else "no round was finished, so no timing is"
        )
        show.line(f"stopped by {result.stopped}: {kept} in {result.folder}", "bold")
    else:
        show.line(f"records {Path(result.folder) / 'records.jsonl'}")
