"""Batches made ahead in a background thread."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from sharding.errors import InputError

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterate over (step, make(step)) for step in start..stop; at most `ahead` finished batches are held.

        with Prefetcher(make, start=0, stop=100, ahead=2) as batches:
            for step, batch in batches: ...

    An exception of `make` is raised in the consumer at the step that it belongs to, with its own traceback.
    `waited_s` counts the seconds that the consumer stood waiting, `waits` how often: the data stalls.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, ahead: int = 2):
        """Start the thread. `stop` is exclusive. InputError when `ahead` < 1."""
        if ahead < 1:
            raise InputError(f"A prefetcher holds at least 1 batch ahead, asked: {ahead}.")
        self.waited_s, self.waits = 0.0, 0
        self._make, self._steps, self._ahead = make, range(start, stop), ahead
        self._ready: collections.deque[tuple[int, T | None, BaseException | None]] = collections.deque()
        self._change = threading.Condition()
        self._state = "running"  # -> "exhausted" (the thread has ended by itself) or "closed"
        # A daemon: a `make` that hangs must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, T]]:
        return self

    def __next__(self) -> tuple[int, T]:
        with self._change:
            if not self._ready and self._state == "running":
                began = time.perf_counter()
                self._change.wait_for(lambda: self._ready or self._state != "running")
                self.waited_s += time.perf_counter() - began
                self.waits += 1
            if not self._ready or self._state == "closed":
                raise StopIteration
            step, batch, error = self._ready.popleft()
            self._change.notify_all()
        if error is not None:
            self.close()
            if isinstance(error, StopIteration):  # would read as the end of the batches
                raise RuntimeError(f"the batch of step {step} raised StopIteration") from error
            raise error
        return step, batch  # type: ignore[return-value] (there is a batch where there is no error)

    def close(self, timeout_s: float = 5.0) -> None:
        """Drop what is ready and end the thread; waits at most `timeout_s` for a `make` that is under way."""
        with self._change:
            self._state = "closed"
            self._ready.clear()
            self._change.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        for step in self._steps:
            with self._change:
                self._change.wait_for(lambda: len(self._ready) < self._ahead or self._state == "closed")
                if self._state == "closed":
                    return
            try:
                made = (step, self._make(step), None)
            except BaseException as error:  # every kind belongs to the consumer
                made = (step, None, error)
            with self._change:
                if self._state == "closed":
                    return
                self._ready.append(made)
                if made[2] is not None:
                    self._state = "exhausted"
                self._change.notify_all()
            if made[2] is not None:
                return
        with self._change:
            if self._state == "running":
                self._state = "exhausted"
            self._change.notify_all()
