"""Modelled seconds of one collective over the links of its path: start + hops x latency + bytes / bandwidth.

On a switch the algorithms are rings: n-1 steps of 1/n of the array for a gather or a scatter, twice that for an
all-reduce (Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH";
Patarasuk and Yuan 2009). On a torus all links of all dims that a group spans carry at once, both ways where a dim closes
(Austin et al. 2025, "How to Scale Your Model", "Sharded Matrices"). Over several islands a collective works within the
island and over its own share of the array between islands, one after the other (as NCCL's and XLA's hierarchical forms).
In-network reduction (NVLink SHARP) and tree algorithms are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from sharding.price.links import Path, Span
from sharding.price.machine import Network
from sharding.price.target import Target


@dataclass(frozen=True)
class Seconds:
    """Modelled seconds on the fast network and on the one between islands; None where it has no figure."""

    inside: float | None
    across: float | None


def seconds_of(kind: str, payload: int, path: Path, target: Target) -> Seconds:
    """Modelled seconds of one collective whose operand has `payload` bytes on a device (`sharding.ledger.KINDS`)."""
    n, m, islands = path.devices, path.inside, path.islands
    if kind == "permute":
        return Seconds(
            _permute(payload, path, target) if m > 1 else 0.0,
            _steps(payload, 1, target.machine.across) if islands > 1 else 0.0,
        )
    if kind == "all-to-all":
        away = payload * (n - m) // n
        return Seconds(
            _exchange(payload * m // n, path, target) if m > 1 else 0.0,
            _steps(away, islands - 1, target.machine.across) if islands > 1 else 0.0,
        )
    whole = payload * n if kind == "all-gather" else payload
    rounds = 2 if kind == "all-reduce" else 1
    inside = _gather(whole, path, target) if m > 1 else 0.0
    across = 0.0
    if islands > 1:  # each device carries its own share of what its island holds
        across = _steps(whole / m * (islands - 1) / islands, islands - 1, target.machine.across)
    return Seconds(
        None if inside is None else rounds * inside - (rounds - 1) * _start(target.machine.inside, m),
        None if across is None else rounds * across - (rounds - 1) * _start(target.machine.across, islands),
    )


def _start(network: Network, devices: int) -> float:
    return (network.start or 0.0) if devices > 1 else 0.0


def _steps(sent: float, steps: int, network: Network) -> float | None:
    """Seconds for `steps` steps in which a device sends `sent` bytes in all."""
    if network.bandwidth is None:
        return None
    return (network.start or 0.0) + steps * (network.latency or 0.0) + sent / network.bandwidth


def _gather(whole: float, path: Path, target: Target) -> float | None:
    """Seconds to gather an array of `whole` bytes within an island, or to reduce and scatter one."""
    network, m = target.machine.inside, path.inside
    sent = whole * (m - 1) / m
    if network.kind != "torus":
        return _steps(sent, m - 1, network)
    if network.bandwidth is None:
        return None
    if path.ring:  # both ways round, half of the array each
        return (m // 2) * (network.latency or 0.0) + sent * path.ring / 2 / network.bandwidth
    chips = _chips(path, target)
    if not chips:
        return _between_cores(sent, target)
    rate = sum(network.bandwidth * (2 if s.closed else 1) / s.shared for s in chips)
    return sum(_hops(s) for s in chips) * (network.latency or 0.0) + sent / rate


def _exchange(payload: float, path: Path, target: Target) -> float | None:
    """Seconds in which every device of a group in one island sends every other its share of `payload` bytes.

    On a ring of n the pieces of one device pass n/8 of its bytes through each direction of a link, on an open line twice
    that; dims work at once.
    """
    network, m = target.machine.inside, path.inside
    if network.kind != "torus":
        return _steps(payload * (m - 1) / m, m - 1, network)
    if network.bandwidth is None:
        return None
    latency = network.latency or 0.0
    if path.ring:
        return (m // 2) * latency + payload * m / 8 * path.ring / network.bandwidth
    chips = _chips(path, target)
    if not chips:
        return _between_cores(payload * (m - 1) / m, target)
    busiest = max(s.places * s.shared * payload / (8 if s.closed else 4) for s in chips)
    return sum(_hops(s) for s in chips) * latency + busiest / network.bandwidth


def _permute(payload: float, path: Path, target: Target) -> float | None:
    """Seconds in which every device sends `payload` bytes to the next of its group."""
    network = target.machine.inside
    if network.kind != "torus":
        return _steps(payload, 1, network)
    if network.bandwidth is None:
        return None
    chips = _chips(path, target)
    if not chips and not path.ring:
        return _between_cores(payload, target)
    shared = path.ring or max(s.shared for s in chips)
    hops = max((s.hops for s in chips), default=1)
    return hops * (network.latency or 0.0) + payload * shared / network.bandwidth


def _chips(path: Path, target: Target) -> list[Span]:
    """The spans over chips, without that over the devices of a chip: these pass the chips' links on to each other."""
    return [s for s in path.spans if s.dim < len(target.shape)]


def _hops(span: Span) -> int:
    """From one end of a span to the farthest place."""
    return span.hops * (span.places // 2 if span.closed else span.places - 1)


def _between_cores(sent: float, target: Target) -> float | None:
    between = target.machine.between_cores
    return None if between is None or between.bandwidth is None else sent / between.bandwidth
