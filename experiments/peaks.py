"""Peak dense matrix rates of devices by their `device_kind`, with the public source of each. None for what is not listed."""

from __future__ import annotations

PEAK_FLOPS: dict[str, dict[str, float]] = {
    # NVIDIA H100 Tensor Core GPU datasheet (2023), SXM, dense (half of the sparse figures printed there)
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989.4e12},
    # NVIDIA H200 Tensor Core GPU datasheet (2024), SXM, dense
    "NVIDIA H200": {"bfloat16": 989.4e12},
    # NVIDIA A100 Tensor Core GPU datasheet (2021), SXM
    "NVIDIA A100-SXM4-80GB": {"bfloat16": 312e12},
    "NVIDIA A100-SXM4-40GB": {"bfloat16": 312e12},
    # Google Cloud documentation, "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e": peak compute per chip
    "TPU v4": {"bfloat16": 275e12},
    "TPU v5 lite": {"bfloat16": 197e12},
    "TPU v5": {"bfloat16": 459e12},
    "TPU v6 lite": {"bfloat16": 918e12},
}
"""device_kind -> dtype -> FLOP/s of dense products on one device. float32 is left out: what a "float32" product runs at
depends on the precision that the compiler chooses."""


def peak(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device for products in `dtype`, or None where no public figure is listed (then no MFU)."""
    return PEAK_FLOPS.get(device_kind, {}).get(dtype)
