"""Targets: the devices that a plan is made for, as text: `cpu:8`, `tpu:v5p:8x8x16`, `tpu:v6e:16x16x2slices`, `gpu:h100:32x8`.

A target says which machine, how many chips of it along each dim of the torus (or devices of a host), and how many islands
of these: slices of a TPU, hosts of a GPU. No jax here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sharding.axes import nearest
from sharding.errors import InputError
from sharding.price.machine import Machine
from sharding.price.machines import CPU, MACHINES

FORMS = "cpu:8, tpu:v5e:4x4, tpu:v5p:8x8x16, tpu:v6e:16x16x2slices, gpu:h100:8, gpu:h100:32x8"


@dataclass(frozen=True)
class Target:
    """Devices that need not be there."""

    text: str
    """As it was given: parse_target(text) gives this target again."""
    machine: Machine
    shape: tuple[int, ...]
    """Of one island: chips along each dim of a TPU slice's torus, devices of a GPU host, pretend devices."""
    islands: int
    """TPU slices or GPU hosts; 1 for pretend devices."""

    @property
    def platform(self) -> str:
        """Of the machine: "cpu", "gpu" or "tpu"."""
        return self.machine.platform

    @property
    def island_devices(self) -> int:
        """Devices of one island, as jax counts them."""
        return math.prod(self.shape) * self.machine.cores

    @property
    def devices(self) -> int:
        """Devices of all islands, as jax counts them."""
        return self.island_devices * self.islands

    @property
    def rings(self) -> tuple[bool, ...]:
        """Whether each dim of a TPU slice's torus closes to a ring; empty for other machines.

        Optical switches close whole cubes of 4x4x4 chips (v4, v5p, v7x); a flat torus closes where it is 16 long (v5e,
        v6e). Austin et al., "How to Scale Your Model", part 2, "TPU Networking".
        """
        if self.machine.closes == "cubes":
            return (all(n % 4 == 0 for n in self.shape),) * len(self.shape)
        return tuple(n == 16 for n in self.shape) if self.machine.closes == "16" else ()

    @property
    def topology(self) -> str:
        """The name of one slice for the TPU compiler, `jax.experimental.topologies.get_topology_desc(topology_name=...)`
        (with `num_slices=islands` and `machine.compiler_options`); empty for other machines.
        """
        return f"{self.machine.compiler}:{'x'.join(map(str, self.shape))}" if self.platform == "tpu" else ""

    def describe(self) -> str:
        """One line: `1024 TPU v5 devices, a torus of 8x8x16`."""
        kind = self.machine.device_kind
        if self.platform == "cpu":
            return f"{self.devices} pretend devices"
        if self.platform == "gpu":
            return f"{self.devices} {kind} in {self.islands} host{'s' * (self.islands > 1)}"
        slices = f"{self.islands} slices of " if self.islands > 1 else "a slice of "
        return f"{self.devices} {kind} devices, {slices}{'x'.join(map(str, self.shape))} chips"


def parse_target(text: str) -> Target:
    """The target that `text` names. Raises InputError, with what exists, for what is no target."""
    platform, *rest = text.split(":")
    names = {p: [m.name for m in MACHINES if m.platform == p] for p in ("cpu", "gpu", "tpu")}
    if platform not in names:
        raise InputError(
            f"The target {text!r} begins with {platform!r}{nearest(platform, list(names))}, but it is one of cpu, gpu and "
            f"tpu. Write it like {FORMS}."
        )
    if platform == "cpu":
        if len(rest) != 1:
            raise InputError(
                f"The target {text!r} has {len(rest)} parts after cpu, but it is cpu:N with N pretend devices. "
                f"Write it like cpu:8."
            )
        return Target(text, CPU, (_number(text, rest[0], "the number of pretend devices"),), 1)
    if len(rest) != 2:
        raise InputError(
            f"The target {text!r} has {len(rest)} parts after {platform}, but needs two: the machine, one of "
            f"{', '.join(names[platform])}, and how many. Write it like {FORMS}."
        )
    name, count = rest
    machine = next((m for m in MACHINES if m.platform == platform and m.name == name), None)
    if machine is None:
        raise InputError(
            f"The target {text!r} names a {platform} machine {name!r}{nearest(name, names[platform])}, which is not in the "
            f"table. There are {', '.join(names[platform])}; a further one is a row of sharding/price/machines.py."
        )
    return _gpus(text, machine, count) if platform == "gpu" else _slices(text, machine, count)


def _gpus(text: str, machine: Machine, count: str) -> Target:
    parts = [_number(text, p, "hosts and devices of a host") for p in count.split("x")]
    most = machine.host[0]
    if len(parts) > 2:
        raise InputError(
            f"The target {text!r} gives {len(parts)} numbers, but GPUs have hosts and devices of a host. Write HOSTSxDEVICES, "
            f"such as gpu:{machine.name}:32x{most}."
        )
    hosts, each = (1, parts[0]) if len(parts) == 1 else parts
    if each > most:
        raise InputError(
            f"The target {text!r} asks for {each} GPUs in one host, but a host holds {most} {machine.device_kind} on one "
            f"NVLink switch. Write HOSTSxDEVICES, such as gpu:{machine.name}:{-(-each // most)}x{most}."
        )
    return Target(text, machine, (each,), hosts)


def _slices(text: str, machine: Machine, count: str) -> Target:
    *dims, last = count.split("x")
    slices = 1
    if last.endswith(("slices", "slice")):
        slices = _number(text, last.removesuffix("s").removesuffix("slice"), "the number of slices")
    else:
        dims.append(last)
    shape = tuple(_number(text, d, "the chips of a slice along each dim") for d in dims)
    torus = machine.torus
    like = f"tpu:{machine.name}:{'x'.join(map(str, machine.host))} to tpu:{machine.name}:{'x'.join(map(str, torus))}"
    if len(shape) != len(torus):
        raise InputError(
            f"The target {text!r} has a slice of {len(shape)} dims, but {machine.device_kind} chips are tied in {len(torus)}. "
            f"Write {like}, with x2slices behind it for two of them."
        )
    if any(n > most for n, most in zip(sorted(shape), sorted(torus), strict=True)):
        raise InputError(
            f"The target {text!r} asks for a slice of {count} chips, but the largest that {machine.device_kind} has is "
            f"{'x'.join(map(str, torus))}. Write {like}, or several slices, such as x2slices behind it."
        )
    if any(n % h for n, h in zip(shape, machine.host, strict=True)):
        raise InputError(
            f"The target {text!r} asks for a slice of {'x'.join(map(str, shape))} chips, but a host holds "
            f"{'x'.join(map(str, machine.host))} of them and the TPU compiler takes whole hosts. Make each dim a multiple."
        )
    return Target(text, machine, shape, slices)


def _number(text: str, part: str, what: str) -> int:
    if not part.isascii() or not part.isdecimal() or int(part) < 1:
        raise InputError(
            f"The target {text!r} has {part!r} where {what} should stand, which is no whole number of at least 1. Write it "
            f"like {FORMS}."
        )
    return int(part)
