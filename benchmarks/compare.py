"""Measure shardlab's step against the hand-written one, and against PyTorch where it is installed.

    python benchmarks/compare.py                     one, data, fsdp, tensor; ratios with their limits
    python benchmarks/compare.py --splits fsdp --rounds 20
    python benchmarks/compare.py --torch PYTHON      also PyTorch, run with that interpreter
    python benchmarks/compare.py --present           the 85 M config on one accelerator that is present, with MFU

Both steps live in one process and take turns; each starts from the same weights and sees the same tokens; a ratio is
that of the medians. Time ratios on a busy machine are worth nothing: the load is printed beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from workload import TRANSFORMER_85M, Sizes, initial_weights, keep_freed_memory, sample_batch

HERE = Path(__file__).resolve().parent
TIME_LIMITS = {"one": 1.03, "data": 1.03, "fsdp": 1.03, "tensor": 1.05}
BYTES_LIMIT, START_LIMIT = 1.02, 1.5
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Relative difference of the last losses: rounding through a dozen AdamW updates."""

NAMES = {
    "attention_norm": "norm_1",
    "attention.q": "query",
    "attention.k": "key",
    "attention.v": "value",
    "attention.out": "output",
    "mlp_norm": "norm_2",
    "mlp.down": "down",
}
"""shardlab's parameter of a layer -> the workload's name for it (gate and up, which shardlab holds as one, aside)."""


def experiment(split: str, sizes: Sizes) -> Any:
    """The workload as an experiment: the quickstart config with this benchmark's split, sizes and optimizer."""
    from dataclasses import replace

    from experiments.config import Devices, load
    from models.transformer_config import TransformerConfig
    from sharding.axes import MeshShape
    from sharding.rule import Rules
    from sharding.rules.data import data
    from sharding.rules.fsdp import fsdp
    from sharding.rules.tensor import tensor

    splits = {
        "one": (Rules(), MeshShape()),
        "data": (data(), MeshShape(data=8)),
        "fsdp": (fsdp(), MeshShape(fsdp=8)),
        "tensor": (data() | tensor(), MeshShape(data=2, tensor=4)),
        "data2": (data(), MeshShape(data=2)),
        "fsdp2": (fsdp(), MeshShape(fsdp=2)),
    }
    rules, mesh = splits[split]
    shared = ("vocab", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "length", "dtype")
    base = load(HERE.parent / "configs" / "quickstart.py")
    return replace(
        base,
        model=TransformerConfig(**{name: getattr(sizes, name) for name in shared}),
        rules=rules,
        mesh=mesh,
        devices=Devices("pretend", math.prod(mesh.sizes().values())),
        batch=sizes.batch,
        steps=sizes.steps,
    )


def build_ours(split: str, sizes: Sizes) -> tuple[Any, Any, Any]:
    """(compiled step, state, batch) of shardlab, from the workload's weights and tokens."""
    import jax
    import numpy as np
    import optax

    from experiments.assemble import train_step
    from sharding.params import matrices
    from sharding.step import TrainStep

    e = experiment(split, sizes)
    made = train_step(e, jax.devices()[: e.devices.count])
    # The reference's own schedule, so that both sides make the same updates; the step clips.
    rate = optax.warmup_cosine_decay_schedule(
        0.0, sizes.peak, sizes.warmup, sizes.steps, sizes.floor * sizes.peak
    )
    decay = {"weight_decay": sizes.weight_decay, "mask": matrices(made.tree)}
    adamw = optax.adamw(rate, sizes.b1, sizes.b2, eps=sizes.eps, **decay)
    step = TrainStep(made.model, adamw, made.split, clip=sizes.clip)
    state = step.init(0)
    weights = initial_weights(sizes)
    per_layer = lambda name: np.stack([weights[f"layer_{i}.{name}"] for i in range(sizes.layers)])
    held = {"table": weights["embedding"], "norm": weights["norm"], "unembed": weights["unembedding"]}
    held |= {f"layers.{ours}": per_layer(theirs) for ours, theirs in NAMES.items()}
    held["layers.mlp.gate_up"] = np.stack([per_layer("gate"), per_layer("up")], axis=2)
    state["params"] = {p: jax.device_put(held[p], old.sharding) for p, old in state["params"].items()}
    rows = sample_batch(sizes) | {"weights": np.ones((sizes.batch, sizes.length), np.float32)}
    batch = {k: jax.device_put(v, step.batch_shardings()[k]) for k, v in rows.items()}
    return step.step.lower(state, batch).compile(), state, batch


