"""What leaves a folder of checkpoints: old steps, unfinished saves, steps that are not whole. Called by process 0 alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from experiments.checkpoint_folder import UNFINISHED, missing, move, sealed_steps

SET_ASIDE = "set-aside"
DELETING = "deleting"


def tidy(folder: Path) -> list[str]:
    """Finish deletions, drop saves that never committed, and set aside the steps that are not whole; a line each."""
    notes = []
    shutil.rmtree(folder / DELETING, ignore_errors=True)
    for path in sorted(folder.iterdir()):
        if UNFINISHED in path.name:
            notes.append(_drop_unfinished(path))
        elif path.name.isdecimal() and (lack := missing(path)):
            notes.append(_set_aside(path, lack))
    return notes


def clear(folder: Path, step: int) -> list[str]:
    """Take away what is left on the disk of an earlier try at `step`, which is not sealed; a line each."""
    path, notes = folder / str(step), []
    if path.exists():
        notes.append(_set_aside(path, missing(path)))
    return notes + [_drop_unfinished(leftover) for leftover in folder.glob(f"{step}{UNFINISHED}*")]


def retire(folder: Path, step: int, keep: int) -> None:
    """Delete the oldest sealed steps beyond `keep`, never `step`."""
    others = [other for other in sealed_steps(folder) if other != step]
    for other in others[: max(0, len(others) + 1 - keep)]:
        shutil.rmtree(move(folder / str(other), folder / DELETING))


def _drop_unfinished(path: Path) -> str:
    shutil.rmtree(move(path, path.parent / DELETING))
    return f"removed the unfinished save {path.name}"


def _set_aside(path: Path, lack: str) -> str:
    there = move(path, path.parent / SET_ASIDE)
    return f"set aside step {path.name} as {there.relative_to(path.parent)}: {lack}"
