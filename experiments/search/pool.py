"""Estimates on all cores: processes that trace candidates of one config for one target. Nothing is compiled or run there."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path

from experiments.run_config import Origin
from experiments.search.found import Figure
from sharding.errors import InputError
from sharding.price.target import Target

Said = Figure | str
"""A figure, or why the candidate was refused."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def figure_of(path: Path, words: Sequence[str], target: Target) -> Said:
    """The estimate of the config `path` with the overrides `words`, or why it is refused."""
    from experiments.plans.estimate import estimate

    try:
        made = estimate(Origin(path, tuple(words)).experiment(), target)
    except InputError as error:
        return str(error)
    m = made.modelled
    return Figure(made.predicted.memory.total, m.step, m.mfu, m.bottleneck)


class Pool:
    """`jobs` processes; as a context manager, none of them outlives it by more than one trace."""

    def __init__(self, path: Path, target: Target, jobs: int) -> None:
        self._job = (path, target)
        self._pool = ProcessPoolExecutor(
            jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin
        )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *failed: object) -> None:
        self._pool.shutdown(wait=not any(failed), cancel_futures=True)

    def figures(self, asked: Sequence[Sequence[str]]) -> list[Said]:
        """The estimates for these overrides, in their order. InputError where a process was killed."""
        path, target = self._job
        with _deaf():  # to answer it is ours
            waiting: list[Future[Said]] = [
                self._pool.submit(figure_of, path, tuple(words), target) for words in asked
            ]
        try:
            return [w.result() for w in waiting]
        except BrokenProcessPool as error:
            raise InputError(
                "A process that traced candidates was killed. A machine whose memory is used up does that: give --jobs 1, or "
                "search where there is more memory."
            ) from error


def measured(target: Target) -> Target:
    """A target of pretend devices with the rates of this machine (`experiments.plans.rates`), measured in a process of its own
    so that no device is started in this one.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin) as pool:
        with _deaf():
            waiting = pool.submit(_measured, target)
        return waiting.result()


def _measured(target: Target) -> Target:
    from experiments.config import Devices
    from experiments.devices import start
    from experiments.plans import rates

    start(Devices("pretend", target.devices))
    return rates.measured(target)


def _begin() -> None:
    """In a new process: end with its parent, and leave alone what the garbage collector cannot free. A trace makes hundreds of
    thousands of objects that all live until its end: looking at them again and again took a third of its time.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    for module in (
        "experiments.plans.estimate",
        "sharding.price.prediction",
        "sharding.price.standins",
        "sharding.price.timing",
    ):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 50)


def _follow(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Hold Ctrl-C back for a moment: a process that is started meanwhile never hears it, this one does afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
