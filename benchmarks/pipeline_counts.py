"""A pipeline's compiled memory beside what its grid counts, its FLOPs, and what it takes to compile."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

from pipeline_setting import MODEL, SCHEDULES, STAGES, experiment, write

from experiments.records import Records
from sharding.pipeline.clocks import stash
from sharding.schedules.one_f_one_b import OneFOneB

LIMIT = 1.02
"""Of FLOPs over those of one device's step."""


def memory(asked: argparse.Namespace, records: Records | None) -> list[str]:
    """Print and write compiled and counted bytes and what compiling took."""
    import jax
    import pipeline_tasks

    from experiments.assemble import train_step

    print(f"{'schedule':14}{'M':>4}{'compiled':>12}{'counted':>12}{'stash':>7}{'compile':>9}")
    for name in asked.schedules:
        for m in asked.memory:
            schedule = SCHEDULES[name](microbatches=m)
            step = train_step(experiment(schedule), jax.devices()[:STAGES])
            counted = pipeline_tasks.counted(step, m)
            temp, seconds = _compiled(step, m)
            most = max(stash(schedule.grid(STAGES)))
            where = {"schedule": name, "stages": STAGES, "microbatches": m}
            print(
                f"{name:14}{m:4}{temp / 2**20:9.1f}MiB{sum(counted.values()) / 2**20:9.1f}MiB{most:7}{seconds:8.1f}s",
                flush=True,
            )
            write(records, "pipeline_memory", "compiled", {**where, "temp_bytes": temp})
            of = {"counted_bytes": sum(counted.values()), "buffers": counted, "stash": most}
            write(records, "pipeline_buffers", "modelled", where | of)
            write(
                records, "pipeline_compile", "measured", {**where, "layers": MODEL.layers, "seconds": seconds}
            )
    for layers in asked.layers:
        model = replace(MODEL, layers=layers, loop="scan")
        step = train_step(experiment(OneFOneB(microbatches=16), model), jax.devices()[:STAGES])
        seconds = _compiled(step, 16)[1]
        print(f"1f1b, 16 micro-batches, {layers} layers as a scan: compiled in {seconds:.1f} s", flush=True)
        where = {"schedule": "1f1b", "stages": STAGES, "microbatches": 16, "layers": layers}
        write(records, "pipeline_compile", "measured", {**where, "seconds": seconds})
    return []


def _compiled(step: Any, rows: int) -> tuple[int, float]:
    """Bytes of scratch memory on a device, seconds of lowering and compiling."""
    begun = time.perf_counter()
    made = step.step.lower(step.abstract_state(), step.abstract_batch(rows)).compile()
    return made.memory_analysis().temp_size_in_bytes, time.perf_counter() - begun


def work(asked: argparse.Namespace, records: Records | None) -> list[str]:
    """Print and write FLOPs of the traced step without the slots that only fill the bubble, over those of one device's step."""
    import jax
    import pipeline_flops

    from experiments.assemble import one_device, train_step
    from sharding.ledger import flops

    m, over = 8, []
    for remat in ("none", "full"):
        model = replace(MODEL, remat=remat)
        alone = one_device(experiment(None, model, m))
        whole = flops(jax.make_jaxpr(alone.update)(alone.abstract_state(), alone.abstract_batch(m)))
        for name in asked.schedules:
            schedule = SCHEDULES[name](microbatches=m)
            step, grid = (
                train_step(experiment(schedule, model), jax.devices()[:STAGES]),
                schedule.grid(STAGES),
            )
            traced = flops(jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(m)))
            each, slots = pipeline_flops.flops_of_tasks(step, m)
            if (sum_of := sum(each[s] * n for s, n in slots.items())) != traced:
                raise AssertionError(f"{name}: the slots have {sum_of} FLOPs, the step {traced}")
            once = {"F": m * grid.chunks, "B": m * grid.chunks, "W": m * grid.chunks}
            useful = sum(each[s] * min(n, once.get(s, m)) for s, n in slots.items()) * STAGES
            ratio = useful / whole
            print(
                f"{name:14} remat {remat}: FLOPs without bubble {ratio:.4f} x one device's, with {traced * STAGES / whole:.3f}",
                flush=True,
            )
            values = {"schedule": name, "stages": STAGES, "microbatches": m, "remat": remat}
            numbers = {"flops": traced * STAGES, "useful_flops": useful, "unpipelined_flops": whole}
            write(records, "pipeline_flops", "modelled", values | numbers)
            over += [f"{name}, remat {remat}: {ratio:.3f} x the FLOPs > {LIMIT}"] * (ratio > LIMIT)
    return over
