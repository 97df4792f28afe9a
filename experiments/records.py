"""Records: one measured, compiled or modelled fact is one JSON line.

A file of records is text, one JSON object a line, in pure ASCII. A *header* line (kind ``run``) holds what is
constant for a run: config hash, seed, versions, devices, mesh, details. Every later line names its run and is
joined with the newest header of that run above it. The schema, field by field, is in ``docs/records.md``.

Three promises:

* **Nothing is half read.** A line counts once its newline is there. A torn last line (the writer was killed)
  is reported and left out by the reader and cut off by the next writer; damage anywhere else is an error.
* **Nothing is mixed.** Each record says whether it was measured, compiled or modelled, and ``column`` refuses
  two of these.
* **Nothing is counted twice.** When a run is resumed, what it wrote beyond the point of resumption is
  superseded.

This module needs the standard library only, so that figures and tools read records without jax.
"""

from __future__ import annotations

import json
import operator
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, SupportsIndex

from experiments.record_lines import from_line, to_line
from experiments.record_schema import PROVENANCES as PROVENANCES  # "as": part of this module's interface
from experiments.record_schema import Header as Header
from experiments.record_schema import MissingRecords as MissingRecords
from experiments.record_schema import Record as Record
from experiments.record_schema import RecordError as RecordError
from experiments.record_schema import installed_versions as installed_versions
from experiments.record_schema import to_json, validate_header
from experiments.record_schema import utc_now as utc_now
from experiments.record_schema import validate as validate


class TornLineWarning(UserWarning):
    """A file ended in the middle of a line; that line was left out."""


@dataclass(frozen=True)
class Scan:
    """What one file holds: valid records in the order written, its headers, and the torn tail ("" if there is
    none).
    """

    records: list[Record]
    headers: list[Header]
    torn: str = ""


class Records:
    """Append-only writer of one run's records; each line is one unbuffered write, so a kill tears the last
    line at most.

    Opening an existing file first cuts off a torn last line (kept in ``torn``), then writes a new header.
    Raises RecordError when the header is incomplete or the file holds this run with another seed. One writer
    a file; threads of that writer may share it.
    """

    def __init__(self, path: str | Path, header: Header, clock: Callable[[], str] = utc_now):
        self.path = Path(path)
        self._clock = clock
        self._lock = threading.RLock()  # re-entrant: a signal handler may write while a write is under way
        self.header = replace(header, time=clock())
        validate_header(self.header)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.torn = _cut_torn_line(self.path)
        if self.path.exists():
            _check_same_run(self.path, self.header)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._append(to_line(self.header))

    def write(
        self,
        kind: str,
        provenance: str,
        values: Mapping[str, Any],
        step: SupportsIndex | None = None,
    ) -> Record:
        """Validates and appends one record; ``step`` counts optimizer updates done. Returns it as written."""
        count = None if step is None else operator.index(step)  # numpy and jax integers become Python's
        record = Record(kind, provenance, values, self.header, count, self._clock())
        validate(record)
        self._append(to_line(record))
        return record

    def sync(self) -> None:
        """Returns once everything written lies on the disk, as it should before a checkpoint is declared
        complete.
        """
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        with self._lock:
            while line:  # a raw write may be short, for instance when a disk is nearly full
                line = line[self._file.write(line) or 0 :]


def read(paths: str | Path | Iterable[str | Path]) -> list[Record]:
    """All valid records of the given files, in the order written, headers joined.

    Records with a step: the newest of each (run, kind, provenance, step). Records without one are all kept,
    but a line that stands word for word in two files counts once. Warns (TornLineWarning) of a torn last
    line; raises RecordError, naming file and line, for anything else that is damaged, and naming both files
    where two hold one run that went on in each: a copy of a run's folder that was resumed.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    kept: dict[tuple[Any, ...], Record] = {}
    held: dict[tuple[Any, ...], Path] = {}
    for path in dict.fromkeys(Path(p).resolve() for p in paths):
        found = scan(path)
        if found.torn:
            warnings.warn(
                f"{path} ends in a torn line of {len(found.torn)} characters, which was left out",
                TornLineWarning,
                2,
            )
        for record in found.records:
            key = _identity(record)
            other = held.setdefault(key, path)
            apart = record.step is not None and other != path and not _beside(other, path)
            if apart and key in kept and kept[key].time != record.time:
                raise RecordError(
                    f"{other} and {path} both hold step {record.step} of the run {record.run}, from different times: one is "
                    f"a copy of the other's folder, and a run went on there. Read one of them at a time."
                )
            if key not in kept or record.time >= kept[key].time:
                kept.pop(key, None)
                kept[key] = record
    return list(kept.values())


def _beside(a: Path, b: Path) -> bool:
    """Whether two files are what processes of one run wrote side by side."""
    return a.parent == b.parent and any(p.name.startswith("process") for p in (a, b))


def scan(path: str | Path) -> Scan:
    """Reads one file; see ``read``. A line without its newline is not a record but ``torn``.

    A second header of a run means that it was taken up again. What it had written beyond ``resumed_step`` is
    dropped; where the header does not say, what it had written beyond the first step that it writes anew.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise MissingRecords(f"The records at {path} cannot be read: {error.strerror}.") from None
    torn = lines.pop().decode("ascii", "backslashreplace")
    current: dict[str, Header] = {}
    headers: list[Header] = []
    records: dict[tuple[Any, ...], Record] = {}
    reopened: set[str] = set()  # runs whose point of resumption is not known yet

    def supersede(run: str, step: int) -> None:
        late = [k for k, r in records.items() if r.run == run and r.step is not None and r.step > step]
        for key in late:
            del records[key]

    for number, line in enumerate(lines, 1):
        record = from_line(line, current, f"{path}, line {number}")
        if isinstance(record, Header):
            if record.resumed_step is not None:
                supersede(record.run, record.resumed_step)
            elif record.run in current:
                reopened.add(record.run)
            current[record.run] = record
            headers.append(record)
            continue
        if record.step is not None and record.run in reopened:
            reopened.discard(record.run)
            supersede(record.run, record.step)
        key = _identity(record)
        records.pop(key, None)
        records[key] = record
    return Scan(list(records.values()), headers, torn)


