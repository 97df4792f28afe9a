"""The quickstart's transformer in a pipeline of four stages on 8 pretend devices, each stage's parameters split over two.

Claim:    the schedule is a value beside the mesh: the same model, rules and data, and the loss of the run without stages.
Command:  shardlab train configs/pipeline_quick.py
Cost:     1.0 s a step on 2 CPU cores (measured over 20 steps), 120 steps
Result:   the losses of the same run without stages, but for rounding; with `--pipeline gpipe` or `zb-h1` likewise
"""

from __future__ import annotations

from dataclasses import replace

from configs import quickstart
from experiments.config import Experiment
from sharding.axes import MeshShape
from sharding.rules.fsdp import fsdp
from sharding.schedules.one_f_one_b import OneFOneB


def config() -> Experiment:
    """The experiment."""
    return replace(
        quickstart.config(),
        name="pipeline-quick",
        rules=fsdp(),
        mesh=MeshShape(stage=4, fsdp=2),
        pipeline=OneFOneB(microbatches=8),
    )
