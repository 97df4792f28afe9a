"""The time model: closed forms of the papers on every kind of network, rooflines, overlap, and what it says is missing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import jax
import pytest

from sharding.axes import MeshShape
from sharding.ledger import Collective, collectives
from sharding.price.link_times import Seconds, seconds_of
from sharding.price.links import path
from sharding.price.standins import grid
from sharding.price.target import Target, parse_target
from sharding.price.timing import Modelled, modelled
from sharding.price.work import Work, work
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.tensor import tensor
from sharding.scope import Scope
from tests.support import make_step, model_configs

V = 2**30
"""Bytes of the array that is moved: so many that latency hardly counts."""
W = 5e10
"""Bytes/s of a v5e link in one direction."""


def quick(text: str) -> Target:
    """The target with networks that begin at once: bandwidth alone."""
    target = parse_target(text)
    inside = replace(target.machine.inside, latency=0.0, start=0.0)
    across = replace(target.machine.across, latency=0.0, start=0.0)
    return replace(target, machine=replace(target.machine, inside=inside, across=across))


def seconds(text: str, kind: str, payload: int, axes: str = "fsdp", **sizes: int) -> Seconds:
    target = quick(text)
    along = path(grid(MeshShape(**sizes), target), tuple(axes.split()), target)
    return seconds_of(kind, payload, along, target)


def inside(*args: object, **sizes: int) -> float:
    found = seconds(*args, **sizes)  # pyright: ignore[reportArgumentType]
    assert found.across == 0.0
    assert found.inside is not None
    return found.inside


def test_a_switch_moves_what_the_papers_count() -> None:
    """All-reduce 2V(n-1)/n over the bandwidth, half of it for each of its halves (Patarasuk and Yuan 2009)."""
    n, b = 8, 450e9
    assert inside("gpu:h100:8", "all-reduce", V, fsdp=n) == pytest.approx(2 * V * (n - 1) / n / b)
    assert inside("gpu:h100:8", "reduce-scatter", V, fsdp=n) == pytest.approx(V * (n - 1) / n / b)
    assert inside("gpu:h100:8", "all-gather", V // n, fsdp=n) == pytest.approx(V * (n - 1) / n / b)
    assert inside("gpu:h100:8", "all-to-all", V, fsdp=n) == pytest.approx(V * (n - 1) / n / b)
    assert inside("gpu:h100:8", "permute", V, fsdp=n) == pytest.approx(V / b)


def test_a_closed_torus_gathers_over_both_directions_of_all_its_dims() -> None:
    """V / (W_ICI n_axes) with W_ICI both directions of a link: "How to Scale Your Model", "Sharded Matrices"."""
    assert inside("tpu:v5e:16x16", "all-gather", V // 256, fsdp=256) == pytest.approx(
        V / (2 * W * 2), rel=0.01
    )
    one = inside("tpu:v5e:16x16", "all-gather", V // 16, fsdp=16, data=16)
    assert one == pytest.approx(V / (2 * W), rel=0.07)
    assert inside("tpu:v5e:16x16", "all-reduce", V, fsdp=16, data=16) == pytest.approx(2 * one)


def test_an_open_line_takes_the_books_worked_time() -> None:
    """Pop Quiz 2 there: a quarter of bfloat16[2048, 8192] gathered over 4 chips of a v5e line takes 3 hops of a shard."""
    shard = 2048 * 8192 * 2 // 4
    assert inside("tpu:v5e:4x8", "all-gather", shard, "tensor", fsdp=8, tensor=4) == pytest.approx(
        3 * shard / W
    )


def test_small_arrays_take_their_hops() -> None:
    target = parse_target("tpu:v5e:16x16")
    along = path(grid(MeshShape(data=16, fsdp=16), target), ("fsdp",), target)
    found = seconds_of("all-gather", 16, along, target)
    assert found.inside == pytest.approx(8e-6, rel=0.01), "half way round the ring, a microsecond a hop"


def test_an_all_to_all_is_a_quarter_of_a_gather_on_a_ring() -> None:
    """Of the whole array, both directions counted: the same book's footnote."""
    n = 16
    gather = inside("tpu:v5e:16x16", "all-gather", V // n, data=16, fsdp=16)
    exchange = inside("tpu:v5e:16x16", "all-to-all", V // n, data=16, fsdp=16)
    assert exchange == pytest.approx(gather / 4, rel=0.07)


def test_interleaved_groups_divide_the_links_that_they_share() -> None:
    alone = inside("tpu:v5e:16x16", "all-reduce", V, "fsdp", data=4, fsdp=16, tensor=4)
    shared = inside("tpu:v5e:16x16", "all-reduce", V, "data", data=4, fsdp=16, tensor=4)
    assert shared / alone == pytest.approx(4 * (3 / 4) / (15 / 16))


def test_islands_take_their_share_over_the_slow_network_one_after_the_other() -> None:
    """Hierarchical: 2(V/m)(k-1)/k between k islands of m devices, after and before the island's own halves."""
    found = seconds("gpu:h100:4x8", "all-reduce", V, fsdp=32)
    assert found.across == pytest.approx(2 * (V / 8) * (3 / 4) / 50e9)
    assert found.inside == pytest.approx(2 * V * (7 / 8) / 450e9)
    alone = seconds("gpu:h100:4x8", "all-reduce", V, "data", data=4, fsdp=8)
    assert alone.inside == 0.0
    assert alone.across == pytest.approx(2 * V * (3 / 4) / 50e9)
    hops = seconds("gpu:h100:4x8", "all-to-all", V, fsdp=32)
    assert hops.across == pytest.approx(V * 24 / 32 / 50e9)


def test_a_chips_two_devices_have_their_own_links() -> None:
    pair = inside("tpu:v7x:4x4x4", "all-reduce", V, "tensor", fsdp=64, tensor=2)
    assert pair == pytest.approx(V / 6e11)


def step_of(
    kind: str, rules: object, mesh: MeshShape, layers: int = 2
) -> tuple[list[Work], list[Collective]]:
    config = dataclasses.replace(model_configs()[kind], layers=layers)
    step = make_step(config, rules, mesh)  # pyright: ignore[reportArgumentType]
    jaxpr = jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(16))
    return work(jaxpr), collectives(jaxpr, mesh.sizes())


def model(text: str, rules: object, mesh: MeshShape, **more: float) -> Modelled:
    target = quick(text)
    return modelled(*step_of("transformer", rules, mesh), target, grid(mesh, target), **more)  # pyright: ignore[reportArgumentType]


def parameters() -> int:
    step = make_step(dataclasses.replace(model_configs()["transformer"], layers=2))
    return sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(jax.eval_shape(lambda s: s["params"], step.abstract_state()))
    )


