"""The one table of machines: what a device computes, holds and reads in a second, and what its networks carry.

Every figure stands beside the public source it was read from; one without a public source is None, and whatever needs it
says that it is missing. The words are those of `sharding.price.machine`. No jax here.
"""

from __future__ import annotations

from dataclasses import replace

from sharding.price.machine import Machine, Network

GIB = 2**30


def machine_of(device_kind: str) -> Machine | None:
    """The machine whose devices call themselves `device_kind`, or None."""
    return next((m for m in MACHINES if m.device_kind == device_kind), None)


_BOOK = 'Austin et al., "How to Scale Your Model" (2025), "How to Think About TPUs"'
_HOP = 'A hop takes about 1 us: the same book, "Sharded Matrices"'
_NCCL = "NVIDIA/nccl, src/graph/tuning.cc, ring with the Simple protocol, which large messages use"


def _ici(per_link: float, links: int, source: str) -> Network:
    return Network("the ICI links", "torus", per_link, 1e-6, None, f"{source}, {links} links. {_HOP}")


def _dcn(bits: float, source: str) -> Network:
    return Network("the data-center network between slices", "switch", bits / 8, None, None, source)


def _tpu(
    name: str,
    kind: str,
    flops: dict[str, float],
    memory: int,
    bandwidth: float,
    ici: Network,
    dcn: Network,
    source: str,
    torus: tuple[int, ...],
) -> Machine:
    flat = len(torus) == 2
    return Machine(
        name,
        "tpu",
        kind,
        flops,
        memory,
        bandwidth,
        ici,
        dcn,
        {"flops": source, "memory": source, "memory_bandwidth": source},
        float32={"": ("bfloat16", 1), "high": ("bfloat16", 3), "highest": ("bfloat16", 6)},
        torus=torus,
        closes="16" if flat else "cubes",
        host=(2, 2) if flat else (2, 2, 1),
        compiler=name,
        on_chip=(_VMEM[name] - 16) * 2**20,
    )


_VMEM = {"v4": 16, "v5e": 128, "v5p": 64, "v6e": 128, "v7x": 64}
"""MiB of vector memory a core (jax 0.10.2, jax/_src/pallas/mosaic/tpu_info.py), of which a single instruction's scratch takes
16 (XLA's flag xla_tpu_scoped_vmem_limit_kib; a v5e module's buffer assignment had the other 112)."""


def _gpu(
    name: str,
    kind: str,
    flops: dict[str, float],
    memory: float,
    bandwidth: float,
    source: str,
    nvlink: float,
    nic: Network,
) -> Machine:
    link = f"{source}: NVLink, half of the figure for both directions. Latency and start: {_NCCL}"
    return Machine(
        name,
        "gpu",
        kind,
        flops,
        int(memory),
        bandwidth,
        Network("NVLink", "switch", nvlink, 3.4e-6, 8.4e-6, link),
        nic,
        {"flops": source, "memory": source, "memory_bandwidth": source},
        float32={"": ("tensorfloat32", 1), "high": ("tensorfloat32", 1), "highest": ("ieee_float32", 1)},
        host=(8,),
    )


def _nic(bits: float, source: str) -> Network:
    name = "the network between hosts"
    return Network(name, "switch", bits / 8, 14e-6, 8.4e-6, f"{source}. Latency and start: {_NCCL}")


_CX7 = _nic(
    400e9,
    "Assumed: one ConnectX-7 of 400 Gb/s a GPU, as NVIDIA DGX BasePOD reference architecture, core components",
)
_CX6 = _nic(
    200e9, "Assumed: one ConnectX-6 of 200 Gb/s a GPU, as NVIDIA DGX A100 System User Guide (DU-09821-001)"
)
_HOPPER = {
    "bfloat16": 989.4e12,
    "float16": 989.4e12,
    "float8_e4m3fn": 1978.9e12,
    "float8_e5m2": 1978.9e12,
    "int8": 1978.9e12,
    "tensorfloat32": 494.7e12,
    "ieee_float32": 66.9e12,
}
_AMPERE = {
    "bfloat16": 312e12,
    "float16": 312e12,
    "int8": 624e12,
    "tensorfloat32": 156e12,
    "ieee_float32": 19.5e12,
}
_H = "Tensor Core GPU datasheet, SXM, dense (half of the sparse figures printed there)"
_DOCS = "Google Cloud documentation"

CPU = Machine(
    name="cpu",
    platform="cpu",
    device_kind="cpu",
    flops={},
    memory=None,
    memory_bandwidth=None,
    inside=Network(
        "this machine's memory", "memory", None, None, None, "no public figure: measured where a plan is made"
    ),
    across=Network("", "", None, None, None, "pretend devices lie in one machine"),
    sources={},
    float32=dict.fromkeys(("", "high", "highest"), ("float32", 1)),
)
"""Pretend devices: no public figure says what a share of the machine at hand does, so its numbers are measured
(`experiments.plans.rates`)."""

