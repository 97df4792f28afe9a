"""Rates of the devices at hand: measured numbers of a sane size, and a plan's machine made of them."""

from __future__ import annotations

import math

import jax
import pytest

from experiments.plans import rates
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.price.fusion import Work
from sharding.price.standins import grid
from sharding.price.target import parse_target
from sharding.price.timing import modelled


def test_pretend_devices_become_a_machine_with_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, less in (("SIDE", 64), ("READ", 2**14), ("SENT", 2**14), ("RUNS", 2)):
        monkeypatch.setattr(rates, name, less)
    target = rates.measured(parse_target("cpu:8"))
    m = target.machine
    figures = [*m.flops.values(), m.memory_bandwidth, m.inside.bandwidth, m.inside.start]
    assert all(f is not None and 0 < f < math.inf for f in figures)
    assert set(m.flops) == {"float32", "bfloat16"}
    assert "measured on 8 pretend devices" in m.inside.source
    assert m.memory is None, "how much memory there is, is not measured"
    found = modelled(
        [Work("product", "float32", "", 10**9, 10**6, 1)], [], target, grid(MeshShape(data=8), target)
    )
    assert found.step is not None
    assert found.missing == ()


def test_a_slower_body_takes_longer() -> None:
    """What is timed is the work: eight products take longer than one."""
    devices = jax.devices()[:2]
    one = rates._seconds(devices, lambda x: x @ x * 1e-3, (256, 256), "float32")

    def eight(x: jax.Array) -> jax.Array:
        for _ in range(8):
            x = x @ x * 1e-3
        return x

    assert rates._seconds(devices, eight, (256, 256), "float32") > 2 * one


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="pretend devices only, but the target is gpu:h100:8"):
        rates.measured(parse_target("gpu:h100:8"))
    with pytest.raises(InputError, match="needs 64 pretend devices to be measured, but jax has 8"):
        rates.measured(parse_target("cpu:64"))
