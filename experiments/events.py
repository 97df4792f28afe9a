"""Events: what happened to a run and when, in the format of records (``events.jsonl``).

An event is a record of kind ``event``, measured, with the values {name, seconds, details}. The names in use:
start, compile, first_step, evaluate, save, save_wait, sample, stopped, end; a new one needs no declaration.
Events carry their step in ``details``, so that none is superseded when a run is resumed: what happened,
happened.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from experiments.records import Header, RecordError, Records, read

KIND = "event"


@dataclass(frozen=True)
class Event:
    """``time`` is the UTC ISO instant of writing (the end of what lasted); ``seconds`` how long it took,
    None: no length.
    """

    name: str
    time: str
    seconds: float | None
    details: Mapping[str, Any]
    header: Header


class Events:
    """Append-only writer of one run's events; thread-safe, safe to kill, and may be called in a signal
    handler.
    """

    def __init__(self, path: str | Path, header: Header):
        self._records = Records(path, header)
        self.torn = self._records.torn

    def write(self, name: str, seconds: float | None = None, **details: Any) -> Event:
        """Appends one event; ``seconds`` is how long it took, ``details`` whatever explains it (step=,
        bytes=, ...).
        """
        if not name:
            raise RecordError("An event needs a name, such as 'start' or 'save_end'.")
        record = self._records.write(KIND, "measured", {"name": name, "seconds": seconds, "details": details})
        return Event(name, record.time, seconds, details, record.header)

    @contextmanager
    def timed(self, name: str, **details: Any) -> Iterator[None]:
        """Writes ``name`` with the seconds the block took; one that raises is written too, with its
        ``error``.
        """
        start = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self.write(name, time.perf_counter() - start, **details, error=repr(error))
            raise
        self.write(name, time.perf_counter() - start, **details)

    def close(self) -> None:
        self._records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_events(paths: str | Path | Iterable[str | Path]) -> list[Event]:
    """All events of the given files in the order written; records of other kinds are left out."""
    return [
        Event(r.values["name"], r.time, r.values["seconds"], r.values["details"], r.header)
        for r in read(paths)
        if r.kind == KIND
    ]
