"""Targets: text to devices, what is no target told with what exists; the table of machines: a source for every figure."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from experiments.peaks import peak
from sharding.errors import InputError
from sharding.price.machine import Machine, Network, product_rate
from sharding.price.machines import MACHINES, machine_of
from sharding.price.target import parse_target

SHAPES = {
    "cpu:8": ((8,), 1, 8),
    "tpu:v4:4x4x8": ((4, 4, 8), 1, 128),
    "tpu:v5e:4x4": ((4, 4), 1, 16),
    "tpu:v5p:8x8x16": ((8, 8, 16), 1, 1024),
    "tpu:v6e:16x16x2slices": ((16, 16), 2, 512),
    "tpu:v7x:4x4x4": ((4, 4, 4), 1, 128),
    "tpu:v7x:2x2x1x3slices": ((2, 2, 1), 3, 24),
    "gpu:h100:8": ((8,), 1, 8),
    "gpu:h100:32x8": ((8,), 32, 256),
    "gpu:h200:8": ((8,), 1, 8),
    "gpu:b200:4x8": ((8,), 4, 32),
    "gpu:a100:4": ((4,), 1, 4),
    "gpu:a100-40gb:2x4": ((4,), 2, 8),
}


@pytest.mark.parametrize(("text", "said"), SHAPES.items())
def test_a_target_says_shape_islands_and_devices(text: str, said: tuple[tuple[int, ...], int, int]) -> None:
    target = parse_target(text)
    assert (target.shape, target.islands, target.devices) == said
    assert target.platform == text.split(":")[0]
    assert parse_target(target.text) == target
    assert str(target.devices) in target.describe()
    assert target.island_devices * target.islands == target.devices


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tpu:v5q:4x4", r"no.*'v5q'|'v5q'.*nearest.*There are v4, v5e, v5p, v6e, v7x"),
        ("gpu:h10:8", r"'h10' \(nearest: 'h100'\)"),
        ("gpu:v5e:8", r"There are a100"),
        ("tpv:v5e:4x4", r"'tpv' \(nearest: 'tpu'\)"),
        ("", r"begins with ''"),
        ("cpu", r"0 parts after cpu"),
        ("cpu:0", r"'0' where the number of pretend devices"),
        ("cpu:-8", r"'-8' where"),
        ("cpu:²", r"where the number"),
        ("cpu:4:2", r"2 parts after cpu"),
        ("tpu:v5e", r"needs two"),
        ("tpu:v5e:4x4x4", r"slice of 3 dims, but .* in 2"),
        ("tpu:v5p:4x4", r"slice of 2 dims, but .* in 3"),
        ("tpu:v5e:16x32", r"largest .* is 16x16.*slices"),
        ("tpu:v5e:3x4", r"host holds 2x2"),
        ("tpu:v5e:4x4x0slices", r"'0' where the number of slices"),
        ("tpu:v5e:4xfour", r"'four'"),
        ("gpu:h100:16", r"16 GPUs in one host, but a host holds 8.*gpu:h100:2x8"),
        ("gpu:h100:2x2x8", r"gives 3 numbers"),
        ("gpu:h100:", r"'' where hosts"),
    ],
)
def test_what_is_no_target_is_told_with_what_exists(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_target(text)


def test_dims_of_a_torus_close_where_the_hardware_closes_them() -> None:
    rings = {
        "tpu:v5p:4x4x8": (True, True, True),
        "tpu:v5p:2x2x4": (False, False, False),  # less than a cube: no optical switch around it
        "tpu:v5e:8x16": (False, True),
        "tpu:v6e:16x16": (True, True),
        "tpu:v6e:8x8": (False, False),
        "gpu:h100:8": (),
    }
    assert {t: parse_target(t).rings for t in rings} == rings


def test_the_compilers_name_of_a_slice() -> None:
    assert parse_target("tpu:v5p:8x8x16").topology == "v5p:8x8x16"
    assert parse_target("tpu:v7x:2x2x1x2slices").topology == "tpu7x:2x2x1"
    assert parse_target("gpu:h100:8").topology == ""


def _unsourced(machine: Machine) -> list[str]:
    """Figures of a machine that stand in the table without a word of where they come from."""
    bare = [
        name
        for name in ("flops", "memory", "memory_bandwidth")
        if getattr(machine, name) and not machine.sources.get(name)
    ]
    for network in (machine.inside, machine.across, machine.between_cores):
        numbers = [] if network is None else [network.bandwidth, network.latency, network.start]
        if network is not None and any(n is not None for n in numbers) and len(network.source) < 20:
            bare.append(network.name)
    return bare


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_every_figure_has_its_source_and_is_of_a_sane_size(machine: Machine) -> None:
    assert _unsourced(machine) == []
    if machine.platform == "cpu":
        assert not machine.flops
        assert machine.memory is None
        assert machine.inside.bandwidth is None
        return
    assert machine.memory is not None
    assert machine.memory_bandwidth is not None
    assert 1e13 < machine.flops["bfloat16"] < 1e16
    assert 10e9 < machine.memory < 1e12
    assert 5e11 < machine.memory_bandwidth < 2e13
    fast, slow = machine.inside.bandwidth or 0.0, machine.across.bandwidth or 0.0
    assert 1e9 < slow < fast < 2e12, "bytes, not bits; islands are what the fast network does not tie"


def test_a_figure_without_a_source_is_seen() -> None:
    planted = Network("a link", "switch", 1e9, None, None, "")
    v5e = next(m for m in MACHINES if m.name == "v5e")
    values = {f.name: getattr(v5e, f.name) for f in fields(v5e)}
    assert _unsourced(Machine(**{**values, "sources": {"flops": "x"}, "inside": planted})) == [
        "memory", "memory_bandwidth", "a link",
    ]  # fmt: skip


def test_the_links_of_a_chip_are_those_of_its_datasheet() -> None:
    """Bidirectional ICI bandwidth per chip, Google Cloud documentation: twice the rate of a link times the links."""
    said = {"v5e": 400e9, "v5p": 1200e9, "v6e": 800e9, "v7x": 1200e9}
    for name, both in said.items():
        machine = next(m for m in MACHINES if m.name == name)
        assert 2 * (machine.inside.bandwidth or 0.0) * 2 * len(machine.torus) == both


def test_float32_products_run_as_the_precision_says() -> None:
    v5p, h100 = (next(m for m in MACHINES if m.name == n) for n in ("v5p", "h100"))
    assert product_rate(v5p, "float32") == product_rate(v5p, "bfloat16") == 459e12
    assert product_rate(v5p, "float32", "highest") == 459e12 / 6
    assert product_rate(h100, "float32") == 494.7e12
    assert product_rate(h100, "float32", "highest") == 66.9e12
    assert product_rate(h100, "float64") is None


def test_peaks_of_devices_at_hand_look_here() -> None:
    assert peak("TPU v5 lite", "bfloat16") == 197e12
    assert peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak("TPU v5 lite", "float32") is None
    assert peak("cpu", "bfloat16") is None
    assert peak("NVIDIA GeForce RTX 4090", "bfloat16") is None
    assert len({m.device_kind for m in MACHINES}) == len(MACHINES)
    v5p = machine_of("TPU v5")
    assert v5p is not None
    assert math.prod(v5p.torus) == 6144
