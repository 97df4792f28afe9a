"""What is known of a kind of device: what it computes, holds and reads in a second, and what its networks carry.

The figures themselves stand in `sharding.price.machines`. Figures are of one *device* as jax counts devices, and of dense
arithmetic; None is a figure for which there is no public source. No jax here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Network:
    """What devices are tied together with. One step of a collective takes `latency` + bytes / bandwidth seconds."""

    name: str
    """What people call it, as it stands in a sentence: "the ICI links"."""
    kind: str
    """"torus": links to the nearest neighbours; "switch": any device to any other at its full rate; "memory": pretend
    devices, which copy within one machine; "" where there is none."""
    bandwidth: float | None
    """Bytes/s in one direction: of one link of a torus, else out of (and at once into) one device."""
    latency: float | None
    """Seconds that one step (on a torus: one hop) takes however little it carries."""
    start: float | None
    """Seconds that a collective takes to begin."""
    source: str
    """Where the figures were read, and what was assumed."""


@dataclass(frozen=True)
class Machine:
    """A kind of device and what ties such devices together. Figures are per device; None: no public figure."""

    name: str
    """How a target names it: "v5p"."""
    platform: str
    """"cpu", "gpu" or "tpu"."""
    device_kind: str
    """`jax.Device.device_kind`."""
    flops: Mapping[str, float]
    """Arithmetic -> FLOP/s of dense products (2 a multiply-add): a dtype, or what a GPU does with float32: "tensorfloat32"
    on its matrix units, "ieee_float32" without them."""
    memory: int | None
    """Bytes of memory."""
    memory_bandwidth: float | None
    """Bytes/s read and written together."""
    inside: Network
    """Within an island: a TPU slice, a GPU host."""
    across: Network
    """Between islands."""
    sources: Mapping[str, str]
    """Where `flops`, `memory` and `memory_bandwidth` were read."""
    float32: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Precision -> (arithmetic, passes) of a product of float32 operands, see `product_rate`."""
    torus: tuple[int, ...] = ()
    """Chips that the largest island has along each dim; empty without a torus."""
    closes: str = ""
    """Which dims of a torus close to a ring: "16" those of 16 chips; "cubes" all, where each is a multiple of 4."""
    host: tuple[int, ...] = (1,)
    """Chips of one host along each dim of the torus; of a GPU machine the devices of one host."""
    cores: int = 1
    """Devices that one chip of a torus is to jax."""
    between_cores: Network | None = None
    """What ties the devices of one chip together."""
    on_chip: int = 0
    """Bytes of memory on the chip that the compiler fills with what is worked on; 0 where it manages none."""
    compiler: str = ""
    """What the TPU compiler calls it in a topology's name."""
    compiler_options: Mapping[str, str] = field(default_factory=dict)
    """What the TPU compiler's topology is asked for besides."""


def product_rate(machine: Machine, dtype: str, precision: str = "") -> float | None:
    """FLOP/s of a product of `dtype` operands, or None where no public figure says.

    `precision` is what the product asks for: "" (jax's default), "high" or "highest". A TPU multiplies float32 operands in
    1, 3 or 6 bfloat16 passes, a GPU in TF32 unless the highest is asked for (docs.jax.dev, `jax.lax.Precision` and
    `jax.lax.DotAlgorithmPreset`).
    """
    if dtype != "float32":
        return machine.flops.get(dtype)
    arithmetic, passes = machine.float32.get(precision, ("", 1))
    rate = machine.flops.get(arithmetic)
    return None if rate is None else rate / passes
