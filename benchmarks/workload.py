"""What every program of this benchmark computes on: the sizes, the weights by name, one batch. NumPy only.

Two models: a decoder transformer, whose feed-forward layers may be mixtures of experts, and a convolutional network.

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
    layer_{i}.router       (embed, experts)              of a mixture of experts, whose gate, up and down have a dim
                                                         of experts before the others
    norm                   (embed,)                      scale of the last RMSNorm
    unembedding            (embed, vocab)

Query head h reads key/value head h // (heads // kv_heads).

    enter                  (kernel, kernel, channels, embed)        images: the convolution that enters
    block_{s}_{i}.norm     (embed,)                                 block i of stage s
    block_{s}_{i}.up       (kernel, kernel, embed, mlp)
    block_{s}_{i}.down     (mlp, embed)
    norm                   (embed,)
    leave                  (embed, classes)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also for an interpreter without shardlab

from experiments.malloc import keep_freed_memory


@dataclass(frozen=True)
class Training:
    """What the optimizer is told."""

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


@dataclass(frozen=True)
class Sizes(Training):
    """Sizes of the transformer and the batch. The defaults have 3,279,104 parameters, 4,096 tokens a step."""

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
    experts: int = 0
    """Experts of each feed-forward layer; 0: it is dense."""
    top: int = 2
    capacity: float = 1.25
    balance: float = 0.01
    """Factor of the auxiliary loss that balances the experts."""


@dataclass(frozen=True)
class Images(Training):
    """Sizes of the convolutional network and the batch."""

    height: int = 64
    width: int = 64
    channels: int = 3
    embed: int = 32
    mlp: int = 64
    kernel: int = 3
    layers: int = 2
    """Blocks of a stage."""
    stages: int = 2
    classes: int = 10
    batch: int = 8
    dtype: str = "float32"


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


MIXTURE = Sizes(mlp=384, experts=8)
"""The sizes of configs/moe_quick.py: 8 experts, of which a token chooses 2."""


def weight_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of the transformer, in the order of use."""
    D, H, J, K, F = sizes.embed, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.mlp
    many = (sizes.experts,) if sizes.experts else ()
    shapes: dict[str, tuple[int, ...]] = {"embedding": (sizes.vocab, D)}
    for i in range(sizes.layers):
        layer = {
            "norm_1": (D,),
            "query": (D, H, K),
            "key": (D, J, K),
            "value": (D, J, K),
            "output": (H, K, D),
            "norm_2": (D,),
        }
        layer |= {"router": (D, sizes.experts)} if many else {}
        layer |= {"gate": (*many, D, F), "up": (*many, D, F), "down": (*many, F, D)}
        shapes |= {f"layer_{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"norm": (D,), "unembedding": (D, sizes.vocab)}


def image_weight_shapes(sizes: Images) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of the convolutional network, in the order of use."""
    k, D, F = sizes.kernel, sizes.embed, sizes.mlp
    shapes: dict[str, tuple[int, ...]] = {"enter": (k, k, sizes.channels, D)}
    for at in (f"{s}_{i}" for s in range(sizes.stages) for i in range(sizes.layers)):
        shapes |= {
            f"block_{at}.norm": (D,),
            f"block_{at}.up": (k, k, D, F),
            f"block_{at}.down": (F, D),
        }
    return shapes | {"norm": (D,), "leave": (D, sizes.classes)}


def initial_weights(sizes: Sizes | Images, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights by name: ones for norms, normal with deviation 1/sqrt(fan-in) for matrices (embedding: 1)."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    shapes = image_weight_shapes(sizes) if isinstance(sizes, Images) else weight_shapes(sizes)
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
            continue
        last = name.split(".")[-1]
        summed = shape[:2] if last == "output" else shape[:-1] if len(shape) == 4 else shape[-2:-1]
        if last in ("query", "key", "value"):
            summed = shape[:1]
        fan_in = 1 if last == "embedding" else int(np.prod(summed))
        weights[name] = (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
    return weights


def sample_batch(sizes: Sizes | Images, seed: int = 0) -> dict[str, np.ndarray]:
    """Of a transformer {"tokens", "labels"}: int32 (batch, length) from a seeded random walk over the vocabulary, so there is
    something to learn; labels are the tokens one position later. Of images {"pixels", "labels"}: noise, float32 (batch,
    height, width, channels), of which the label's share of the rows, int32 (batch,), is brighter.
    """
    rng = np.random.default_rng(seed)
    if isinstance(sizes, Images):
        pixels = rng.standard_normal((sizes.batch, sizes.height, sizes.width, sizes.channels))
        labels = rng.integers(0, sizes.classes, sizes.batch)
        bright = np.arange(sizes.height)[None] * sizes.classes < labels[:, None] * sizes.height
        pixels += bright[:, :, None, None]
        return {"pixels": pixels.astype(np.float32), "labels": labels.astype(np.int32)}
    walk = np.cumsum(rng.integers(-2, 4, (sizes.batch, sizes.length + 1)), axis=1) % sizes.vocab
    return {"tokens": walk[:, :-1].astype(np.int32), "labels": walk[:, 1:].astype(np.int32)}


__all__ = [
    "MIXTURE",
    "TRANSFORMER_85M",
    "Images",
    "Sizes",
    "Training",
    "image_weight_shapes",
    "initial_weights",
    "keep_freed_memory",
    "sample_batch",
    "weight_shapes",
]
