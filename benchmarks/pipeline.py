"""A pipeline's step against what the lockstep clock of its grid says, and its memory and FLOPs against the grid's counts.

    python benchmarks/pipeline.py                            every schedule: memory and FLOPs, then the times
    python benchmarks/pipeline.py --only memory --records pipeline_memory.jsonl
    python benchmarks/pipeline.py --only time --rounds 7 --records pipeline_time.jsonl

On 4 pretend devices, which share the machine's cores. Costs are those of each task's own program in a loop on the same devices
(`pipeline_tasks.py`); tasks and steps take turns in one process, and the medians of the rounds count. The prediction is the
lockstep clock's with these costs, plus M times loss and enter, plus a step with no ticks. Memory is the compiler's word
("compiled") beside the bytes of the slots in the grid's tables ("counted"); FLOPs are those of the traced step.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline_counts import memory, work
from pipeline_setting import MODEL, SCHEDULES, STAGES, experiment
from pipeline_times import times

from experiments.config import config_hash
from experiments.malloc import keep_freed_memory
from experiments.records import Header, Records, installed_versions


def _opened(path: Path | None) -> Iterator[Records | None]:
    if path is None:
        yield None
        return
    import jax

    header = Header(
        run=f"pipeline-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}",
        config_hash=config_hash(experiment(None)),
        seed=0,
        versions=installed_versions(),
        device={"platform": "cpu", "kind": jax.devices()[0].device_kind, "count": STAGES, "processes": 1},
        mesh={"stage": STAGES},
        details={
            "name": "pipeline",
            "model": repr(MODEL),
            "rows_of_a_microbatch": 1,
            "cores": os.cpu_count(),
        },
    )
    with Records(path, header) as records:
        yield records


def main() -> int:
    """Print the tables; 1 when something is over its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--microbatches", nargs="+", type=int, default=[4, 8, 16, 32], help="of the times")
    parser.add_argument(
        "--memory", nargs="+", type=int, default=[4, 8, 16, 32, 64], help="micro-batches of the memory"
    )
    parser.add_argument(
        "--layers", nargs="*", type=int, default=[8, 16, 32], help="layers of the time to compile"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", default=["memory", "flops", "time"], choices=["memory", "flops", "time"]
    )
    parser.add_argument("--cache", type=Path, help="keep compiled programs in this folder")
    parser.add_argument("--records", type=Path, help="write records to this file")
    asked = parser.parse_args()
    import jax

    keep_freed_memory()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", STAGES)
    if asked.cache:
        jax.config.update("jax_compilation_cache_dir", str(asked.cache))
    over: list[str] = []
    for records in _opened(asked.records):
        for name, part in (("memory", memory), ("flops", work), ("time", times)):
            if name in asked.only:
                over += part(asked, records)
    for line in over:
        print(f"over its limit: {line}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
