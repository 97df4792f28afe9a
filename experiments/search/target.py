"""The target of a search, its count from `--devices N` where the target names a machine alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from experiments.overrides import groups, plain
from sharding.errors import InputError
from sharding.price.machine import Machine
from sharding.price.machines import MACHINES
from sharding.price.target import Target, parse_target


def target_of(text: str, overrides: Sequence[str]) -> Target:
    """The target that `text` names, completed by the `--devices` among the overrides; InputError where the two disagree."""
    count = devices_asked(overrides)
    found = parse_target(text if count is None else complete(text, count))
    if count is not None and count != found.devices:
        raise InputError(
            f"--devices {count} is not what the target {text} has, which is {found.devices}. Give one of the two."
        )
    return found


def devices_asked(overrides: Sequence[str]) -> int | None:
    """N of `--devices N`, as the command line spells it out; None where it is not given or is -1."""
    given = [g for g in groups(overrides) if plain(g[0]) == "devices.count"]
    last = given[-1][0].partition("=")[2] or given[-1][-1] if given else ""
    return int(last) if last.isdecimal() else None


def complete(text: str, devices: int) -> str:
    """A target of so many devices where `text` names a machine alone, else `text`: cpu, gpu:h100, tpu:v5p. A TPU slice has the
    shape whose dims close to rings where there is one, then the least long; GPUs fill hosts. InputError where none has it.
    """
    platform, *rest = text.split(":")
    if text == "cpu":
        return f"cpu:{devices}"
    machine = next((m for m in MACHINES if [m.platform, m.name] == [platform, *rest]), None)
    if machine is None:
        return text
    if platform == "gpu":
        each = machine.host[0]
        if devices > each and devices % each:
            raise InputError(
                f"{devices} {machine.device_kind} do not fill hosts of {each}. Give --devices a multiple of {each}."
            )
        return f"{text}:{devices}" if devices <= each else f"{text}:{devices // each}x{each}"
    found = min(_slices(machine, devices), key=lambda s: (not _rings(machine, s), max(s), s), default=None)
    if found is None:
        raise InputError(
            f"No slice of {machine.device_kind} has {devices} devices: a dim is a multiple of a host's "
            f"({'x'.join(map(str, machine.host))}) and the largest slice is {'x'.join(map(str, machine.torus))}. Give the "
            f"whole target, several slices with it, such as {text}:{'x'.join(map(str, machine.host))}x2slices."
        )
    return f"{text}:{'x'.join(map(str, found))}"


def _slices(machine: Machine, devices: int) -> list[tuple[int, ...]]:
    """Shapes of a slice of so many devices, their dims not falling."""
    dims = [range(h, most + 1, h) for h, most in zip(machine.host, sorted(machine.torus), strict=True)]
    return [
        s
        for s in itertools.product(*dims)
        if math.prod(s) * machine.cores == devices and list(s) == sorted(s)
    ]


def _rings(machine: Machine, shape: Sequence[int]) -> bool:
    """Whether every dim closes, as `Target.rings` has it."""
    return all(n % 4 == 0 for n in shape) if machine.closes == "cubes" else all(n == 16 for n in shape)
