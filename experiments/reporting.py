"""What a run says while it runs: a line and a record per log interval, evaluations, events. Time lives here."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from experiments.evaluate import bits_per_byte
from experiments.events import Events
from experiments.progress import Progress, clock
from experiments.records import Records
from sharding.finding import human

SHORT = {"tokens": "tok/s", "examples": "examples/s"}
"""How the rate of a unit is printed."""

BLOCK = 4096
"""Learning rates that are computed at once."""


@dataclass(frozen=True)
class Work:
    """What one step is worth: tokens of text (else examples) and FLOPs (products, forward and backward, without what
    remat repeats), and the peak rate of all devices together (FLOP/s, None where it is not known).
    """

    count: int
    flops: int
    peak: float | None
    unit: Literal["tokens", "examples"] = "tokens"


class Rates:
    """The learning rates of a run of `steps` steps, every `every`th and the last of which are asked for. Computed in
    blocks, each when a rate of the block before is asked for: one computed when it is needed itself would queue behind
    the steps on an accelerator, and all of a long run do not fit.
    """

    def __init__(self, schedule: Callable[[Any], Any], steps: int, every: int):
        import jax
        import jax.numpy as jnp

        self._steps, self._every, self._size = steps, every, min(steps, BLOCK)
        self._compute = jax.jit(lambda first: jax.vmap(schedule)(first + jnp.arange(self._size)))
        self._blocks: dict[int, Any] = {}

    def of(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        import jax

        asked_next = ((step + 1) // self._every + 1) * self._every - 1
        ahead = min(max(asked_next, step + self._size), self._steps - 1)
        first, after = (at - at % self._size for at in (step, ahead))
        # What is dispatched for the block asked after this one is not waited for.
        self._blocks = {f: self._blocks[f] if f in self._blocks else self._compute(f) for f in (first, after)}
        self._blocks[first] = jax.device_get(self._blocks[first])
        return float(self._blocks[first][step - first])


class Reporter:
    """Prints, records and times a run of `steps` steps.

    Step times leave out the first step (it compiles), evaluations, and the part of a save that blocks the loop
    (`aside`). `text` is what is known without a model of the text that is evaluated, `schedule` gives the learning rate
    of a step counted from 0; `every`th steps are read, and the last.
    """

    def __init__(
        self,
        steps: int,
        work: Work,
        text: Mapping[str, Any],
        records: Records,
        events: Events,
        show: Progress,
        schedule: Callable[[Any], Any],
        every: int,
        device: Any,
    ):
        self.steps, self.work, self.text = steps, work, text
        self.records, self.events, self.show = records, events, show
        self._rates = Rates(schedule, steps, every)
        self._device = device
        self._began = self._mark = time.perf_counter()
        self._aside, self._last, self._waited = 0.0, 0, 0.0

    def start(self, step: int) -> None:
        """`step` updates are done and the next is about to be compiled."""
        if step < self.steps:
            self._rates.of(step)  # before the steps that it would else wait for
        self._began = time.perf_counter()
        self._from(step)
        self.show.reached(step, "compiling")

    def first_step(self, metrics: Any) -> None:
        """Wait for the first step, which includes compilation, and start the clock behind it."""
        import jax

        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - self._began
        self.events.write("first_step", seconds, step=self._last + 1)
        self.show.line(f"first step after {clock(seconds)}, compilation included", "dim")
        self._from(self._last + 1)
        self.show.reached(self._last)

    def _from(self, step: int) -> None:
        """The next interval begins now, with `step` updates done."""
        self._mark, self._last, self._aside = time.perf_counter(), step, 0.0

    @contextmanager
    def aside(self, name: str, step: int, after: Any) -> Iterator[None]:
        """Time that is not the step's: begins when `after`, the last step's metrics, is there."""
        import jax

        jax.block_until_ready(after)
        began = time.perf_counter()
        with self.events.timed(name, step=step):
            yield
        self._aside += time.perf_counter() - began

    def read(self, entries: Sequence[tuple[int, Any]], waited: float) -> None:
        """Wait for the metrics of some steps, in order, and print and record each. They share one mean step time.

        `waited`: seconds for which the loop has waited for data so far. A loss that is not finite is shown and recorded
        as it is.
        """
        import jax

        values = jax.device_get([metrics for _, metrics in entries])
        now, last = time.perf_counter(), entries[-1][0]
        seconds = (now - self._mark - self._aside) / (last - self._last) if last > self._last else None
        stalled, self._waited = waited - self._waited, waited
        for (step, _), metrics in zip(entries, values, strict=True):
            mine = seconds if step > self._last else None
            self._step(step, {k: float(v) for k, v in metrics.items()}, mine, stalled)
        self._from(last)

    def _step(self, step: int, metrics: dict[str, float], seconds: float | None, stalled: float) -> None:
        rate, rss = self._rates.of(step - 1), _peak_rss()
        memory, speed = self._memory(), None if seconds is None else self.work.count / seconds
        mfu = None if seconds is None or not self.work.peak else self.work.flops / seconds / self.work.peak
        record = {
            **metrics,
            "learning_rate": rate,
            self.work.unit: step * self.work.count,
            "step_seconds": seconds,
            f"{self.work.unit}_per_second": speed,
            "mfu": mfu,
            "data_wait_seconds": stalled,
            "memory_bytes": memory,
            "process_peak_rss_bytes": rss,
        }
        self.records.write("step", "measured", record, step=step)
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}", f"loss {metrics['loss']:.4f}"]
        parts += [f"grad {metrics['grad_norm']:.2f}", f"lr {rate:.1e}"]
        left = ""
        if seconds is not None and speed is not None:
            left = clock((self.steps - step) * seconds)
            parts += [f"{human(speed, SHORT[self.work.unit], 1000)}", f"{_milliseconds(seconds)}/step"]
            parts += [f"mfu {'n/a' if mfu is None else f'{mfu:.1%}'}"]
        parts += [f"rss {human(rss)}" if memory is None else f"mem {human(memory)}"]
        parts += [f"eta {left}"] if left and step < self.steps else []
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        self.show.line("  ".join(parts) + ("" if finite else "  NOT FINITE"), "" if finite else "bold red")
        self.show.reached(step, left)

    def evaluation(self, step: int, means: dict[str, float]) -> None:
        """Print and record a held-out evaluation, beside what needs no model where that is known of the same text."""
        means = means | bits_per_byte(means["loss"], self.text)
        self.records.write("eval", "measured", means, step=step)
        parts = [f"loss {means['loss']:.4f}"]
        if "bits_per_byte" in means:
            beside = [
                f"{name} {self.text[key]:.3f}"
                for name, key in (
                    ("byte frequencies", "unigram_bits_per_byte"),
                    ("xz", "xz_bits_per_byte"),
                )
                if key in self.text
            ]
            parts += [
                f"{means['bits_per_byte']:.3f} bits/byte" + (f" ({', '.join(beside)})" if beside else "")
            ]
        said = ("loss", "bits_per_byte", self.work.unit)
        parts += [f"{k} {v:.4f}" for k, v in means.items() if k not in said]
        over = f"{means[self.work.unit]:.0f} {self.work.unit}"
        self.show.line(f"held out after {step}: {', '.join([*parts, over])}", "bold")

    def _memory(self) -> int | None:
        """Peak bytes in use on this process's first device, where the platform counts them (CPU does not)."""
        peak = (self._device.memory_stats() or {}).get("peak_bytes_in_use")
        return None if peak is None else int(peak)


def _peak_rss() -> int:
    """Peak resident memory of this process so far, in bytes: on pretend devices, all of them together."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
