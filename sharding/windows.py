"""Windows over positions: where they begin and end when the positions are split, and the rows that a shard borrows.

A window of k positions every s reads, at the edge of a shard, rows that the neighbouring device holds: its halo. Those
rows are all that a spatial split sends (Dean et al. 2012, section 3), however many the shard has of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from sharding.errors import InputError
from sharding.layout import Dims
from sharding.region import Region, current
from sharding.relayout import permuted, vary
from sharding.scope import named

Padding = Literal["same", "valid"]


@dataclass(frozen=True)
class Window:
    """Windows along one dim of an array as it lies on a device."""

    name: str
    at: int
    """The dim's place."""
    size: int
    """Positions of one window."""
    stride: int
    before: int
    """Positions that the first window of a shard reads before the shard's own; at the global edge they are zeros."""
    after: int
    count: int
    """Windows of one shard."""
    axes: tuple[str, ...]
    """Mesh axes that split the dim."""

    @classmethod
    def along(
        cls,
        name: str,
        at: int,
        whole: int,
        size: int,
        stride: int,
        padding: Padding,
        axes: tuple[str, ...],
        parts: int,
    ) -> Window:
        """Windows of `size` every `stride` over `whole` positions, which `axes` split into `parts`.

        "same" pads with zeros so that there are ceil(whole / stride) windows, the odd one after; "valid" keeps to the
        positions that are there. InputError where the windows of a shard would not begin where its positions do.
        """  # fmt: skip
        if size < 1 or stride < 1 or padding not in ("same", "valid"):
            raise InputError(
                f"Windows along {name} of size {size}, stride {stride} and padding {padding!r}: size and stride are at "
                f"least 1, and padding is 'same' or 'valid'. Change them."
            )
        count = -(-whole // stride) if padding == "same" else (whole - size) // stride + 1
        if count < 1:
            raise InputError(
                f"A window of {size} along {name} does not fit into its {whole} positions. Take padding='same', a smaller "
                f"window or a larger {name}."
            )
        if parts > 1 and (whole % (parts * stride) or count * stride != whole):
            over = " x ".join(axes)
            raise InputError(
                f"Windows of {size} every {stride} with padding {padding!r} make {count} of {name} = {whole}, which {over} "
                f"splits into {parts} parts: they would not lie on the devices as the positions do. Make {name} a multiple "
                f"of {parts * stride} and take padding='same' (or windows no longer than the stride), or leave {name} whole."
            )
        zeros = max((count - 1) * stride + size - whole, 0) if padding == "same" else 0
        return cls(name, at, size, stride, zeros // 2, zeros - zeros // 2, count // parts, axes)


@named
def halo(x: Array, names: str, dim: str, before: int, after: int) -> Array:
    """`x` with `before` positions of `dim` from the devices before and `after` from those behind; zeros at global edges.

    `names` are the dims of `x`, which lies by them; the result holds local + before + after positions of `dim`. Each
    device sends before + after positions times the other local dims, whatever the shard's own extent: one permute
    either way, and one more for every whole shard that a wider halo reaches across. Where the dim is not split, zeros
    are put on. The transpose sends back what was borrowed, and it is added.
    """
    words = tuple(names.split())
    region = current()
    check_neighbours(region, dim)
    lies = region.dims(words) if region is not None and region.manual else ((),) * x.ndim
    return borrowed(x, lies, {dim: (before, after)}, words)


def check_neighbours(region: Region | None, name: str) -> None:
    """Refuse windows along a dim whose positions the rules lay in another order than they count in."""
    order, _ = (None, 1) if region is None else region.ordered(name)
    if order is not None:
        raise InputError(
            f"Windows along {name} need neighbours beside each other, but the rules {region and region.layouts.rules!r} lay "
            f"its positions in the order {order}. Choose order='contiguous' there, or leave {name} whole."
        )


def borrowed(x: Array, lies: Dims, edges: Mapping[str, tuple[int, int]], words: tuple[str, ...]) -> Array:
    """`x`, which lies by `lies`, with its halo along each dim of `edges` (before, after), one dim after the other: the
    second carries the first one's halo along, and so the corners.
    """
    for dim, (before, after) in edges.items():
        if dim not in words or before < 0 or after < 0:
            raise InputError(
                f"A halo of {before} before and {after} after along {dim!r} is asked for an array of the dims "
                f"{' '.join(words)}. Name one of them, and take 0 or more."
            )
        at = words.index(dim)
        axes = lies[at]
        if axes:
            parts = [*_from(x, at, axes, before, -1), x, *_from(x, at, axes, after, 1)]
            x = jnp.concatenate(parts, axis=at) if len(parts) > 1 else x
        elif before or after:
            pad = [(0, 0)] * x.ndim
            pad[at] = (before, after)
            x = jnp.pad(x, pad)
    return x


def _from(x: Array, at: int, axes: tuple[str, ...], wanted: int, side: int) -> list[Array]:
    """`wanted` positions from the devices on one side (-1 before, 1 behind), in the order of the whole dim.

    A device that no other sends to gets zeros: that is the global edge.
    """
    own, devices = x.shape[at], lax.axis_size(axes)
    found: list[Array] = []
    for away in range(1, -(-wanted // own) + 1):
        take = min(own, wanted - (away - 1) * own)
        edge = (
            lax.slice_in_dim(x, own - take, own, axis=at)
            if side < 0
            else lax.slice_in_dim(x, 0, take, axis=at)
        )
        send = [(i, i - side * away) for i in range(devices) if 0 <= i - side * away < devices]
        moved = permuted(vary(edge, frozenset(axes)), axes, send) if send else jnp.zeros_like(edge)
        found.append(moved)
    return found[::-1] if side < 0 else found


__all__ = ["Padding", "Window", "borrowed", "check_neighbours", "halo"]
