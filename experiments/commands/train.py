"""Train a config on its mesh: progress, checkpoints, records, pictures; goes on where it was stopped with --resume.

Ctrl-C and SIGTERM finish the step, save and leave; a second Ctrl-C leaves at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from experiments import cli
from experiments.devices import Processes
from experiments.json_file import write_json

EXIT_CODES = {"": 0, "SIGINT": 130, "SIGTERM": 143}
"""Why a run stopped -> exit code, as a shell reports the signal."""


@dataclass(frozen=True)
class Flags:
    """Options of `shardlab train`."""

    json: Path | None = None
    """Write the run's result to this file as one JSON document; of several processes the first does."""
    resume: str = "never"
    """"latest" goes on with the newest run of this config's name, FOLDER with that run; "never" starts a new one."""
    runs: Path = Path("runs")
    """Where run folders are made."""
    processes: Processes = Processes()
    """This process among several: coordinator host:port (or "auto"), count, index."""


def main(argv: list[str]) -> int:
    """Train; 0, or 130 / 143 when a signal stopped the run after a save."""
    experiment, flags, origin = cli.read(argv, Flags)
    from experiments.training import train

    result = train(experiment, origin, flags.resume, flags.runs, flags.processes)
    import jax

    if jax.process_index() == 0:  # the others would write the same file at the same time
        write_json(flags.json, asdict(result))
    return EXIT_CODES[result.stopped]
