"""From figures to a ranking and a pick: what fits comes first, then the shorter modelled step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from experiments.config import Experiment
from experiments.search.found import Figure, Row, front
from experiments.search.space import Candidate
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.finding import human
from sharding.price.target import Target
from sharding.rule import Rules


def ranked(
    known: Mapping[Candidate, Figure | str],
    making: Callable[[Candidate], tuple[str, ...]],
    experiment: Experiment,
    target: Target,
) -> tuple[Row, ...]:
    """Rows by what fits, then by modelled step, then by memory; of what does not fit, the least memory first."""
    capacity = target.machine.memory

    def order(item: tuple[Candidate, Figure]) -> tuple[object, ...]:
        figure = item[1]
        step = float("inf") if figure.step is None else figure.step
        if capacity is not None and figure.memory > capacity:
            return (True, figure.memory, step)
        return (False, step, figure.memory)

    found = sorted(((c, f) for c, f in known.items() if isinstance(f, Figure)), key=order)
    on_front = front([f for _, f in found])
    now = _as_given(experiment, target)
    return tuple(
        Row(
            rank=at + 1,
            candidate=c,
            rules=c.rules or _written(experiment.rules),
            words=making(c),
            figure=f,
            fits=None if capacity is None else f.memory <= capacity,
            front=on_front[at],
            given=c == now,
        )
        for at, (c, f) in enumerate(found)
    )


def _written(rules: Rules) -> str:
    return repr(rules).replace("()", "") if rules.chain else repr(rules)


def _as_given(experiment: Experiment, target: Target) -> Candidate | None:
    """The candidate that is the config as it is; None where its mesh does not fit the target."""
    try:
        shape: MeshShape = experiment.mesh.resolve(target.devices)
    except InputError:
        return None
    mesh = tuple((a, n) for a, n in shape.sizes().items() if n > 1)
    return Candidate(mesh, "", getattr(experiment.model, "remat", ""), experiment.accumulate)


def picked(rows: Sequence[Row], target: Target) -> tuple[int | None, str]:
    """The pick's rank, and what it is: of the compiled the best that fits by the compiler, else the first that fits."""
    capacity = target.machine.memory
    compiled = [r for r in rows if r.compiled]
    if compiled:
        fit = [r for r in compiled if r.compiled and r.compiled.fits(capacity)]
        best = min(fit, key=lambda r: (_step(r), r.rank), default=None)
    else:
        best = next((r for r in rows if r.fits is not False), None)
    if best is not None:
        return best.rank, f"The pick is candidate {best.rank}: {said(best)}."
    if not rows:
        return None, "No candidate could be traced."
    return None, _lacking(rows, compiled, capacity or 0, target.machine.device_kind)


def _lacking(rows: Sequence[Row], compiled: Sequence[Row], capacity: int, machine: str) -> str:
    """The nearest candidate and what it lacks, where none fits."""
    none = (
        f"None of the {len(compiled)} candidates that were compiled fits" if compiled else "No candidate fits"
    )
    nearest = min(compiled or rows, key=_needs)
    what, made = f"candidate {nearest.rank} ({said(nearest)})", nearest.compiled
    if made is not None and made.memory is None:
        return f"{none}: the compiler refused {what}: {made.refused}"
    needs, by = _needs(nearest), "compiled" if made else "predicted"
    return (
        f"{none}: the nearest is {what}, which needs {human(needs)} ({by}) where {machine} devices have {human(capacity)}: "
        f"{human(needs - capacity)} too much on each. Take more devices or larger ones, a smaller batch, more --microbatches "
        f"or --remat, or an optimizer that keeps less."
    )


def _step(row: Row) -> float:
    return row.compiled.step if row.compiled and row.compiled.step is not None else float("inf")


def _needs(row: Row) -> int:
    return row.compiled.memory if row.compiled and row.compiled.memory is not None else row.figure.memory


def said(row: Row) -> str:
    """A candidate in words."""
    c = row.candidate
    mesh = c.shape().describe()
    remat = f", remat {c.remat}" if c.remat else ""
    return f"{mesh}, {row.rules}{remat}, accumulate {c.accumulate}"