def locate(paths: Iterable[str | Path]) -> list[Path]:
    """Record files behind files, globs and folders, sorted within each, none twice.

    A folder means its ``records.jsonl``, else the ``records.jsonl`` of its subfolders (a folder of runs),
    else its ``*.jsonl``. Raises MissingRecords for a path behind which there is no file.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            hits = next(
                (h for g in ("records.jsonl", "*/records.jsonl", "*.jsonl") if (h := sorted(path.glob(g)))),
                [],
            )
        elif path.exists():
            hits = [path]
        else:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            pattern = str(path.relative_to(anchor))
            hits = sorted(anchor.glob(pattern)) if any(c in pattern for c in "*?[") else []
            hits = [h / "records.jsonl" if h.is_dir() else h for h in hits]
            hits = [h for h in hits if h.exists()]
        if not hits:
            raise MissingRecords(
                f"There are no records at {given}. Name a file of records, a glob, or the folder of a run "
                "that holds a "
                "records.jsonl; a run writes one from its first step."
            )
        found.update(dict.fromkeys(h.resolve() for h in hits))
    return list(found)


@dataclass(frozen=True)
class Column:
    """Numbers of one name and one provenance, in the order of the records they came from."""

    name: str
    provenance: str
    numbers: list[float]


def column(records: Iterable[Record], name: str) -> Column:
    """``values[name]`` of each record as floats (NaN and infinities included), for one axis of a figure.

    Raises MissingRecords when there are no records, RecordError when they mix provenances or one lacks the
    number.
    """
    records = list(records)
    if not records:
        raise MissingRecords(f"The column {name!r} was asked of no records at all.")
    sources: dict[str, Record] = {}
    for record in records:
        sources.setdefault(record.provenance, record)
    if len(sources) > 1:
        parts = ", ".join(f"{p} (run {r.run}, kind {r.kind})" for p, r in sources.items())
        raise RecordError(
            f"The column {name!r} mixes records of different provenance: {parts}. A figure shows them as "
            "separate "
            "columns, each under its own name; select the records by provenance first."
        )
    numbers = []
    for record in records:
        number = record.values.get(name)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise RecordError(
                f"The column {name!r} needs a number from every record, but the {record.kind!r} record of "
                f"run {record.run} "
                f"at step {record.step} holds {number!r}; its values are "
                f"{', '.join(sorted(record.values)) or 'none'}."
            )
        numbers.append(float(number))
    return Column(name, records[0].provenance, numbers)


def _identity(record: Record) -> tuple[Any, ...]:
    """What a newer record replaces: with a step, the same fact of the same step; without, only the very same
    line.
    """
    if record.step is not None:
        return record.run, record.kind, record.provenance, record.step
    values = json.dumps(to_json(record.values, "values"), sort_keys=True)
    return record.run, record.kind, record.provenance, record.time, values


def _cut_torn_line(path: Path) -> str:
    """Truncates the file after its last newline; returns what was cut off."""
    if not path.exists():
        return ""
    with open(path, "rb+") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            file.truncate(end)
    return data[end:].decode("ascii", "backslashreplace")


def _check_same_run(path: Path, header: Header) -> None:
    for earlier in scan(path).headers:
        if earlier.run == header.run and earlier.seed != header.seed:
            raise RecordError(
                f"{path} holds run {header.run} with seed {earlier.seed}, and was opened to go on with seed "
                f"{header.seed}. "
                "Another seed is another run: give it a folder of its own, or the seed it began with."
            )
