"""A config's collective budget: what may move in one step, so that a change which moves more does not pass unseen.

A config file says it beside `config()`:

    def budget() -> tuple[Most, ...]:
        return (Most(over="tensor", kind="all-reduce", times=16), Most(over="data", bytes=50_000_000))

`plan` holds the predicted and the compiled collectives to it; a test does so for every config of the repository.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.config_file import call, execute
from sharding.axes import AXES, nearest
from sharding.errors import InputError

if TYPE_CHECKING:
    from experiments.plans.planned import Total

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "permute")


@dataclass(frozen=True)
class Most:
    """A bound on the collectives of one step."""

    over: str
    """A mesh axis: every collective that crosses it counts, also one over this axis and others."""
    kind: str = ""
    """Collectives of one kind, such as "all-reduce"; "" all."""
    times: int | None = None
    """At most so many in a step."""
    bytes: int | None = None
    """At most so many bytes sent by a device in a step."""

    def __post_init__(self) -> None:
        if self.over not in AXES:
            raise InputError(
                f"The budget names a mesh axis {self.over!r}{nearest(self.over, AXES)}. The axes are {', '.join(AXES)}."
            )
        if self.kind and self.kind not in KINDS:
            raise InputError(
                f"The budget names collectives {self.kind!r}{nearest(self.kind, KINDS)}. The kinds are {', '.join(KINDS)}."
            )
        if self.times is None and self.bytes is None:
            raise InputError(f"The budget over {self.over} bounds nothing: give it times or bytes.")


def budget_of(path: Path) -> tuple[Most, ...]:
    """What `budget()` of a config file returns; () where it has none. InputError where that is no budget."""
    module = execute(path)
    if not hasattr(module, "budget"):
        return ()
    found = call(module, "budget", path, example="def budget() -> tuple[Most, ...]")
    if not isinstance(found, tuple) or not all(isinstance(most, Most) for most in found):
        raise InputError(
            f"budget() in {path} returns {found!r:.80}, but it must return a tuple of `experiments.budget.Most`."
        )
    return found


def exceeded(budget: Iterable[Most], totals: Iterable[Total], by: str) -> tuple[str, ...]:
    """A sentence for each bound that the collectives break; `by`: whose figures they are."""
    listed, told = list(totals), []
    for most in budget:
        rows = [t for t in listed if most.over in t.axes and most.kind in ("", t.kind)]
        times, sent = sum(t.times for t in rows), sum(t.sent for t in rows)
        what = f"{most.kind or 'collective'}s over {most.over}"
        if most.times is not None and times > most.times:
            told.append(f"{by}: {times} {what} in a step, but the config's budget is {most.times}.")
        if most.bytes is not None and sent > most.bytes:
            told.append(f"{by}: {what} send {sent} bytes a step, but the config's budget is {most.bytes}.")
    return tuple(told)
