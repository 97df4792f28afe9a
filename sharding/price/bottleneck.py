"""What takes longest in a modelled step and what to change, in one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sharding.price.target import Target

if TYPE_CHECKING:
    from sharding.price.timing import CollectiveTime, OpTime

_ADVICE = {
    "fsdp": "give each device more tokens a step, or put fewer devices on fsdp and the rest on data",
    "tensor": "put fewer devices on tensor and more on fsdp, or split the sequence between its blocks too",
    "data": "accumulate over more micro-batches, or put devices of data on fsdp",
    "replica": "synchronize less often",
    "expert": "put fewer devices on expert, or lower the capacity of the experts",
    "context": "put fewer devices on context, or give each a longer part of the sequence",
    "stage": "give each stage more micro-batches",
}
"""What lessens the traffic of an axis."""


def told(ops: Iterable[OpTime], moved: Iterable[CollectiveTime], step: float | None, target: Target) -> str:
    """One sentence: what takes the largest share of the modelled step, how much, and what to change."""
    if step is None:
        return f"No step time can be modelled for {target.text}: a figure of the machine is missing."
    parts: dict[tuple[str, ...], float] = {}
    for o in ops:
        what = "products" if o.kind in ("product", "convolution") else "other"
        key = ("op", what, o.limit)
        parts[key] = parts.get(key, 0.0) + (o.seconds or 0.0)
    for c in moved:
        for network, seconds in (("inside", c.inside), ("across", c.across)):
            key = (network, c.kind, *c.axes)
            parts[key] = parts.get(key, 0.0) + (seconds or 0.0)
    if not parts or step <= 0:
        return "The step does nothing that takes time in the model."
    worst = max(parts, key=lambda k: parts[k])
    share = f"{100 * parts[worst] / step:.0f} % of the modelled step ({_time(parts[worst])} of {_time(step)})"
    return f"{_subject(worst, target)} take {share}: {_change(worst)}."


def _subject(key: tuple[str, ...], target: Target) -> str:
    where, what, *rest = key
    if where == "op" and what == "products":
        return "The matrix products" + (", which wait for memory," if rest == ["memory"] else "")
    if where == "op":
        return "Elementwise runs and other ops that move memory"
    network = target.machine.inside if where == "inside" else target.machine.across
    kind = "permutations" if what == "permute" else "all-to-alls" if what == "all-to-all" else f"{what}s"
    return f"The {kind} over {' and '.join(rest)} on {network.name}"


def _change(key: tuple[str, ...]) -> str:
    where, what, *rest = key
    if where == "op" and what == "products":
        if rest == ["memory"]:
            return "give each device more tokens a step, or split the matrices less"
        return "that is what the devices are there for; less recomputation or lower precision shortens them"
    if where == "op":
        return "recompute less, keep activations in fewer bytes, or fuse further"
    advice = _ADVICE[rest[0]]
    if where == "across" and set(rest) & {"fsdp", "tensor", "expert", "context"}:
        inner = " and ".join(a for a in rest if a in ("fsdp", "tensor", "expert", "context"))
        return f"keep {inner} within an island and put data or replica across, or {advice}"
    return advice


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
