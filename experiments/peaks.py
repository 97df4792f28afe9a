"""Peak dense matrix rates of devices by their `device_kind`: figures and sources stand in `sharding.price.machines`."""

from __future__ import annotations

from sharding.price.machines import machine_of


def peak(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device for products in `dtype`, or None where no public figure is listed (then no MFU).

    float32 has none: what a "float32" product runs at depends on the precision that is asked for.
    """
    machine = machine_of(device_kind)
    return None if machine is None else machine.flops.get(dtype)
