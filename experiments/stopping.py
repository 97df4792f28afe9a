"""Stopping a run on purpose: Ctrl-C and SIGTERM let the step finish, so that the loop can save and leave.

With one process the answer is immediate: the first signal sets a flag, ``reached`` returns it.

With several processes a signal reaches them at different steps, or reaches only one of them, and a loop that
left at different steps would hang in its next collective. So all of them must agree, in one of two ways:

* SIGTERM is what schedulers send before they take a machine away. Where ``jax.distributed`` is up, JAX's own
preemption service has SIGTERM, spreads the notice in the background and names one step that nobody has passed
yet (``multihost_utils.reached_preemption_sync_point``). Here it is polled at every step; it costs no
collective. * Ctrl-C (and SIGTERM where that service is off) is a flag in one process. Every ``agree_every``
steps the processes gather their flags in one tiny collective, and all leave if any has one. It waits for the
steps under way, so ``agree_every`` is the interval at which the loop reads its metrics anyway.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which SIGINT and SIGTERM ask for a stop instead of making one.

    ``requested`` is the name of the first signal that this process received ("SIGINT" or "SIGTERM"), or None.
    The second Ctrl-C raises KeyboardInterrupt at once, wherever the program is. On leaving, the former
    handlers are back. Entering raises RuntimeError outside the main thread, the only one in which Python lets
    handlers be set.
    """

    def __init__(self, agree_every: int):
        """``agree_every``: steps between two agreements of several processes, the same in all of them."""
        if agree_every < 1:
            raise ValueError(f"agree_every is {agree_every}: it counts steps and must be at least 1.")
        self.agree_every = agree_every
        self.requested: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                f"StopRequest was entered in thread {threading.current_thread().name!r}: signal handlers can "
                f"only be set in the main thread. Enter it there, and ask `requested` from any thread."
            )
        for number in SIGNALS:
            if number is signal.SIGTERM and _preemption_service():
                continue  # a handler of ours would take the notice away from JAX
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python and cannot be set back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def reached(self, step: int) -> str | None:
        """Why to stop after ``step``, or None; to be called once by every process for every step, in order.

        The answer is the same in all processes: the name of a signal ("SIGINT" before "SIGTERM" if both
        came).
        """
        import jax

        if _preemption_service():
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.requested = self.requested or "SIGTERM"
                return "SIGTERM"
        if jax.process_count() == 1:
            return self.requested
        return self._agreed() if step % self.agree_every == 0 else None

    def _agreed(self) -> str | None:
        """What any process has received, gathered from all of them (a collective call)."""
        import numpy as np
        from jax.experimental import multihost_utils

        mine = [number.name for number in SIGNALS].index(self.requested) if self.requested else len(SIGNALS)
        first = int(np.min(multihost_utils.process_allgather(np.int32(mine))))
        return SIGNALS[first].name if first < len(SIGNALS) else None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self.requested == "SIGINT":
            raise KeyboardInterrupt
        self.requested = self.requested or name
        # os.write and not print: a handler may interrupt a print that is under way.
        again = "; Ctrl-C again leaves at once" if name == "SIGINT" else ""
        os.write(2, f"\n{name}: stopping after this step{again}\n".encode())


def _preemption_service() -> bool:
    """Whether jax.distributed is up in this process with its preemption service, which then owns SIGTERM."""
    from jax._src import distributed  # no public way to ask

    return distributed.global_state.preemption_sync_manager is not None
