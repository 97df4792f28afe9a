"""Modelled seconds of one step on a target: closed forms over what the traced step does. Nothing here is measured.

Every op takes the longer of its arithmetic and its memory traffic at the machine's peak rates (the roofline: Williams,
Waterman and Patterson 2009); every collective takes its start, its hops and its bytes over the links that its axes really
use (`sharding.price.link_times`); one after the other, but for what a compiled schedule is said to hide. So the step is
modelled as fast as the machine's figures allow: what a kernel loses against them is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sharding.ledger import Collective
from sharding.price.bottleneck import told
from sharding.price.link_times import seconds_of
from sharding.price.links import Path, path
from sharding.price.machine import product_rate
from sharding.price.target import Target
from sharding.price.work import Work


@dataclass(frozen=True)
class OpTime:
    """Modelled seconds of the ops of one kind in one place, all their times in a step together."""

    kind: str
    """As `sharding.price.work.Work.kind`."""
    dtype: str
    op: str
    """The named op it belongs to, "" outside any."""
    phase: str
    """"forward", "backward" or "update"."""
    layers: int
    """How many layers the model has where it stands in one of them; 0 outside."""
    times: int
    flops: int
    bytes: int
    seconds: float | None
    """None where the machine has no figure."""
    limit: str
    """What takes longer: "arithmetic" or "memory"."""


@dataclass(frozen=True)
class CollectiveTime:
    """Modelled seconds of the collectives of one kind over the same axes in one place, all their times together."""

    kind: str
    axes: tuple[str, ...]
    op: str
    phase: str
    layers: int
    times: int
    bytes: int
    """That a device sends in a step, as `sharding.ledger.Collective.bytes`."""
    inside: float | None
    """Seconds on the fast network. None where the machine has no figure."""
    across: float | None
    """Seconds on the network between islands."""
    hidden: float
    """Of both, seconds that run beside other work."""
    path: str
    """The links, in words."""

    @property
    def seconds(self) -> float | None:
        """On both networks."""
        return None if self.inside is None or self.across is None else self.inside + self.across


@dataclass(frozen=True)
class Modelled:
    """Modelled seconds of a step. Plain values all through: `dataclasses.asdict` gives its JSON."""

    target: str
    step: float | None
    """Seconds of one step; None where a figure is missing that it needs."""
    compute: float | None
    """Of them, the ops."""
    collectives: float | None
    """Of them, the collectives, hidden or not."""
    hidden: float
    """Of the collectives, what runs beside the ops."""
    bubble: float
    """Share of the step in which a pipeline stage has nothing to do."""
    mfu: float | None
    """The bound on model FLOPs utilization: the products at peak, over the step."""
    flops: int
    """Of all products and convolutions on one device."""
    bytes: int
    """Of memory that ops other than collectives read and write on one device."""
    ops: tuple[OpTime, ...]
    """Longest first."""
    moved: tuple[CollectiveTime, ...]
    """Longest first."""
    bottleneck: str
    """What takes longest and what to change, in one sentence."""
    missing: tuple[str, ...]
    """Figures that the machine lacks, each with what is done without it."""
    assumed: tuple[str, ...]
    """What the figure rests on."""


ASSUMED = (
    "every product and every byte at the machine's published peak rate",
    "collectives one after the other, each with its links to itself but for the same collective of other groups",
    "elementwise runs read and write memory once and their arithmetic costs nothing",
    "host, input and launch times are left out",
)


def modelled(
    works: Sequence[Work],
    moved: Sequence[Collective],
    target: Target,
    grid: np.ndarray,
    *,
    overlap: Mapping[tuple[tuple[str, ...], str], float] | None = None,
    bubble: float = 0.0,
    model_flops: float | None = None,
) -> Modelled:
    """Modelled seconds of one step of `works` and predicted collectives on the mesh laid out as `grid`.

    overlap: (axes, kind) -> share of those collectives that a compiled schedule starts before and waits for after other
    work; none by default, so that the step is the sum. What is hidden is never longer than the ops.
    bubble: share of the step in which a stage is idle. model_flops: FLOPs a device that count for MFU; all products by
    default, recomputed ones too.
    """
    if not 0 <= bubble < 1:
        raise ValueError(f"a pipeline's bubble is a share of the step in [0, 1), not {bubble}")
    ops = _ops(works, target)
    collectives = _collectives(moved, target, grid, overlap or {})
    compute, spent = _sum(o.seconds for o in ops), _sum(c.seconds for c in collectives)
    hidden = min(sum(c.hidden for c in collectives), compute or 0.0)
    step = None if compute is None or spent is None else (compute + spent - hidden) / (1 - bubble)
    flops = sum(w.flops * w.times for w in works)
    ideal = _sum(w.flops * w.times / r if (r := _rate(w, target)) else None for w in works if w.flops)
    share = 1.0 if model_flops is None or not flops else model_flops / flops
    return Modelled(
        target=target.text,
        step=step,
        compute=compute,
        collectives=spent,
        hidden=hidden,
        bubble=bubble,
        mfu=share * ideal / step if step and ideal is not None else None,
        flops=flops,
        bytes=sum(w.bytes * w.times for w in works if w.kind != "collective"),
        ops=tuple(sorted(ops, key=lambda o: -(o.seconds or 0.0))),
        moved=tuple(sorted(collectives, key=lambda c: -(c.seconds or 0.0))),
        bottleneck=told(ops, collectives, step, target),
        missing=_missing(works, collectives, target),
        assumed=ASSUMED,
    )


def _rate(work: Work, target: Target) -> float | None:
    return product_rate(target.machine, work.dtype, work.precision)


def _ops(works: Sequence[Work], target: Target) -> list[OpTime]:
    """Rooflines, the ops of one kind in one place together."""
    found: dict[tuple[str, str, str, str, int], list[tuple[Work, float | None, float | None]]] = {}
    for w in works:
        if w.kind == "collective":  # its time is that of its network
            continue
        rate, bandwidth = _rate(w, target), target.machine.memory_bandwidth
        arithmetic = 0.0 if not w.flops else None if rate is None else w.flops * w.times / rate
        memory = None if bandwidth is None else w.bytes * w.times / bandwidth
        key = (w.kind, w.dtype, w.scope.op, w.scope.phase, w.scope.layers)
        found.setdefault(key, []).append((w, arithmetic, memory))
    return [_op(key, rows) for key, rows in found.items()]


def _op(key: tuple[str, str, str, str, int], rows: list[tuple[Work, float | None, float | None]]) -> OpTime:
    seconds = _sum(None if a is None or m is None else max(a, m) for _, a, m in rows)
    limited = sum(max(a, m) for _, a, m in rows if a is not None and m is not None and a > m)
    return OpTime(
        *key,
        times=sum(w.times for w, _, _ in rows),
        flops=sum(w.flops * w.times for w, _, _ in rows),
        bytes=sum(w.bytes * w.times for w, _, _ in rows),
        seconds=seconds,
        limit="arithmetic" if seconds and limited > seconds / 2 else "memory",
    )


def _collectives(
    moved: Sequence[Collective],
    target: Target,
    grid: np.ndarray,
    overlap: Mapping[tuple[tuple[str, ...], str], float],
) -> list[CollectiveTime]:
    paths: dict[tuple[str, ...], Path] = {}
    found: dict[tuple[str, tuple[str, ...], str, str, int], list[Collective]] = {}
    for c in moved:
        found.setdefault((c.kind, c.axes, c.op, c.scope.phase, c.scope.layers), []).append(c)
    rows = []
    for key, cs in found.items():
        kind, axes = key[:2]
        along = paths[axes] = paths.get(axes) or path(grid, axes, target)
        times = [(c, seconds_of(kind, c.payload // c.times, along, target)) for c in cs]
        inside = _sum(None if t.inside is None else t.inside * c.times for c, t in times)
        across = _sum(None if t.across is None else t.across * c.times for c, t in times)
        hidden = overlap.get((axes, kind), 0.0) * ((inside or 0.0) + (across or 0.0))
        total, sent = sum(c.times for c in cs), sum(c.bytes for c in cs)
        rows.append(CollectiveTime(*key, total, sent, inside, across, hidden, along.describe()))
    return rows


def _missing(works: Sequence[Work], moved: Sequence[CollectiveTime], target: Target) -> tuple[str, ...]:
    machine = target.machine
    found = []
    for what in sorted({(w.dtype, w.precision) for w in works if w.flops and _rate(w, target) is None}):
        found.append(f"the rate of {' '.join(what).strip()} products: no step time")
    if works and machine.memory_bandwidth is None:
        found.append("the memory bandwidth: no step time")
    for network, used in ((machine.inside, moved), (machine.across, [c for c in moved if c.across != 0.0])):
        if used and network.bandwidth is None:
            found.append(f"the bandwidth of {network.name}: no step time")
        elif used and network.latency is None and network.start is None:
            found.append(f"the latency of {network.name}: taken as 0")
    return tuple(found)


def _sum(values: object) -> float | None:
    """The sum; None where one of them is."""
    listed = list(values)  # pyright: ignore[reportArgumentType]
    return None if any(v is None for v in listed) else float(sum(listed))
