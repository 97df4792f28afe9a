"""What every program of this benchmark computes on: the sizes, the weights by name, one batch. NumPy only.

Weights are a flat dict by name (numpy or jax, float32), so that any other program can start from the same ones:

    embedding              (vocab, embed)
    layer_{i}.norm_1       (embed,)                      scale of the RMSNorm before attention
    layer_{i}.query        (embed, heads, head_dim)
    layer_{i}.key          (embed, kv_heads, head_dim)
    layer_{i}.value        (embed, kv_heads, head_dim)
    layer_{i}.output       (heads, head_dim, embed)
    layer_{i}.norm_2       (embed,)                      scale of the RMSNorm before the MLP
    layer_{i}.gate, .up    (embed, mlp)
    layer_{i}.down         (mlp, embed)
    norm                   (embed,)                      scale of the last RMSNorm
    unembedding            (embed, vocab)

Query head h reads key/value head h // (heads // kv_heads).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also for an interpreter without shardlab

from experiments.malloc import keep_freed_memory


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, the batch and the optimizer. The defaults have 3,279,104 parameters, 4,096 tokens a step."""

    vocab: int = 256
    embed: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    mlp: int = 768
    batch: int = 16
    length: int = 256
    theta: float = 10_000.0
    dtype: str = "float32"
    norm_eps: float = 1e-6
    steps: int = 1000
    warmup: int = 20
    peak: float = 3e-3
    floor: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


TRANSFORMER_85M = Sizes(
    embed=768,
    layers=12,
    heads=12,
    kv_heads=12,
    head_dim=64,
    mlp=2048,
    batch=32,
    length=1024,
    dtype="bfloat16",
)
"""The sizes of configs/transformer_85m.py, for an accelerator."""


def weight_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight, in the order of use."""
    D, H, J, K, F = sizes.embed, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.mlp
    shapes: dict[str, tuple[int, ...]] = {"embedding": (sizes.vocab, D)}
    for i in range(sizes.layers):
        layer = {
            "norm_1": (D,),
            "query": (D, H, K),
            "key": (D, J, K),
            "value": (D, J, K),
            "output": (H, K, D),
        }
        layer |= {"norm_2": (D,), "gate": (D, F), "up": (D, F), "down": (F, D)}
        shapes |= {f"layer_{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"norm": (D,), "unembedding": (D, sizes.vocab)}


def initial_weights(sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights by name: ones for norms, normal with deviation 1/sqrt(fan-in) for matrices (embedding: 1)."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for name, shape in weight_shapes(sizes).items():
        if len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
            continue
        fan_in = {"output": sizes.heads * sizes.head_dim, "embedding": 1}.get(name.split(".")[-1], shape[0])
        weights[name] = (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
    return weights


def sample_batch(sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """{"tokens", "labels"}: int32 (batch, length) from a seeded random walk over the vocabulary, so there is something
    to learn; labels are the tokens one position later.
    """
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.integers(-2, 4, (sizes.batch, sizes.length + 1)), axis=1) % sizes.vocab
    return {"tokens": walk[:, :-1].astype(np.int32), "labels": walk[:, 1:].astype(np.int32)}


__all__ = [
    "TRANSFORMER_85M",
    "Sizes",
    "initial_weights",
    "keep_freed_memory",
    "sample_batch",
    "weight_shapes",
]