def spent(found: Modelled, axis: str, *, largest: int) -> float:
    """Seconds of the collectives of arrays over `axis`, without those of a few numbers (losses, counts)."""
    return sum(c.seconds or 0.0 for c in found.moved if c.axes == (axis,) and c.bytes / c.times > largest)


def test_data_parallel_takes_its_closed_form() -> None:
    """2P(n-1)/n over the bandwidth."""
    found = model("gpu:h100:8", data(), MeshShape(data=8))
    assert spent(found, "data", largest=64) == pytest.approx(2 * parameters() * 7 / 8 / 450e9, rel=0.01)


def test_fully_sharded_takes_its_closed_form() -> None:
    """3P(n-1)/n: gathered in both passes, reduced and scattered once (ZeRO, Rajbhandari et al. 2020); arrays that fsdp leaves
    whole are reduced as in data parallel.
    """
    config = replace(model_configs()["transformer"], layers=2, remat="full")
    mesh = MeshShape(fsdp=8)
    step = make_step(config, data() | fsdp(), mesh)
    jaxpr = jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(16))
    target = quick("gpu:h100:8")
    found = modelled(work(jaxpr), collectives(jaxpr, mesh.sizes()), target, grid(mesh, target))
    total = spent(found, "fsdp", largest=64) * 450e9 / (7 / 8) / parameters()
    assert 2.0 <= total <= 3.0


def test_megatron_takes_four_all_reduces_a_layer() -> None:
    """Shoeybi et al. 2019: two in each pass, of the activations."""
    found = model("gpu:h100:8", data() | tensor(), MeshShape(data=2, tensor=4))
    rows = [c for c in found.moved if c.axes == ("tensor",) and c.layers and c.kind == "all-reduce"]
    assert sum(c.times for c in rows) == 4 * 2
    one = {c.seconds / c.times for c in rows if c.seconds}
    assert max(one) == pytest.approx(min(one))


