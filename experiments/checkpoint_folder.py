"""What makes a folder of checkpoints trustworthy: seals, renames, one writer. No JAX and no Orbax here."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path

from sharding.errors import InputError

SEAL = "sealed.json"
ITEMS = ("state", "meta")
UNFINISHED = ".orbax-checkpoint-tmp"


def sealed_steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps of a checkpoint folder whose seal holds, ascending; needs neither JAX nor leave to write.

    A seal holds where every file that it lists is there with its size: this finds what was cut off or
    removed. Bytes that changed in place are found by `damaged`, which reads them all.
    """
    named = [path for path in Path(folder).iterdir() if path.name.isdecimal()]
    return sorted(int(path.name) for path in named if not missing(path))


def seal(path: Path, step: int) -> None:
    """Make every file of the items under ``path`` durable, then write the seal of ``step`` with size and sha256 of each."""
    files = {}
    for item in ITEMS:
        for found in (path / item, *sorted((path / item).rglob("*"))):
            sync(found)
            if found.is_file():
                files[str(found.relative_to(path))] = {"size": found.stat().st_size, "sha256": _sha256(found)}
    draft = path / f"{SEAL}.draft"
    draft.write_text(json.dumps({"step": step, "files": files}, indent=1))
    sync(draft)
    draft.rename(path / SEAL)
    sync(path)


def missing(path: Path) -> str:
    """What the step directory ``path`` lacks to be a whole checkpoint; an empty string if nothing."""
    if not path.is_dir():
        return "there is no such step"
    try:
        sealed = json.loads((path / SEAL).read_text())
        step, sizes = sealed["step"], {name: facts["size"] for name, facts in sealed["files"].items()}
    except FileNotFoundError:
        return "it was never sealed"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {SEAL} cannot be read"
    if step != int(path.name):
        return f"it was sealed as step {step}"
    if not {"state/_METADATA", "meta/metadata"} <= sizes.keys():
        return "its seal names no state or no meta"
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return ""


def damaged(path: Path, process: int, processes: int) -> str:
    """Which file of the sealed step ``path`` has other bytes than were sealed; an empty string if none.

    Orbax's array files carry no checksum: a flipped bit would be restored as another number. A seal made before seals
    held checksums promises sizes alone. Of several processes each reads its share of the files, of nearly the same size:
    one that read them all would keep the others waiting, in a collective that gives up after half a minute.
    """
    files = json.loads((path / SEAL).read_text())["files"]
    loads = [0] * processes
    for name, facts in sorted(files.items(), key=lambda file: (-file[1]["size"], file[0])):
        whose = loads.index(min(loads))
        loads[whose] += facts["size"]
        if whose != process:
            continue
        try:
            if "sha256" in facts and _sha256(path / name) != facts["sha256"]:
                return f"{name} has other bytes than were sealed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def probe(folder: Path, process: int) -> None:
    """Write and remove a small file: an unwritable folder is found before the training, not after it."""
    trial = folder / f".probe-{process}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"shardlab")
        trial.unlink()
    except OSError as error:
        raise InputError(
            f"the checkpoint folder {folder} cannot be written: {error.strerror or error}. "
            f"Give a folder that this user may write, on a disk with room."
        ) from error


def lock(folder: Path) -> int:
    """Hold the folder for this process, until it closes the descriptor returned or dies."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise InputError(
            f"{folder} is open in another run that is still alive, and two runs would spoil each other's "
            f"checkpoints. Stop that one, or give this run a folder of its own."
        ) from error
    return descriptor


def move(path: Path, into: Path) -> Path:
    """Rename ``path`` to a free name in the directory ``into``: one atomic act, unlike a deletion."""
    into.mkdir(exist_ok=True)
    there, count = into / path.name, 0
    while there.exists():
        count += 1
        there = into / f"{path.name}-{count}"
    path.rename(there)
    return there


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
