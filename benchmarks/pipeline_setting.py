"""What a pipeline is measured on: schedules, model, and the experiment of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.config import Devices, Experiment, load
from experiments.records import Records
from models.transformer_config import TransformerConfig
from sharding.axes import MeshShape
from sharding.pipeline.grid import Schedule
from sharding.rule import Rules
from sharding.schedules.breadth_first import BreadthFirst
from sharding.schedules.gpipe import GPipe
from sharding.schedules.interleaved import Interleaved
from sharding.schedules.one_f_one_b import OneFOneB
from sharding.schedules.zbv import ZBV
from sharding.schedules.zero_bubble import ZeroBubble

HERE = Path(__file__).resolve().parent
STAGES = 4
SCHEDULES: dict[str, type] = {
    "gpipe": GPipe,
    "1f1b": OneFOneB,
    "interleaved": Interleaved,
    "breadth-first": BreadthFirst,
    "zb-h1": ZeroBubble,
    "zb-v": ZBV,
}
MODEL = TransformerConfig(
    vocab=256, layers=8, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, length=128
)


def experiment(
    schedule: Schedule | None, model: TransformerConfig = MODEL, microbatches: int = 1
) -> Experiment:
    """The workload with a schedule, one row a micro-batch; without one, on one device."""
    m = microbatches if schedule is None else schedule.microbatches
    stage = 1 if schedule is None else STAGES
    return replace(
        load(HERE.parent / "configs" / "quickstart.py"),
        name="pipeline",
        model=model,
        rules=Rules(),
        mesh=MeshShape(stage=stage),
        devices=Devices("pretend", stage),
        pipeline=schedule,
        accumulate=m if schedule is None else 1,
        batch=m,
    )


def write(records: Records | None, kind: str, provenance: Any, values: dict[str, Any]) -> None:
    """One record, where there is a file for it."""
    if records is not None:
        records.write(kind, provenance, values)
