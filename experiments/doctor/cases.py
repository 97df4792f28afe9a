"""Which collectives are tried: over which axes, of which dtypes and sizes. No jax here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sharding.finding import human

Axes = tuple[str, ...]

COLLECTIVES = (
    "all-reduce",
    "all-reduce max",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "permute",
    "permute first to last",
)
SUMS = ("all-reduce", "reduce-scatter")
DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "uint32", "int8", "bool")
ROUNDED = ("float32", "bfloat16", "float16", "float64")
SMALL, MIDDLE = 64, 1 << 16
LARGE = (MIDDLE, 1 << 20, 1 << 22)


@dataclass(frozen=True)
class Case:
    """One collective of one dtype over some axes: `size` is about the bytes that a device's block holds.

    "exact" values have sums without rounding, and the result must be equal to the bit; "normal" ones are rounded.
    """

    collective: str
    axes: Axes
    dtype: str
    size: int
    values: Literal["exact", "normal"] = "exact"

    @property
    def name(self) -> str:
        """`all-reduce float32 over data fsdp, 64 KiB`."""
        rounded = ", rounded sums" if self.values == "normal" else ""
        return f"{self.collective} {self.dtype} over {' '.join(self.axes)}, {human(self.size)}{rounded}"


def axis_sets(sizes: Mapping[str, int]) -> list[Axes]:
    """Axes of more than one device: each, every two, the innermost before the outermost, and all of them."""
    axes = [a for a, n in sizes.items() if n > 1]
    pairs = [(a, b) for i, a in enumerate(axes) for b in axes[i + 1 :]]
    swapped = [(axes[-1], axes[0])] if len(axes) > 1 else []
    every = [tuple(axes)] if len(axes) > 2 else []
    return [*((a,) for a in axes), *pairs, *swapped, *every]


def in_mesh_order(axes: Axes, sizes: Mapping[str, int]) -> bool:
    """Whether axes are named outermost first, as a permute must name them (the probe permute_axis_order says why)."""
    order = list(sizes)
    return list(axes) == sorted(axes, key=order.index)


def cases(sizes: Mapping[str, int], quick: bool = False) -> list[Case]:
    """All cases of a mesh, axis -> size: each dtype small, float32 at every size, and sums of rounded numbers.

    `quick` keeps the outermost and the innermost axis, these two swapped, and all axes; two dtypes; and 1 MiB.
    """
    sets = axis_sets(sizes)
    if quick:
        axes = [a for a, n in sizes.items() if n > 1]
        kept = {(axes[0],), (axes[-1],), (axes[-1], axes[0]), tuple(axes)} if axes else set()
        sets = [s for s in sets if s in kept]
    dtypes = ("float32", "bfloat16") if quick else DTYPES
    made = []
    for name in COLLECTIVES:
        moves = name not in SUMS and name != "all-reduce max"
        kinds = [d for d in dtypes if d != "bool" or moves]
        rounded = [d for d in ROUNDED if d in dtypes and name in SUMS]
        for axes in (s for s in sets if "permute" not in name or in_mesh_order(s, sizes)):
            made += [Case(name, axes, d, SMALL) for d in kinds]
            made += [Case(name, axes, "float32", n) for n in (LARGE[1:2] if quick else LARGE)]
            made += [Case(name, axes, d, MIDDLE, "normal") for d in rounded]
    return made
