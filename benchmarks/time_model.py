"""Modelled against measured step time on 8 pretend devices: the one place where the time model can be held to a clock.

Rates are measured first (`experiments.plans.rates`), then each case's step is modelled with them and run: medians of a few
steps. Read the ratios only; the machine's own speed varies between runs. `docs/plan_time.md` has the figures of one.

    python benchmarks/time_model.py --json ratios.json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from experiments.config import Experiment
from experiments.malloc import keep_freed_memory
from sharding.axes import MeshShape

DEVICES = 8
CASES: dict[str, tuple[str, dict[str, Any], MeshShape | None]] = {
    "quickstart, a quarter": ("quickstart", {"embed": 64, "heads": 2, "kv_heads": 2}, None),
    "quickstart": ("quickstart", {}, None),
    "quickstart, data": ("quickstart", {}, MeshShape(data=8)),
    "quickstart, fsdp": ("quickstart", {}, MeshShape(fsdp=8)),
    "moe_quick": ("moe_quick", {}, None),
    "digits_mlp": ("digits_mlp", {}, None),
    "digits_mlp, 32 times as wide": ("digits_mlp", {"embed": 1024, "mlp": 4096}, None),
}
"""What is run: a config, changes of its model, and another mesh."""


def experiment(name: str) -> Experiment:
    """The experiment of a case."""
    config, changes, mesh = CASES[name]
    made = importlib.import_module(f"configs.{config}").config()
    known = {f.name for f in dataclasses.fields(made.model)}
    model = dataclasses.replace(made.model, **{k: v for k, v in changes.items() if k in known})
    return dataclasses.replace(made, model=model, mesh=mesh or made.mesh)


def compare(name: str, target: Any, steps: int) -> dict[str, Any]:
    """Modelled and measured seconds of one case, and their ratio."""
    import jax

    from experiments.assemble import train_step
    from sharding.ledger import collectives
    from sharding.price.standins import grid
    from sharding.price.timing import modelled
    from sharding.price.work import work

    e = experiment(name)
    step = train_step(e, jax.devices()[:DEVICES])
    abstract = step.abstract_batch(e.batch)
    jaxpr = jax.make_jaxpr(step.update)(step.abstract_state(), abstract)
    found = collectives(jaxpr, step.split.layouts.sizes)
    model = modelled(work(jaxpr), found, target, grid(e.mesh.resolve(DEVICES), target))
    state, batch = step.init(0), _batch(step, abstract)
    taken = []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        state, metrics = step.step(state, batch)
        jax.block_until_ready((state, metrics))
        taken.append(time.perf_counter() - begun)
    seconds = statistics.median(taken[2:])
    parts = {"compute": model.compute, "collectives": model.collectives}
    row = {"case": name, "mesh": e.mesh.describe(), "measured": seconds, "modelled": model.step, **parts}
    return {**row, "ratio": (model.step or 0.0) / seconds, "bottleneck": model.bottleneck}


def _batch(step: Any, abstract: Any) -> dict[str, Any]:
    """Random small whole numbers and fractions in the step's own layout."""
    import jax
    import numpy as np

    draw, lies = np.random.default_rng(0), step.batch_shardings()
    made = {}
    for key, x in abstract.items():
        whole = np.issubdtype(x.dtype, np.integer)
        values = draw.integers(0, 8, x.shape) if whole else draw.random(x.shape)
        made[key] = jax.device_put(values.astype(x.dtype), lies[key])
    return made


def main() -> None:
    """Print the ratios of all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    import jax

    keep_freed_memory()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    from experiments.plans.rates import measured
    from sharding.price.target import parse_target

    begun = time.perf_counter()
    target = measured(parse_target(f"cpu:{DEVICES}"))
    m = target.machine
    print(
        f"rates in {time.perf_counter() - begun:.1f} s, load {os.getloadavg()[0]:.1f}: a device multiplies "
        f"{m.flops['float32'] / 1e9:.1f} GFLOP/s in float32 and {m.flops['bfloat16'] / 1e9:.1f} in bfloat16, moves "
        f"{(m.memory_bandwidth or 0) / 1e9:.2f} GB/s, sends {(m.inside.bandwidth or 0) / 1e9:.2f} GB/s, starts a collective "
        f"in {(m.inside.start or 0) * 1e6:.0f} us"
    )
    rows = []
    for name in CASES:
        rows.append(row := compare(name, target, asked.steps))
        print(
            f"{name:30} {row['mesh']:26} measured {row['measured'] * 1e3:8.1f} ms, modelled {row['modelled'] * 1e3:8.1f} ms "
            f"({row['compute'] * 1e3:.1f} + {row['collectives'] * 1e3:.1f}), modelled / measured {row['ratio']:.2f}",
            flush=True,
        )
    ratios = [r["ratio"] for r in rows]
    print(f"median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    if asked.json:
        asked.json.write_text(json.dumps({"rates": dataclasses.asdict(m), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
