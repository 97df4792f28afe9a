"""Processes that run checks and may hang or die: started, watched against limits, and never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from experiments.doctor.job import Check, Job, Place
from experiments.doctor.verdict import Verdict, could_not_run, worst

ROOT = Path(__file__).resolve().parents[2]
RESTARTS = 5
"""Checks of a place that may hang or die before the rest is given up."""
PATIENCE = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120 --xla_cpu_collective_call_terminate_timeout_seconds=3600"
"""XLA's own limits on a CPU would abort the process before ours say what hung."""


@dataclass(frozen=True)
class Finding:
    """What a check came to, in which place and how long it took there (the slowest process)."""

    check: Check
    place: Place
    verdict: Verdict
    seconds: float


@dataclass
class Child:
    """A process while it runs, and what it has said."""

    process: subprocess.Popen[bytes]
    pipe: int
    errors: IO[bytes]
    ready: dict[str, Any] = field(default_factory=dict)
    current: str = ""
    since: float = 0.0
    verdicts: dict[str, tuple[Verdict, float]] = field(default_factory=dict)
    done: bool = False
    closed: bool = False
    rest: bytes = b""

    def hear(self) -> None:
        """Read what is there; sets `closed` at the end of the pipe."""
        said = os.read(self.pipe, 1 << 16)
        self.closed = not said
        *lines, self.rest = (self.rest + said).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "ready" in message:
                self.ready = message["ready"]
            elif "begin" in message:
                self.current, self.since = message["begin"], time.monotonic()
            elif "end" in message:
                self.verdicts[message["end"]] = (Verdict.from_json(message["verdict"]), message["seconds"])
                self.current = ""
            else:
                self.done = True

    def last_words(self) -> str:
        """The last line of its standard error that says something, for the report."""
        self.errors.seek(0)
        lines = [w.strip() for w in self.errors.read().decode("utf-8", "replace").splitlines()]
        lines = [w for w in lines if w and not w.startswith(("@", "***", "For simplicity", "File "))]
        fatal = [w for w in lines if w.startswith("F") and "Check failed" in w]
        return (fatal or lines or [""])[-1 if not fatal else 0][:300]


def run_checks(
    place: Place,
    checks: Sequence[Check],
    start_up: float,
    tell: Callable[[Finding], None],
    ready: Callable[[dict[str, Any]], None],
) -> None:
    """Run checks in processes of a place, in order, and `tell` what each came to; `ready` hears versions and devices.

    A check that takes longer than its limit, or whose process dies, could not run; the rest goes on in new processes. When
    these do not start within `start_up` seconds, or `RESTARTS` checks have gone that way, neither could the rest.
    """
    left, lost = list(checks), 0
    while left:
        told, why, at_fault = _run(place, left, start_up, tell, ready)
        left = [c for c in left if c.name not in told]
        if not why:
            return
        stop = not at_fault or lost + 1 >= RESTARTS
        for check in [c for c in left if c.name == at_fault] or left[:1]:
            tell(Finding(check, place, could_not_run(why), 0.0))
            left.remove(check)
        lost += 1
        for check in left if stop else ():
            reason = f"not tried, as {lost} checks before hung or died" if at_fault else why
            tell(Finding(check, place, could_not_run(reason), 0.0))
        if stop:
            return


def _run(
    place: Place,
    checks: Sequence[Check],
    start_up: float,
    tell: Callable[[Finding], None],
    ready: Callable[[dict[str, Any]], None],
) -> tuple[set[str], str, str]:
    """Names of the checks that were told, why it ended early ("": all ran), and the check at fault, if one was running."""
    told: set[str] = set()
    began, announced = time.monotonic(), False
    with _children(place, checks, start_up) as (children, selector):
        while True:
            for key, _ in selector.select(timeout=0.1):
                key.data.hear()
                if key.data.closed:
                    selector.unregister(key.fileobj)
            if not announced and all(c.ready for c in children):
                announced = True
                ready(children[0].ready)
            for check in checks:
                if check.name in told or any(check.name not in c.verdicts for c in children):
                    continue
                said = [_by(i, place, c.verdicts[check.name][0]) for i, c in enumerate(children)]
                seconds = max(c.verdicts[check.name][1] for c in children)
                told.add(check.name)
                tell(Finding(check, place, worst(said), seconds))
            if all(c.done for c in children):
                return told, "", ""
            why, at_fault = _trouble(children, checks, began, start_up)
            if why:
                return told, why, at_fault


def _by(index: int, place: Place, verdict: Verdict) -> Verdict:
    """The verdict with the process that gave it in its detail, where there are several."""
    if place.processes == 1 or not verdict.unwell:
        return verdict
    return Verdict(verdict.outcome, f"process {index}: {verdict.detail}", verdict.error, verdict.bound)


def _trouble(
    children: Sequence[Child], checks: Sequence[Check], began: float, start_up: float
) -> tuple[str, str]:
    """What is wrong with the processes ("" when nothing is) and the check that was running."""
    limits = {c.name: c.limit for c in checks}
    running = next((c.current for c in children if c.current), "")
    for index, child in enumerate(children):
        who = f"process {index}" if len(children) > 1 else "its process"
        if child.closed and not child.done:
            code = child.process.wait()
            how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            words = child.last_words()
            return f"{who} {how}" + (f": {words}" if words else ""), child.current or running
    now = time.monotonic()
    for index, child in enumerate(children):
        who = f"process {index}" if len(children) > 1 else "its process"
        if child.current and now - child.since > limits[child.current]:
            return (
                f"stuck: {who} had no result after {limits[child.current]:g} s and was ended",
                child.current,
            )
        if not child.ready and now - began > start_up:
            together = f"{len(children)} processes" if len(children) > 1 else "the process"
            return f"{together} did not start within {start_up:g} s", ""
    return "", ""


@contextlib.contextmanager
def _children(
    place: Place, checks: Sequence[Check], start_up: float
) -> Iterator[tuple[list[Child], selectors.BaseSelector]]:
    """The processes of a place, started; ended for good on the way out, whatever the way."""
    children: list[Child] = []
    coordinator = f"127.0.0.1:{_free_port()}"
    selector = selectors.DefaultSelector()
    try:
        for index in range(place.processes):
            children.append(_start(Job(place, index, coordinator, start_up, tuple(checks))))
            selector.register(children[-1].pipe, selectors.EVENT_READ, children[-1])
        yield children, selector
    finally:
        selector.close()
        for child in children:
            _end(child)


def _start(job: Job) -> Child:
    reads, writes = os.pipe()
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in _end)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(_import_path()))
    flags = environment.get("XLA_FLAGS", "")
    asked = [f for f in PATIENCE.split() if f.partition("=")[0] not in flags]
    environment["XLA_FLAGS"] = " ".join([flags, *asked]).strip()
    told = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe would block on a process that does not read)
    told.write(job.to_json().encode())
    told.seek(0)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.doctor.worker", str(writes), str(told.fileno())],
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            pass_fds=(writes, told.fileno()),
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to answer, and they are ended as a group
        )
    finally:
        os.close(writes)
        told.close()
    return Child(process, reads, errors, since=time.monotonic())


def _import_path() -> list[str]:
    """What the user asked for, then where this house lies."""
    asked = os.environ.get("PYTHONPATH", "")
    return [*filter(None, asked.split(os.pathsep)), str(ROOT)]


def _end(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()
    assert child.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.process.stdin.close()
    os.close(child.pipe)
    child.errors.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
