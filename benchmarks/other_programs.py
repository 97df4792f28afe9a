"""shardlab against whole programs: the hand-written script's start, and PyTorch's steps."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import Sizes

HERE = Path(__file__).resolve().parent
Build = Callable[[str, Sizes], tuple[Any, ...]]


def start_up(rounds: int) -> dict[str, Any]:
    """Command to first step of `shardlab train` (one device, no compilation kept) against the hand-written script."""
    seconds: dict[str, list[float]] = {"hand_written": [], "shardlab": []}
    for _ in range(rounds):
        told = _until([str(HERE / "hand_written.py"), "--split", "one", "--steps", "1"], '"program"')[1]
        seconds["hand_written"].append(
            json.loads(told)["start_to_first_step_s"]
        )  # its own clock: later steps left out
        seconds["shardlab"].append(_until([str(HERE / "first_step.py")], "first step")[0])
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    ratio = medians["shardlab"] / medians["hand_written"]
    return {"ratio": ratio, "median_seconds": medians, "rounds": rounds}


def _until(words: list[str], said: str) -> tuple[float, str]:
    """Seconds from starting a Python program to the line in which it says `said`, and that line."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, text=True, env=environment
    ) as program:
        assert program.stdout is not None
        for line in program.stdout:
            if said in line:
                return time.perf_counter() - began, line
    raise SystemExit(f"{' '.join(words)} ended with {program.returncode} and never said {said!r}")


TORCH = {"eager": "one", "ddp": "data2", "fsdp": "fsdp2"}
"""PyTorch's mode -> shardlab's split of the same work: its two processes stand against two pretend devices."""


def torch_ratios(python: str, build: Build, rounds: int, steps: int = 8) -> list[dict[str, Any]]:
    """Per mode: medians of both programs, each timed `rounds` times in turn, `steps` steps a time after a warm-up.

    `build(split, sizes)` gives shardlab's jitted step, state and batch; `python` an interpreter with torch.
    """
    found = []
    for mode, split in TORCH.items():
        step, state, batch = build(split, Sizes())
        compiled = step.lower(state, batch).compile()
        seconds: dict[str, list[float]] = {"torch": [], "shardlab": []}
        losses: list[float] = []
        other: dict[str, Any] = {}
        for _ in range(rounds):
            other = _torch(python, mode, steps)
            seconds["torch"].append(other["median_step_s"])
            turn = []
            for _ in range(steps + 1):
                began = time.perf_counter()
                state, out = compiled(state, batch)
                losses.append(float(out["loss"]))
                turn.append(time.perf_counter() - began)
            seconds["shardlab"].append(statistics.median(turn[1:]))
        medians = {name: statistics.median(s) for name, s in seconds.items()}
        apart = max(abs(a / b - 1) for a, b in zip(losses, other["losses"], strict=False))
        found.append(
            {
                "mode": mode,
                "split": split,
                "time_ratio": medians["shardlab"] / medians["torch"],
                "median_seconds": medians,
                "all_seconds": seconds,
                "loss_difference": apart,
                "load": os.getloadavg()[0],
            }
        )
    return found


def _torch(python: str, mode: str, steps: int) -> dict[str, Any]:
    words = [python, str(HERE / "torch_reference.py"), "--mode", mode, "--steps", str(steps)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
