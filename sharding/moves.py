"""What it takes to go from one layout to another: which moves, and how many bytes each device sends. No jax."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from sharding.layout import Dims


@dataclass(frozen=True)
class Exchange:
    """Axes that move from the end of dim `source` to the end of dim `target`: one all-to-all."""

    axes: tuple[str, ...]
    source: int
    target: int


def common(have: tuple[str, ...], want: tuple[str, ...]) -> int:
    """How many leading axes a dim keeps."""
    return sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(have, want, strict=False)))


def exchange(src: Dims, dst: Dims) -> Exchange | None:
    """The single all-to-all between two layouts, when the only difference is that axes move from one dim to another."""
    lost = [
        (d, h[common(h, w) :]) for d, (h, w) in enumerate(zip(src, dst, strict=True)) if h[common(h, w) :]
    ]
    won = [(d, w[common(h, w) :]) for d, (h, w) in enumerate(zip(src, dst, strict=True)) if w[common(h, w) :]]
    if len(lost) != 1 or len(won) != 1 or lost[0][1] != won[0][1]:
        return None
    return Exchange(lost[0][1], lost[0][0], won[0][0])


def relayout_bytes(local_bytes: int, src: Dims, dst: Dims, sizes: Mapping[str, int]) -> int:
    """Bytes each device sends to go from one layout to another, holding `local_bytes` at first. Slices are free."""
    moved = exchange(src, dst)
    if moved is not None:
        n = math.prod(sizes[a] for a in moved.axes)
        return local_bytes * (n - 1) // n
    sent = 0
    for have, want in zip(src, dst, strict=True):
        drop = have[common(have, want) :]
        n = math.prod(sizes[a] for a in drop)
        sent += local_bytes * (n - 1)
        local_bytes *= n
    return sent


def finish_bytes(
    local_bytes: int, partial: tuple[str, ...], src: Dims, dst: Dims, sizes: Mapping[str, int]
) -> int:
    """Bytes each device sends to reduce partial sums over `partial` and to bring the result from `src` to `dst`."""
    sent, scattered = 0, []
    for have, want in zip(src, dst, strict=True):
        over = scatter_axes(have, want, partial)
        n = math.prod(sizes[a] for a in over)
        sent += local_bytes * (n - 1) // n
        local_bytes //= n
        scattered.append((*have, *over))
    left = [a for a in partial if not any(a in dim for dim in scattered)]
    n = math.prod(sizes[a] for a in left)
    sent += 2 * local_bytes * (n - 1) // n
    return sent + relayout_bytes(local_bytes, tuple(scattered), dst, sizes)


def scatter_axes(have: tuple[str, ...], want: tuple[str, ...], partial: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of `partial` that a reduce-scatter can lay on a dim split by `have` on its way to `want`."""
    if want[: len(have)] != have:
        return ()
    return tuple(itertools.takewhile(lambda a: a in partial, want[len(have) :]))
