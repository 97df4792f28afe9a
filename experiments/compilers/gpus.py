"""What XLA's GPU compiler must know of a GPU that is not there: a stream_executor.GpuTargetConfigProto in text form.

The figures are those that the CUDA driver reports for such a device. Sources: NVIDIA's CUDA C++ Programming Guide, tables
"Technical Specifications per Compute Capability" and "Arithmetic Instructions" (limits of a block and of a multiprocessor,
float32 units); NVIDIA's white papers of the A100 (2020), H100 (2022) and Blackwell (2024) architectures and the datasheets of
the products (multiprocessors, clock, cache, memory and its bandwidth). The compiler fits tiles and fusions to them; what it
would measure on a device, autotuning, it leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

from sharding.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """One product. Sizes in bytes, bandwidth in bytes/s."""

    kind: str
    """Its name as the driver tells it, which is jax's `device_kind`."""
    capability: tuple[int, int]
    multiprocessors: int
    units: int
    """float32 units of a multiprocessor."""
    shared: int
    """Shared memory of a multiprocessor; a block may ask for 1 KiB less."""
    cache: int
    memory: int
    bandwidth: int
    clock: float
    """Highest, in GHz."""


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 << 10, 40 << 20, 85_100_068_864, 2_039_040_000_000, 1.41),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 164 << 10, 40 << 20, 42_298_834_944, 1_555_200_000_000, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 << 10, 50 << 20, 84_942_979_072, 3_352_320_000_000, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 228 << 10, 50 << 20, 151_397_597_184, 4_800_000_000_000, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 228 << 10, 126 << 20, 191_514_411_008, 7_672_320_000_000, 1.965),
}  # fmt: skip
"""Name of the machine in a target (`gpu:h100:8`) -> the product."""


def target_config(machine: str) -> str:
    """The text proto of a machine by its name. InputError for one that is not described here."""
    if machine not in GPUS:
        raise InputError(
            f"The GPU compiler cannot be told what {machine!r} is: it knows {', '.join(GPUS)}. Take one of these as the "
            f"target, or add it to experiments/compilers/gpus.py."
        )
    gpu = GPUS[machine]
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: {48 << 10}  shared_memory_per_block_optin: {gpu.shared - 1024}
  shared_memory_per_core: {gpu.shared}
  core_count: {gpu.multiprocessors}  fpus_per_core: {gpu.units}  clock_rate_ghz: {gpu.clock}
  l2_cache_size: {gpu.cache}  device_memory_size: {gpu.memory}  memory_bandwidth: {gpu.bandwidth}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{gpu.kind}"
"""


__all__ = ["GPUS", "Gpu", "target_config"]
