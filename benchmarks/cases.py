"""What is measured: for each split the workload, its hand-written step, and the same as an experiment of shardlab."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workload import MIXTURE, Images, Sizes, initial_weights, sample_batch

HERE = Path(__file__).resolve().parent

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


@dataclass(frozen=True)
class Case:
    """One split to be measured, and the most that shardlab's step may take as a multiple of the hand-written one."""

    sizes: Sizes | Images
    reference: str
    """Module of the hand-written step."""
    shared: bool = False
    """Whether it has steps for several splits, and is told which."""
    time: float = 1.05


LONG = Sizes(batch=2, length=2048)
"""The same tokens in longer sequences: 256 positions on each of 8 devices."""

CASES = {
    "one": Case(Sizes(), "hand_written", True, 1.03),
    "data": Case(Sizes(), "hand_written", True, 1.03),
    "fsdp": Case(Sizes(), "hand_written", True, 1.03),
    "tensor": Case(Sizes(), "hand_written", True),
    "context": Case(LONG, "hand_written_ring"),
    "sequence": Case(Sizes(), "hand_written_sequence", True),
    "ulysses": Case(Sizes(), "hand_written_sequence", True),
    "expert": Case(MIXTURE, "hand_written_expert"),
    "spatial": Case(Images(), "hand_written_spatial"),
}


def experiment(split: str, sizes: Sizes | Images) -> Any:
    """The workload as an experiment: the quickstart config with this benchmark's split, sizes and optimizer."""
    from experiments.config import Devices, load
    from models.convnet_config import ConvNetConfig
    from models.moe_config import MoEConfig
    from models.transformer_config import TransformerConfig
    from sharding.axes import MeshShape
    from sharding.rule import Rules
    from sharding.rules.context import context
    from sharding.rules.data import data
    from sharding.rules.expert import expert
    from sharding.rules.fsdp import fsdp
    from sharding.rules.sequence import sequence
    from sharding.rules.spatial import spatial
    from sharding.rules.tensor import tensor
    from sharding.rules.ulysses import ulysses

    splits = {
        "one": (Rules(), MeshShape()),
        "data": (data(), MeshShape(data=8)),
        "fsdp": (fsdp(), MeshShape(fsdp=8)),
        "tensor": (data() | tensor(), MeshShape(data=2, tensor=4)),
        "context": (context(), MeshShape(context=8)),
        "sequence": (data() | tensor() | sequence(), MeshShape(data=2, tensor=4)),
        "ulysses": (data() | ulysses(), MeshShape(data=2, context=4)),
        "expert": (data() | expert(), MeshShape(data=2, expert=4)),
        "spatial": (data() | spatial(), MeshShape(data=2, context=4)),
        "data2": (data(), MeshShape(data=2)),
        "fsdp2": (fsdp(), MeshShape(fsdp=2)),
    }
    rules, mesh = splits[split]
    if isinstance(sizes, Images):
        kind: Any = ConvNetConfig
        shared = "height width channels embed mlp kernel layers stages classes"
    else:
        kind, shared = (
            TransformerConfig,
            "vocab layers embed heads kv_heads head_dim mlp length dtype theta",
        )
        if sizes.experts:
            kind, shared = MoEConfig, f"{shared} experts top capacity balance"
    return replace(
        load(HERE.parent / "configs" / "quickstart.py"),
        model=kind(**{name: getattr(sizes, name) for name in shared.split()}),
        rules=rules,
        mesh=mesh,
        devices=Devices("pretend", mesh.devices),
        batch=sizes.batch,
        steps=sizes.steps,
    )


def parameters(weights: dict[str, Any], sizes: Sizes | Images) -> dict[str, Any]:
    """The workload's weights as shardlab's parameters, path -> array: layers stacked, gate and up as one."""
    import numpy as np

    if isinstance(sizes, Images):
        stacked = lambda s, name: np.stack([weights[f"block_{s}_{i}.{name}"] for i in range(sizes.layers)])
        held = {name: weights[name] for name in ("enter", "norm", "leave")}
        return held | {
            f"blocks{s}.{name}": stacked(s, name)
            for s in range(sizes.stages)
            for name in ("norm", "up", "down")
        }
    per_layer = lambda name: np.stack([weights[f"layer_{i}.{name}"] for i in range(sizes.layers)])
    held = {"table": weights["embedding"], "norm": weights["norm"], "unembed": weights["unembedding"]}
    names = NAMES | ({"mlp.router": "router"} if sizes.experts else {})
    held |= {f"layers.{ours}": per_layer(theirs) for ours, theirs in names.items()}
    return held | {"layers.mlp.gate_up": np.stack([per_layer("gate"), per_layer("up")], axis=-2)}


def build_ours(split: str, sizes: Sizes | Images, weights: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """(jitted step, state, batch) of shardlab, from the workload's weights and batch."""
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
    held = parameters(initial_weights(sizes) if weights is None else weights, sizes)
    state["params"] = {p: jax.device_put(held[p], old.sharding) for p, old in state["params"].items()}
    rows = sample_batch(sizes)
    rows |= {"weights": np.ones(rows["labels"].shape, np.float32)}
    batch = {k: jax.device_put(v, step.batch_shardings()[k]) for k, v in rows.items()}
    return step.step, state, batch


def build_theirs(split: str, sizes: Sizes | Images, weights: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """(jitted step, state, batch) of the hand-written program for a split."""
    from importlib import import_module

    case = CASES[split]
    which = (split,) if case.shared else ()
    step, state, put = import_module(case.reference).build(*which, sizes, weights)
    return step, state, put(sample_batch(sizes))


__all__ = ["CASES", "Case", "build_ours", "build_theirs", "experiment", "parameters"]
