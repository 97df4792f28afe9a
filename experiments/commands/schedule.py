"""Draw a pipeline schedule: who does what in which tick, its bubble by two clocks, what each stage keeps, what is sent.

For example `shardlab schedule 1f1b`, `shardlab schedule interleaved --stages 4 --microbatches 16 --chunks 2`, or with
measured costs as a page: `shardlab schedule zb-h1 --costs 1,1.2,0.8 --html zb.html`. The NAME comes first; a schedule of your
own is named by its file. The grid is checked: one that cannot run is refused with the cell that breaks. docs/schedules.md
says how to write one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.json_file import write_json
from sharding.errors import InputError

if TYPE_CHECKING:
    from sharding.pipeline.clocks import Costs
    from sharding.pipeline.grid import Schedule


@dataclass(frozen=True)
class Flags:
    """Options of `shardlab schedule`."""

    stages: int = 4
    """Stages of the pipeline."""
    microbatches: int | None = None
    """Micro-batches in a step; else the schedule's own number."""
    chunks: int | None = None
    """Chunks of layers on a stage, of a schedule that has them."""
    costs: str = "1,1,1"
    """What F, B (of the inputs) and W (of the weights) take, in any unit. Without W in the grid a B takes both."""
    message: float = 0.0
    """What a message takes, by the clock of independent stages, in the same unit."""
    json: Path | None = None
    """Write the grid, both clocks, stash and messages to this file as one JSON document."""
    svg: Path | None = None
    """Write both clocks as a picture."""
    html: Path | None = None
    """Write a page that needs no network and no script."""


def main(argv: list[str]) -> int:
    """Show the schedule; 0."""
    if {"-h", "--help"} & set(argv):
        cli.read_flags(["--help"], Flags)
    if not argv or argv[0].startswith("-"):
        raise _nameless(f" but got {argv[0]!r}" if argv else "")
    flags = cli.read_flags(argv[1:], Flags)
    for path, flag in ((flags.svg, "--svg"), (flags.html, "--html")):
        if path:
            cli.check_file(path, flag)
    if flags.stages < 1:
        raise InputError(f"--stages is {flags.stages}, but a pipeline has 1 or more. Change it.")
    from experiments.schedules.console import print_seen
    from experiments.schedules.page import page
    from experiments.schedules.seen import see
    from experiments.schedules.svg import alone

    seen = see(_schedule(argv[0], flags), flags.stages, _costs(flags.costs), flags.message)
    write_json(flags.json, seen.to_json())
    for path, draw in ((flags.svg, alone), (flags.html, page)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(draw(seen), encoding="utf-8")
    print_seen(seen)
    return 0


def _schedule(name: str, flags: Flags) -> Schedule:
    """The schedule of this name with what --microbatches and --chunks change."""
    from experiments.schedules.named import changed, parse_schedule

    schedule = parse_schedule(name)
    if schedule is None:
        raise _nameless(f" but got {name!r}")
    return changed(schedule, {f: getattr(flags, f) for f in ("microbatches", "chunks")})


def _nameless(given: str) -> InputError:
    from experiments.schedules.named import known

    return InputError(
        f"shardlab schedule takes a NAME or a FILE.py first, then flags,{given or ' but got nothing'}. The schedules are "
        f"{', '.join(known())}; for example: shardlab schedule 1f1b --stages 4 --microbatches 8"
    )


def _costs(text: str) -> Costs:
    """`1,1.2,0.8` -> F, B and W."""
    from sharding.pipeline.clocks import Costs

    try:
        forward, inputs, weights = (float(word) for word in text.split(","))
    except ValueError:
        raise InputError(
            f"--costs is {text!r}, but it takes three numbers with commas between: what F, B and W take, such as 1,1,1."
        ) from None
    return Costs(forward, inputs, weights)