WORK = Work("product", "bfloat16", "", 10**12, 10**9, 3, Scope("forward", 2, "einsum", ""))
SENT = Collective(
    "all-gather", ("fsdp",), 8, "bfloat16", (2**24,), 3, 3 * 7 * 2**25, "x.py:1", "einsum", WORK.scope
)


def one(works: list[Work], moved: list[Collective], text: str = "gpu:h100:8", **more: object) -> Modelled:
    target = quick(text)
    mesh = MeshShape(fsdp=target.devices)
    return modelled(works, moved, target, grid(mesh, target), **more)  # pyright: ignore[reportArgumentType]


def test_an_op_takes_the_longer_of_arithmetic_and_memory() -> None:
    assert one([WORK], []).step == pytest.approx(3 * 10**12 / 989.4e12)
    assert one([WORK], []).ops[0].limit == "arithmetic"
    slow = replace(WORK, bytes=10**10)
    assert one([slow], []).step == pytest.approx(3 * 10**10 / 3350e9)
    assert one([slow], []).ops[0].limit == "memory"
    assert one([replace(WORK, dtype="float32")], []).step == pytest.approx(3 * 10**12 / 494.7e12)
    assert one([WORK], []).mfu == pytest.approx(1.0)
    assert one([WORK], [], model_flops=1.5e12).mfu == pytest.approx(0.5)


def test_the_step_is_the_sum_less_what_is_hidden_stretched_by_the_bubble() -> None:
    gather, product = 3 * 7 * 2**25 / 450e9, 3 * 10**12 / 989.4e12
    assert one([WORK], [SENT]).step == pytest.approx(gather + product)
    half = one([WORK], [SENT], overlap={(("fsdp",), "all-gather"): 0.5})
    assert half.step == pytest.approx(gather / 2 + product)
    little = one([replace(WORK, flops=10**10, bytes=1)], [SENT], overlap={(("fsdp",), "all-gather"): 1.0})
    assert little.step == pytest.approx(gather), "no more is hidden than there is to hide behind"
    assert one([WORK], [SENT], bubble=0.25).step == pytest.approx((gather + product) / 0.75)
    with pytest.raises(ValueError, match="bubble"):
        one([WORK], [SENT], bubble=1.0)


def test_the_bottleneck_is_one_sentence_with_its_share() -> None:
    told = one([replace(WORK, flops=10**9, bytes=1)], [SENT]).bottleneck
    assert told.startswith("The all-gathers over fsdp on NVLink take 100 % of the modelled step")
    assert "tokens" in told
    assert one([WORK], []).bottleneck.startswith("The matrix products take 100 %")
    hosts = one([WORK], [replace(SENT, devices=32)], "gpu:h100:16x2").bottleneck
    assert "on the network between hosts" in hosts
    assert "keep fsdp within an island" in hosts
    assert "wait for memory" in one([replace(WORK, bytes=10**11)], []).bottleneck


def test_a_missing_figure_is_told_and_never_guessed() -> None:
    found = one([WORK], [SENT], "cpu:8")
    assert found.step is None
    assert found.mfu is None
    assert "figure of the machine is missing" in found.bottleneck
    assert any("rate of bfloat16 products" in m for m in found.missing)
    assert any("memory bandwidth" in m for m in found.missing)
    odd = one([replace(WORK, dtype="float64")], [])
    assert odd.step is None
    assert odd.missing == ("the rate of float64 products: no step time",)
    slices = parse_target("tpu:v5e:2x4x2slices")
    mesh = MeshShape(fsdp=16, slices=2)
    told = modelled([WORK], [replace(SENT, devices=16)], slices, grid(mesh, slices))
    assert told.step is not None
    assert told.missing == ("the latency of the data-center network between slices: taken as 0",)


def test_it_is_plain_json() -> None:
    found = one([WORK], [SENT])
    again = json.loads(json.dumps(dataclasses.asdict(found)))
    assert again["step"] == found.step
    assert again["moved"][0]["axes"] == ["fsdp"]
