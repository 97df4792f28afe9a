"""What a run says while it runs: a line and a record per log interval, evaluations, events. Time lives here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from experiments.config import Experiment
from experiments.events import Events
from experiments.progress import Progress, clock
from experiments.records import Records
from experiments.tables import human


@dataclass(frozen=True)
class Work:
    """What one step is worth: tokens and FLOPs (products, forward and backward, without what remat repeats), and the
    peak rate of all devices together (FLOP/s, None where it is not known)."""

    tokens: int
    flops: int
    peak: float | None


class Reporter:
    """Prints, records and times. Step times exclude evaluations and the blocking part of saves (`aside`)."""

    def __init__(
        self,
        e: Experiment,
        work: Work,
        records: Records,
        events: Events,
        show: Progress,
        rate: Any,
        device: Any,
    ):
        self.e, self.work, self.records, self.events, self.show = e, work, records, events, show
        self._rate, self._device = rate, device
        self._began = self._mark = time.perf_counter()
        self._aside, self._last, self.step_seconds = 0.0, 0, []

    def start(self, step: int) -> None:
        """The clock of the first interval starts, `step` updates being done."""
        self._began = self._mark = time.perf_counter()
        self._last, self._aside = step, 0.0

    def first_step(self, metrics: Any) -> None:
        """Wait for the first step, which includes compilation, and start the clock behind it."""
        import jax

        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - self._began
        self.events.write("first_step", seconds)
        self.show.line(f"first step after {clock(seconds)} (compilation included)", "dim")
        self.start(self._last + 1)

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Time that is not the step's."""
        began = time.perf_counter()
        yield
        self._aside += time.perf_counter() - began
        self.events.write(name, time.perf_counter() - began)

    def step(self, step: int, metrics: Any, stalled: float) -> None:
        """Read a step's metrics, print its line, write its record. Raises nothing on a loss that is not finite: it is
        recorded and shown as it is."""
        values = {k: float(v) for k, v in metrics.items()}
        now = time.perf_counter()
        steps = max(step - self._last, 1)
        seconds = max(now - self._mark - self._aside, 1e-9) / steps
        measured = step > self._last
        self._mark, self._last, self._aside = now, step, 0.0
        if measured:
            self.step_seconds.append(seconds)
        rate = float(self._rate(step - 1))
        record = {
            **values,
            "learning_rate": rate,
            "tokens": step * self.work.tokens,
            "data_wait_seconds": stalled,
        }
        if measured:
            record |= {"step_seconds": seconds, "tokens_per_second": self.work.tokens / seconds}
            record["mfu"] = self._mfu(seconds)
        record["memory_bytes"] = memory = self._memory()
        self.records.write("step", "measured", record, step=step)
        left = (self.e.steps - step) * seconds
        parts = [f"step {step:>{len(str(self.e.steps))}}/{self.e.steps}", f"loss {values['loss']:.4f}"]
        if measured:
            mfu = record["mfu"]
            parts += [
                f"{human(self.work.tokens / seconds, '', 1000)} tok/s",
                f"{seconds * 1000:.0f} ms/step",
                f"mfu {'n/a' if mfu is None else f'{mfu:.1%}'}",
            ]
        parts += [
            f"grad {values['grad_norm']:.2f}",
            f"lr {rate:.1e}",
            f"mem {'n/a' if memory is None else human(memory)}",
        ]
        self.show.line("  ".join([*parts, f"eta {clock(left)}"]))
        self.show.reached(step, clock(left))

    def evaluation(self, step: int, means: dict[str, float]) -> None:
        """Print and record a held-out evaluation."""
        self.records.write("eval", "measured", means, step=step)
        bits = f", {means['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in means else ""
        others = "".join(
            f", {k} {v:.4f}" for k, v in means.items() if k not in ("loss", "bits_per_byte", "tokens")
        )
        self.show.line(
            f"held out after {step}: loss {means['loss']:.4f}{bits}{others} ({means['tokens']:.0f} tokens)",
            "bold",
        )

    def _mfu(self, seconds: float) -> float | None:
        return None if self.work.peak is None else self.work.flops / seconds / self.work.peak

    def _memory(self) -> int | None:
        stats = self._device.memory_stats() if hasattr(self._device, "memory_stats") else None
        peak = (stats or {}).get("peak_bytes_in_use")
        return None if peak is None or not math.isfinite(peak) else int(peak)