MACHINES: tuple[Machine, ...] = (
    CPU,
    replace(
        _tpu(
            "v4",
            "TPU v4",
            {"bfloat16": 275e12, "int8": 275e12},
            32 * GIB,
            1200e9,
            _ici(4.5e10, 6, f"{_BOOK}: 4.5e10 bytes/s a link and direction"),
            _dcn(8 * 2.5e10 / 4, f"{_BOOK}: about 2.5e10 bytes/s a host, shared by its 4 chips"),
            f'{_DOCS}, "TPU v4"',
            (16, 16, 16),
        ),
        compiler_options={
            "chip_config_name": "megacore"
        },  # as Cloud TPU runs it: a chip's two cores are one device
    ),
    _tpu(
        "v5e",
        "TPU v5 lite",
        {"bfloat16": 197e12, "int8": 393e12},
        16 * GIB,
        819e9,
        _ici(5e10, 4, f'{_DOCS}, "TPU v5e": 400 GB/s a chip in both directions'),
        _dcn(25e9, f'{_DOCS}, "TPU v5e": 6.4 Tb/s a pod of 256 chips'),
        f'{_DOCS}, "TPU v5e"',
        (16, 16),
    ),
    _tpu(
        "v5p",
        "TPU v5",
        {"bfloat16": 459e12, "float8_e4m3fn": 459e12, "float8_e5m2": 459e12},
        95 * GIB,
        2765e9,
        _ici(1e11, 6, f'{_DOCS}, "TPU v5p": 1200 GB/s a chip in both directions'),
        _dcn(50e9, f'{_DOCS}, "TPU v5p": 50 Gb/s a chip'),
        f'{_DOCS}, "TPU v5p"',
        (16, 16, 24),
    ),
    _tpu(
        "v6e",
        "TPU v6 lite",
        {"bfloat16": 918e12, "float8_e4m3fn": 918e12, "float8_e5m2": 918e12, "int8": 1836e12},
        32 * GIB,
        1638e9,
        _ici(1e11, 4, f'{_DOCS}, "TPU v6e": 800 GB/s a chip in both directions'),
        _dcn(100e9, f'{_DOCS}, "TPU v6e": 25.6 Tb/s a pod of 256 chips'),
        f'{_DOCS}, "TPU v6e" and "TPU7x" (HBM bandwidth)',
        (16, 16),
    ),
    replace(  # half a chip: each of its two chiplets is a device of its own to jax
        _tpu(
            "v7x",
            "TPU7x",
            {"bfloat16": 2307e12 / 2, "float8_e4m3fn": 4614e12 / 2, "float8_e5m2": 4614e12 / 2},
            96 * GIB,
            7380e9 / 2,
            _ici(1e11, 6, f'{_DOCS}, "TPU7x": 1200 GB/s a chip in both directions'),
            _dcn(50e9, f'{_DOCS}, "TPU7x": 100 Gb/s a chip, shared by its 2 devices'),
            f'{_DOCS}, "TPU7x", halved: two devices a chip',
            (16, 24, 24),
        ),
        compiler="tpu7x",
        cores=2,
        between_cores=Network(
            "the links between a chip's two devices",
            "switch",
            6e11,
            None,
            None,
            f'{_DOCS}, "TPU7x": six times a one-dimensional ICI link',
        ),
    ),
    _gpu(
        "a100",
        "NVIDIA A100-SXM4-80GB",
        _AMPERE,
        80e9,
        2039e9,
        "NVIDIA A100 Tensor Core GPU datasheet (2021), SXM",
        300e9,
        _CX6,
    ),
    _gpu(
        "a100-40gb",
        "NVIDIA A100-SXM4-40GB",
        _AMPERE,
        40e9,
        1555e9,
        "NVIDIA A100 Tensor Core GPU datasheet (2021), SXM",
        300e9,
        _CX6,
    ),
    _gpu("h100", "NVIDIA H100 80GB HBM3", _HOPPER, 80e9, 3350e9, f"NVIDIA H100 {_H} (2023)", 450e9, _CX7),
    _gpu("h200", "NVIDIA H200", _HOPPER, 141e9, 4800e9, f"NVIDIA H200 {_H} (2024)", 450e9, _CX7),
    _gpu(
        "b200",
        "NVIDIA B200",
        {
            "bfloat16": 2250e12,
            "float16": 2250e12,
            "float8_e4m3fn": 4500e12,
            "float8_e5m2": 4500e12,
            "int8": 4500e12,
            "tensorfloat32": 1100e12,
        },
        180e9,
        8000e9,
        "NVIDIA DGX B200 datasheet (an eighth of the system) and Blackwell architecture technical brief, dense",
        900e9,
        _CX7,
    ),
)
"""Every machine that a target may name. GPU memory is what the datasheet says, in units of 10^9 bytes."""
