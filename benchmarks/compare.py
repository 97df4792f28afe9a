"""Measure shardlab's step against the hand-written one, and against PyTorch where it is installed.

    python benchmarks/compare.py                     every split of cases.py; ratios with their limits
    python benchmarks/compare.py --splits fsdp --rounds 20
    python benchmarks/compare.py --torch PYTHON      also PyTorch, run with that interpreter
    python benchmarks/compare.py --present           the 85 M config on one accelerator that is present, with MFU

Both steps live in one process and take turns; each starts from the same weights and sees the same tokens; a ratio is
that of the medians. Time ratios on a busy machine are worth nothing: the load is printed beside them, and the ratio of
the processor's seconds, which other programs disturb less and which does not see how well threads share the work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from cases import CASES, build_ours, build_theirs, experiment
from other_programs import start_up, torch_ratios
from workload import TRANSFORMER_85M, Images, Sizes, keep_freed_memory

BYTES_LIMIT, START_LIMIT = 1.02, 1.5
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Relative difference of the last losses: rounding through a dozen AdamW updates."""


def compare(split: str, rounds: int, sizes: Sizes | Images) -> dict[str, Any]:
    """Alternate both steps of a split for `rounds` rounds after a warm-up round; medians, ratios, bytes, losses."""
    import jax

    from experiments.explanation import explain
    from experiments.peaks import peak

    case, sides = CASES[split], {}
    for name, build in (("hand_written", build_theirs), ("shardlab", build_ours)):
        step, state, batch = build(split, sizes)
        sides[name] = [step.lower(state, batch).compile(), state, batch]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    losses = dict.fromkeys(sides, 0.0)
    for at in range(rounds + 1):
        order = list(sides) if at % 2 else list(sides)[::-1]
        for name in order:
            side = sides[name]
            began, busy = time.perf_counter(), time.process_time()
            side[1], out = side[0](side[1], side[2])
            losses[name] = float(out["loss"] if isinstance(out, dict) else out)
            if at:
                seconds[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - busy)
    memory = {name: side[0].memory_analysis() for name, side in sides.items()}
    medians, busy = ({n: statistics.median(s) for n, s in x.items()} for x in (seconds, processor))
    device = jax.devices()[0]
    rate = peak(device.device_kind, sizes.dtype)
    work = 3 * explain(experiment(split, sizes), 1).forward_flops if rate else 0
    items = sizes.batch * (sizes.length if isinstance(sizes, Sizes) else 1)
    ratio = lambda of: of["shardlab"] / of["hand_written"]
    bytes_of = lambda what: ratio({name: getattr(m, f"{what}_size_in_bytes") for name, m in memory.items()})
    return {
        "split": split,
        "device": device.device_kind,
        "items_per_second": items / medians["shardlab"],
        "mfu": work / medians["shardlab"] / rate if rate else None,
        "time_ratio": ratio(medians),
        "time_limit": case.time,
        "processor_ratio": ratio(busy),
        "temp_ratio": bytes_of("temp"),
        "argument_ratio": bytes_of("argument"),
        "median_seconds": medians,
        "min_seconds": {name: min(s) for name, s in seconds.items()},
        "median_processor_seconds": busy,
        "rounds": rounds,
        "dtype": sizes.dtype,
        "losses": losses,
        "loss_difference": abs(ratio(losses) - 1),
        "load": os.getloadavg()[0],
    }


def _pretend() -> None:
    import jax

    keep_freed_memory()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


HEADS = ("time", "limit", "cpu", "temp", "args", "ours", "theirs", "loss diff", "load")
WIDTHS = (7, 6, 7, 7, 7, 9, 9, 10, 5)


def _row(r: dict[str, Any]) -> list[str]:
    """Print a split's ratios; what is over its limit, in words."""
    ours, theirs = r["median_seconds"]["shardlab"], r["median_seconds"]["hand_written"]
    print(
        f"{r['split']:8} {r['time_ratio']:7.3f} {r['time_limit']:6.2f} {r['processor_ratio']:7.3f} {r['temp_ratio']:7.3f} "
        f"{r['argument_ratio']:7.3f} {ours * 1e3:7.0f}ms {theirs * 1e3:7.0f}ms {r['loss_difference']:10.1e} {r['load']:5.1f}",
        flush=True,
    )
    if r["device"] != "cpu":
        mfu = "n/a" if r["mfu"] is None else f"{r['mfu']:.1%}"
        print(f"{r['device']}: {r['items_per_second']:.0f} tokens or images/s, mfu {mfu}")
    limits = (("time", r["time_limit"]), ("temp", BYTES_LIMIT), ("argument", BYTES_LIMIT))
    over = [
        f"{r['split']}: {what} ratio {r[what + '_ratio']:.3f} > {n}"
        for what, n in limits
        if r[what + "_ratio"] > n
    ]
    if r["loss_difference"] > LOSS_TOLERANCE[r["dtype"]]:
        over.append(f"{r['split']}: losses differ by {r['loss_difference']:.1e}")
    return over


def _asked() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--splits", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--starts", type=int, default=3, help="rounds of command to first step; 0 leaves it out"
    )
    parser.add_argument("--present", action="store_true", help="one present accelerator, no pretend devices")
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch installed")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    """Print the ratios; 1 when one is over its limit or the losses differ."""
    asked = _asked()
    if asked.present:
        asked.splits, asked.starts = "one", 0
    else:
        _pretend()
    print(f"{'split':8} " + " ".join(f"{h:>{n}}" for h, n in zip(HEADS, WIDTHS, strict=True)))
    document: dict[str, Any] = {"provenance": "measured", "steps": []}
    over: list[str] = []
    for split in asked.splits.split(","):
        sizes = TRANSFORMER_85M if asked.present else CASES[split].sizes
        document["steps"].append(compare(split, asked.rounds, sizes))
        over += _row(document["steps"][-1])
    if asked.starts:
        document["start"] = s = start_up(asked.starts)
        print(
            f"command to first step: {s['ratio']:.2f} x the hand-written script's (one device, limit {START_LIMIT})"
        )
        over += [f"start-up ratio {s['ratio']:.2f} > {START_LIMIT}"] * (s["ratio"] > START_LIMIT)
    if asked.torch:
        document["torch"] = torch_ratios(asked.torch, build_ours, rounds=3)
        for r in document["torch"]:
            ours, theirs = r["median_seconds"]["shardlab"], r["median_seconds"]["torch"]
            print(
                f"torch {r['mode']:6} {r['time_ratio']:.3f} x its step: {ours * 1e3:.0f} ms ({r['split']}) against "
                f"{theirs * 1e3:.0f} ms, losses apart {r['loss_difference']:.1e}, load {r['load']:.1f}"
            )
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n")
    for line in over:
        print(f"over its limit: {line}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
