"""The same training step in PyTorch on CPU: eager in one process, DDP or FSDP2 in two processes over gloo.

Same mathematics, weights, batch and optimizer as hand_written.py (see workload.py). Needs `torch` (an optional extra);
numpy is its only other import. Prints one JSON line:

    python benchmarks/torch_reference.py --mode eager --steps 5
    python benchmarks/torch_reference.py --mode ddp            (or fsdp: two processes, half the cores each)

`--inputs FILE.npz` replaces the weights and the batch: weights under their names, and `tokens` and `labels`.
"""

# ruff: noqa: E402 (the clock starts before the heavy imports)

from __future__ import annotations

import time

_STARTED = time.perf_counter()

import argparse
import json
import math
import os
import socket
import statistics
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from workload import Sizes, initial_weights, keep_freed_memory, sample_batch

PROCESSES = {"eager": 1, "ddp": 2, "fsdp": 2}


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first half of head_dim against the second; x (batch, length, heads, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Layer(nn.Module):
    """One decoder layer holding its weights in the shapes of workload.py, flattened to matrices."""

    def __init__(self, sizes: Sizes, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.sizes = sizes
        flat = {
            n: w.reshape(-1, sizes.embed) if n == "output" else w.reshape(w.shape[0], -1)
            for n, w in weights.items()
        }
        for name, w in flat.items():
            # nn.functional.linear takes (out, in); a norm's scale stays a vector.
            value = weights[name] if name.startswith("norm") else w.T
            self.register_parameter(name, nn.Parameter(torch.from_numpy(np.array(value, order="C"))))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (B, L, D) = self.sizes, x.shape
        h = F.rms_norm(x, (D,), self.norm_1, s.norm_eps)
        q = rope(F.linear(h, self.query).view(B, L, s.heads, s.head_dim), cos, sin)
        k = rope(F.linear(h, self.key).view(B, L, s.kv_heads, s.head_dim), cos, sin)
        v = F.linear(h, self.value).view(B, L, s.kv_heads, s.head_dim)
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=s.heads != s.kv_heads,
        )
        x = x + F.linear(o.transpose(1, 2).reshape(B, L, -1), self.output)
        h = F.rms_norm(x, (D,), self.norm_2, s.norm_eps)
        return x + F.linear(F.silu(F.linear(h, self.gate)) * F.linear(h, self.up), self.down)


class Transformer(nn.Module):
    """The decoder transformer; `forward` gives the mean cross-entropy in nats."""

    def __init__(self, sizes: Sizes, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Parameter(torch.from_numpy(np.array(weights["embedding"])))
        of_layer = [{} for _ in range(sizes.layers)]
        for name, w in weights.items():
            if name.startswith("layer_"):
                prefix, last = name.split(".")
                of_layer[int(prefix[len("layer_") :])][last] = w
        self.layers = nn.ModuleList(Layer(sizes, w) for w in of_layer)
        self.norm = nn.Parameter(torch.from_numpy(np.array(weights["norm"])))
        self.unembedding = nn.Parameter(torch.from_numpy(np.array(weights["unembedding"].T, order="C")))
        frequency = sizes.theta ** (-np.arange(0, sizes.head_dim, 2, dtype=np.float64) / sizes.head_dim)
        angle = np.arange(sizes.length, dtype=np.float64)[:, None, None] * frequency
        self.cos, self.sin = (torch.from_numpy(f(angle).astype(np.float32)) for f in (np.cos, np.sin))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        x = F.rms_norm(x, (self.sizes.embed,), self.norm, self.sizes.norm_eps)
        return F.cross_entropy(F.linear(x, self.unembedding).flatten(0, 1), labels.flatten())


def learning_rate(sizes: Sizes, step: int) -> float:
    """Warm-up from 0 to peak, then cosine to floor * peak: optax.warmup_cosine_decay_schedule."""
    if step < sizes.warmup:
        return sizes.peak * step / sizes.warmup
    part = min(1.0, (step - sizes.warmup) / (sizes.steps - sizes.warmup))
    return sizes.peak * (sizes.floor + (1 - sizes.floor) * 0.5 * (1 + math.cos(math.pi * part)))


def make_optimizer(model: nn.Module, sizes: Sizes, kind: str) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; `kind` is "fused" or "foreach"."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": sizes.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(sizes.b1, sizes.b2),
        eps=sizes.eps,
        fused=kind == "fused",
        foreach=kind == "foreach",
    )


def wrap(model: Transformer, mode: str) -> nn.Module:
    """The model as `mode` trains it: itself, in DDP, or with every layer and the root fully sharded (FSDP2)."""
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if mode == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (PROCESSES[mode],))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def load(sizes: Sizes, path: str | None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights by name and the batch, from an npz file or freshly drawn."""
    if path is None:
        return initial_weights(sizes), sample_batch(sizes)
    arrays = dict(np.load(path))
    batch = {name: arrays.pop(name) for name in ("tokens", "labels")}
    return arrays, batch


def train(rank: int, args: argparse.Namespace, sizes: Sizes, port: int) -> None:
    """Run the steps in process `rank`; rank 0 prints the JSON line."""
    world = PROCESSES[args.mode]
    memory_kept = args.memory == "keep" and keep_freed_memory()
    torch.set_num_threads(max(1, args.threads // world))
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world)
    weights, batch = load(sizes, args.inputs)
    rows = slice(rank * sizes.batch // world, (rank + 1) * sizes.batch // world)
    tokens, labels = (torch.from_numpy(batch[n][rows]).long() for n in ("tokens", "labels"))
    model = wrap(Transformer(sizes, weights), args.mode)
    optimizer = make_optimizer(model, sizes, args.optimizer)
    seconds, cpu_seconds, losses, first = [], [], [], 0.0
    for i in range(args.steps + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(sizes, i)
        loss = model(tokens, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), sizes.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = loss.detach()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
        if i == 0:
            first = time.perf_counter() - _STARTED
        else:
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    if rank == 0:
        result = {
            "program": "torch",
            "version": torch.__version__,
            "mode": args.mode,
            "processes": world,
            "optimizer": args.optimizer,
            "parameters": sum(int(np.prod(w.shape)) for w in weights.values()),
            "start_to_first_step_s": round(first, 3),
            "median_step_s": round(statistics.median(seconds), 4),
            "min_step_s": round(min(seconds), 4),
            "median_step_cpu_s_of_rank_0": round(statistics.median(cpu_seconds), 4),
            "freed_memory_kept": memory_kept,
            "losses": losses,
            "sizes": asdict(sizes),
        }
        print(json.dumps(result), flush=True)
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    """Time one mode and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mode", choices=tuple(PROCESSES), default="eager")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--optimizer", choices=("fused", "foreach"), default="fused")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="cores shared by all processes"
    )
    parser.add_argument(
        "--memory", choices=("keep", "return"), default="keep", help="freed memory: see workload.py"
    )
    parser.add_argument("--inputs", default=None, help="npz of weights by name, tokens and labels")
    args = parser.parse_args()
    sizes = Sizes()
    if PROCESSES[args.mode] == 1:
        train(0, args, sizes, port=0)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train, (args, sizes, port), nprocs=PROCESSES[args.mode])


if __name__ == "__main__":
    main()
