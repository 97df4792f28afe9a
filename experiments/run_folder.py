"""The folder of a run: made when everything has been checked, found again, and let go of when nothing came of it."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.agreement import said_by_all
from experiments.checkpoint_folder import sealed_steps
from experiments.config import Experiment, config_hash
from experiments.records import scan
from experiments.run_config import differences
from sharding.errors import InputError

FREE = (
    "name",
    "mesh",
    "rules",
    "partitioner",
    "pipeline",
    "devices",
    "accumulate",
    "log_every",
    "evaluate",
    "checkpoints",
    "sample",
)
"""Parts of a config that may differ when a run goes on: they change how, not what, is trained."""

IDENTITY = (
    "train_payload_sha256",
    "heldout_payload_sha256",
    "tokenizer_sha256",
    "train_rows_sha256",
    "heldout_rows_sha256",
)
"""Facts of a dataset that say which tokens it has, and in which rows: one text may be split and tokenized in many ways."""


def to_resume(experiment: Experiment, resume: str, runs: Path) -> Path | None:
    """The folder to go on with, None for a new run; `InputError` when there is no checkpoint there.

    `resume` is "never", "latest" (the newest run of this name that has a checkpoint) or a run's folder.
    """
    if resume == "never":
        return None
    if resume == "latest":
        found = [f for f in _in_order(runs / experiment.name) if _steps(f)]
        if not found:
            raise InputError(
                f"There is no run to resume: {runs / experiment.name} has no run with a checkpoint. Train first, name "
                f"the place of the runs with --runs, or give the run's folder with --resume FOLDER."
            )
        return found[-1]
    folder = Path(resume)
    if not folder.is_dir():
        raise InputError(
            f"There is no run to resume at {folder}: it is {'a file' if folder.exists() else 'not there'}. Give a "
            f"run's folder, such as {runs / experiment.name}/TIME-HASH, or --resume latest."
        )
    if not _steps(folder):
        raise InputError(
            f"The run in {folder} has no complete checkpoint to go on from. Give another run's folder, or start a new "
            f"run without --resume."
        )
    return folder.resolve()


def run_id(folder: Path) -> str:
    """The id of the run in a folder: its newest header's, and while it has none, the folder's name.

    So a folder that was renamed, or is reached by another path, still holds the same run. Process 0 looks and tells the
    others (a collective). Raises RecordError for records that are damaged.
    """
    records = folder / "records.jsonl"
    headers = scan(records).headers if records.exists() else []
    return said_by_all(headers[-1].run if headers else folder.name)[0]


def check_writable(runs: Path) -> None:
    """Refuse, before anything slow, a place in which no run folder could be made. Leaves nothing behind."""
    there = next(p for p in (runs.absolute(), *runs.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _unwritable(runs, error) from None


@contextmanager
def new(experiment: Experiment, runs: Path, makes: bool) -> Iterator[Path]:
    """A new folder runs/NAME/TIME-HASH, made by process 0 (`makes`) and told to the others.

    Whatever is raised before the run has done its first step takes the folder away again, and the folders above it
    that were made for it: there is nothing in it to go on from, and nothing to look at. A run that is killed then
    leaves its folder; `to_resume` passes over it.
    """
    made = make(runs / experiment.name, config_hash(experiment)) if makes else []
    folder = agreed(made[0] if made else runs)
    try:
        yield folder
    except BaseException:
        if made and not _stepped(folder):
            take_away(made)
        raise


def make(place: Path, digest: str) -> list[Path]:
    """Make the folder TIME-HASH in `place`, with -2, -3 ... where another run began in the same second.

    Returns it and the folders above it that were made for it, innermost first. Raises InputError where none can be made.
    """
    wanted = place / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{digest[:8]}"
    folder, number = wanted, 1
    above = [p for p in folder.parents if not p.exists()]
    while True:
        try:
            folder.mkdir(parents=True)
            return [folder, *above]
        except FileExistsError:
            if not folder.parent.is_dir():
                raise _unwritable(folder, NotADirectoryError(20, "a file is in its place")) from None
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        except OSError as error:
            raise _unwritable(folder, error) from None


def take_away(made: list[Path]) -> None:
    """Undo `make`: the folder with all that is in it, and those above it in which there is nothing else."""
    shutil.rmtree(made[0], ignore_errors=True)
    for above in made[1:]:
        if not any(above.iterdir()):
            above.rmdir()


def agreed(folder: Path) -> Path:
    """The absolute folder that process 0 chose, in every process (a collective where there are several)."""
    return Path(said_by_all(str(folder.absolute()))[0])


def check_same(folder: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with a run under a config or a corpus that would train other numbers.

    `was` and `now` are what a checkpoint says of its run: "experiment" (as JSON), "corpus" (a checksum) and "data" (facts of
    `IDENTITY`, those that the dataset has; checkpoints from before they were kept have none, and are held to the others).
    """
    changed = [
        d
        for d in differences(was.get("experiment", {}), now["experiment"])
        if d.split(":")[0].split(".")[0] not in FREE
    ]
    if changed:
        raise InputError(
            f"The run in {folder} was made by another config: {'; '.join(changed)}. Only what does not change the "
            f"numbers trained may differ on resuming ({', '.join(FREE)}). Undo the change or start a new run."
        )
    if was.get("corpus") != now["corpus"]:
        raise InputError(
            f"The run in {folder} was trained on a corpus with checksum {was.get('corpus')}, but the data now has "
            f"{now['corpus']}. Bring the old files back, or start a new run."
        )
    kept, mine = was.get("data", {}), now["data"]
    other = [
        f"{k} recorded {kept[k][:16]}, now {mine.get(k, 'none')[:16]}" for k in kept if kept[k] != mine.get(k)
    ]
    if other:
        raise InputError(
            f"The run in {folder} was trained on other tokens of the same text: {'; '.join(other)}. Bring the old token "
            f"files or the old tokenizer back, or start a new run."
        )


def _in_order(place: Path) -> list[Path]:
    """The folders that `make` made in `place`, oldest first; copies and folders with names of one's own are none."""
    found = {
        f: re.fullmatch(r"(\d{8}-\d{6})-[0-9a-f]{8}(?:-(\d+))?", f.name) for f in sorted(place.glob("*"))
    }
    begun = {f: (name[1], int(name[2] or 1)) for f, name in found.items() if name}
    return sorted(begun, key=lambda f: begun[f])


def _steps(folder: Path) -> list[int]:
    checkpoints = folder / "checkpoints"
    return sealed_steps(checkpoints) if checkpoints.is_dir() else []


def _stepped(folder: Path) -> bool:
    """Whether the run of a new folder has done a step: its events, written line by line, then say so."""
    events = folder / "events.jsonl"
    return events.exists() and b'"first_step"' in events.read_bytes()


def _unwritable(place: Path, error: OSError) -> InputError:
    return InputError(
        f"The run folder {place} cannot be written ({error.strerror}). Make it writable, or give another place with "
        f"--runs."
    )