def compare(split: str, rounds: int, sizes: Sizes) -> dict[str, Any]:
    """Alternate both steps of a split for `rounds` rounds after a warm-up round; medians, ratios, bytes, losses."""
    import hand_written
    import jax

    from experiments.explanation import explain
    from experiments.peaks import peak

    step, state, put = hand_written.build(split, sizes)  # type: ignore[arg-type]
    batch = put(sample_batch(sizes))
    sides = {
        "hand_written": [step.lower(state, batch).compile(), state, batch],
        "shardlab": list(build_ours(split, sizes)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses = dict.fromkeys(sides, 0.0)
    for at in range(rounds + 1):
        order = list(sides) if at % 2 else list(sides)[::-1]
        for name in order:
            side = sides[name]
            began = time.perf_counter()
            side[1], out = side[0](side[1], side[2])
            losses[name] = float(out["loss"] if isinstance(out, dict) else out)
            if at:
                seconds[name].append(time.perf_counter() - began)
    memory = {name: side[0].memory_analysis() for name, side in sides.items()}
    of = lambda what: (
        memory["shardlab"].__getattribute__(what) / memory["hand_written"].__getattribute__(what)
    )
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    device = jax.devices()[0]
    rate = peak(device.device_kind, sizes.dtype)
    work = 3 * explain(experiment(split, sizes), 1).forward_flops if rate else 0
    return {
        "split": split,
        "device": device.device_kind,
        "tokens_per_second": sizes.batch * sizes.length / medians["shardlab"],
        "mfu": work / medians["shardlab"] / rate if rate else None,
        "time_ratio": medians["shardlab"] / medians["hand_written"],
        "time_limit": TIME_LIMITS[split],
        "temp_ratio": of("temp_size_in_bytes"),
        "argument_ratio": of("argument_size_in_bytes"),
        "median_seconds": medians,
        "min_seconds": {name: min(s) for name, s in seconds.items()},
        "rounds": rounds,
        "dtype": sizes.dtype,
        "losses": losses,
        "loss_difference": abs(losses["shardlab"] / losses["hand_written"] - 1),
        "load": os.getloadavg()[0],
    }


def start_up(rounds: int) -> dict[str, Any]:
    """Command to first step of `shardlab train` (one device, no compilation kept) against the hand-written script."""
    seconds: dict[str, list[float]] = {"hand_written": [], "shardlab": []}
    for _ in range(rounds):
        seconds["hand_written"].append(
            _until([str(HERE / "hand_written.py"), "--split", "one", "--steps", "1"], '"program"')
        )
        seconds["shardlab"].append(_until([str(HERE / "first_step.py")], "first step"))
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    ratio = medians["shardlab"] / medians["hand_written"]
    return {"ratio": ratio, "limit": START_LIMIT, "median_seconds": medians, "rounds": rounds}


def _until(words: list[str], said: str) -> float:
    """Seconds from starting a Python program to the line in which it says `said`."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, text=True, env=environment
    ) as program:
        assert program.stdout is not None
        for line in program.stdout:
            if said in line:
                return time.perf_counter() - began
    raise SystemExit(f"{' '.join(words)} ended with {program.returncode} and never said {said!r}")


TORCH = {"eager": "one", "ddp": "data2", "fsdp": "fsdp2"}
"""PyTorch's mode -> shardlab's split of the same work: its two processes stand against two pretend devices."""


def torch_ratios(python: str, rounds: int, steps: int = 8) -> list[dict[str, Any]]:
    """Per mode: medians of both programs, each timed `rounds` times in turn, `steps` steps a time after a warm-up."""
    found = []
    for mode, split in TORCH.items():
        compiled, state, batch = build_ours(split, Sizes())
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


def _pretend() -> None:
    import jax

    keep_freed_memory()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


def main() -> int:
    """Print the ratios; 1 when one is over its limit or the losses differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", default=",".join(TIME_LIMITS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--starts", type=int, default=3, help="rounds of command-to-first-step; 0 leaves it out"
    )
    parser.add_argument(
        "--present", action="store_true", help="one present accelerator instead of pretend devices"
    )
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch installed")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.present:
        asked.splits, asked.starts = "one", 0
    else:
        _pretend()
    results, over = [], []
    print(
        f"{'split':8} {'time':>7} {'limit':>6} {'temp':>7} {'args':>7} {'ours':>9} {'theirs':>9} {'loss diff':>10} {'load':>5}"
    )
    for split in asked.splits.split(","):
        r = compare(split, asked.rounds, TRANSFORMER_85M if asked.present else Sizes())
        results.append(r)
        ours, theirs = r["median_seconds"]["shardlab"], r["median_seconds"]["hand_written"]
        print(
            f"{split:8} {r['time_ratio']:7.3f} {r['time_limit']:6.2f} {r['temp_ratio']:7.3f} {r['argument_ratio']:7.3f} "
            f"{ours * 1e3:7.0f}ms {theirs * 1e3:7.0f}ms {r['loss_difference']:10.1e} {r['load']:5.1f}",
            flush=True,
        )
        if asked.present:
            mfu = "n/a" if r["mfu"] is None else f"{r['mfu']:.1%}"
            print(f"{r['device']}: {r['tokens_per_second']:.0f} tokens/s, mfu {mfu}")
        limits = (("time", r["time_limit"]), ("temp", BYTES_LIMIT), ("argument", BYTES_LIMIT))
        over += [
            f"{split}: {what} ratio {r[what + '_ratio']:.3f} > {limit}"
            for what, limit in limits
            if r[what + "_ratio"] > limit
        ]
        over += [f"{split}: losses differ by {r['loss_difference']:.1e}"] * (
            r["loss_difference"] > LOSS_TOLERANCE[r["dtype"]]
        )
    document: dict[str, Any] = {"provenance": "measured", "steps": results}
    if asked.starts:
        document["start"] = s = start_up(asked.starts)
        print(
            f"command to first step, one device: {s['ratio']:.2f} x the hand-written script's (limit {START_LIMIT})"
        )
        over += [f"start-up ratio {s['ratio']:.2f} > {START_LIMIT}"] * (s["ratio"] > START_LIMIT)
    if asked.torch:
        document["torch"] = torch_ratios(asked.torch, rounds=3)
        for r in document["torch"]:
            ours, theirs = r["median_seconds"]["shardlab"], r["median_seconds"]["torch"]
            print(
                f"torch {r['mode']:6} {r['time_ratio']:.3f} x its step: {ours * 1e3:.0f} ms ({r['split']}) against "
                f"{theirs * 1e3:.0f} ms, losses apart {r['loss_difference']:.1e}, load {r['load']:.1f}",
                flush=True,
            )
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n")
    for line in over:
        print(f"over its limit: {line}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
