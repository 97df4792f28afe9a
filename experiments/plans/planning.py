"""Making a plan: trace the step for devices that are not there, price it, and ask the target's compiler.

`plan_for(origin, experiment, target)` is one pass: layouts -> trace -> prediction -> modelled time -> compiled module ->
verdict. Every part that cannot be had is named in the plan, never replaced by another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.assemble import look, near, train_step, untouched
from experiments.budget import budget_of, exceeded
from experiments.compilers.ask import Compiled, compile_for, missing
from experiments.config import Experiment
from experiments.explanation import explain_step
from experiments.plans.estimate import on_target, priced, step_for
from experiments.plans.planned import Made, Moved, Plan, Verdict, summed, totals_of
from experiments.plans.remedies import changes
from experiments.plans.words import percent
from experiments.run_config import Origin
from sharding.errors import InputError
from sharding.finding import Limits, human
from sharding.partitioner import Auto, called

if TYPE_CHECKING:
    from sharding.check import Traced
    from sharding.price.prediction import Footprint, Prediction
    from sharding.price.target import Target
    from sharding.step import TrainStep

Tell = Callable[[str], None]
Ask = Literal["both", "manual", "auto", "none"]
"""Under which partitioners the step is compiled."""


def plan_for(
    origin: Origin,
    experiment: Experiment,
    target: Target,
    ask: Ask = "both",
    limits: Limits = Limits(),  # noqa: B008
    tell: Tell = lambda text: None,
) -> Plan:
    """The plan of a config (`origin`, whose value is `experiment`) on a target. No backend of jax is started here.

    Raises InputError for a mesh that does not fit the target and for whatever cannot be laid out; a compiler that is not
    installed is told in the plan.
    """
    from sharding.price.prediction import predict
    from sharding.price.standins import grid, stand_ins

    here, lacking = on_target(experiment, target), []
    tell(f"tracing the step for {target.describe()}")
    step, seen, refused = untouched(lambda: _seen(here, experiment, target))
    told = untouched(lambda: explain_step(here if seen.update else experiment, step, limits, seen))
    predicted = (
        untouched(lambda: predict(step, here.batch, seen.update, target.machine)) if seen.update else None
    )
    if refused:
        lacking.append(f"prediction: {refused}")
    made = []
    wanted: Sequence[Literal["manual", "auto"]] = (
        ("manual", "auto") if ask == "both" else () if ask == "none" else (ask,)
    )
    lacks = missing(target) if wanted else "not asked for"
    if lacks:
        lacking.append(f"compiled figures: {lacks}")
    for partitioner in () if lacks else wanted:
        if partitioner == "manual" and predicted is None:
            continue
        made.append(_made(compile_for(origin.path, origin.overrides, target, partitioner, tell)))
    own = next(
        (m for m in made if m.partitioner == called(experiment.partitioner)), made[0] if made else None
    )
    order = {device.id: at for at, device in enumerate(stand_ins(target))}
    memory = predicted.memory if predicted else None
    moved = _moved(predicted, step) if predicted else ()
    return Plan(
        config=near(str(origin.path)),
        target=target.text,
        devices=target.describe(),
        islands=target.islands,
        lies=tuple(order[device.id] for device in grid(here.mesh, target).flat),
        explanation=told,
        moved=moved,
        memory=memory,
        modelled=priced(predicted, here, target) if predicted else None,
        made=tuple(made),
        verdict=verdict(memory, own, origin, here, target, tell),
        over_budget=_over(origin.path, moved, own),
        missing=tuple(lacking),
    )


def _seen(here: Experiment, experiment: Experiment, target: Target) -> tuple[TrainStep, Traced, str]:
    """The step under named ops and its trace; of a model that these refuse XLA's, with what they said."""
    try:
        step = step_for(here, target)
        return step, look(here, step), ""
    except InputError as error:
        if not isinstance(experiment.partitioner, Auto):
            raise
        alone = replace(here, partitioner=experiment.partitioner)
        step = train_step(alone, target.devices, platform=target.platform)
        return step, look(alone, step), str(error)


def _moved(predicted: Prediction, step: TrainStep) -> tuple[Moved, ...]:
    """Collectives by what asked for them."""
    from sharding.waste import rules_of

    placed, rows = rules_of(step.split.layouts), {}
    for c in predicted.collectives:
        s = c.scope
        key = (c.axes, c.kind, c.op, s.names, s.phase, s.layers, near(c.source))
        rows.setdefault(key, []).append(c)
    found = (
        Moved(
            *key,
            rules=tuple(dict.fromkeys(f"{call} {near(at)}" for a in key[0] for call, at in placed[a])),
            dtypes=tuple(dict.fromkeys(c.dtype for c in each)),
            times=sum(c.times for c in each),
            payload=sum(c.payload for c in each),
            sent=sum(c.bytes for c in each),
        )
        for key, each in rows.items()
    )
    return tuple(sorted(found, key=lambda row: -row.sent))


def _made(found: Compiled) -> Made:
    """What a compiler made, held to what was predicted of the very step that it was given."""
    return Made(
        found.partitioner,
        totals_of(found.collectives),
        tuple(replace(d, source=near(d.source)) for d in found.differences()),
        found.memory,
        found.refused,
        found.seconds,
        found.versions,
    )


def _over(path: Path, moved: tuple[Moved, ...], own: Made | None) -> tuple[str, ...]:
    """Where the config's budget is exceeded: by what is predicted, and by what its own partitioner compiled to."""
    budget = budget_of(path)
    told = exceeded(budget, summed(moved), "predicted")
    return told + (exceeded(budget, own.totals, f"compiled ({own.partitioner})") if own else ())


def verdict(
    memory: Footprint | None,
    own: Made | None,
    origin: Origin,
    here: Experiment,
    target: Target,
    tell: Tell,
) -> Verdict:
    """Whether the step fits a device, and what would make it fit: by the compiler's word where there is one, of `own`, the step
    under the config's partitioner.
    """
    capacity, machine = target.machine.memory, target.machine.device_kind
    refused = own.refused if own else None
    if own and own.memory:
        needs, by = own.memory.total, "compiled"
    elif refused:
        needs, by, capacity = refused.used, "compiled", refused.capacity or capacity
    else:
        needs, by = (memory.total if memory else None), "predicted"
    if refused and (needs is None or capacity is None):
        says = f"The compiler refused the step without telling its bytes: {refused.message}"
        return Verdict(None, by, capacity, False, says, ())
    if needs is None:
        return Verdict(None, by, capacity, None, "Nobody knows what the step needs: see what is missing.", ())
    if capacity is None:
        says = f"The step needs {human(needs)} on each device ({by}); {machine} devices have no memory of their own."
        return Verdict(needs, by, None, None, says, ())
    fits = needs <= capacity and not refused
    share = f"{human(needs)} of {human(capacity)} on each device ({by}, {percent(needs / capacity)})"
    if fits:
        return Verdict(needs, by, capacity, True, f"It fits: {share}.", ())
    tell("looking for what would make it fit")
    found = changes(origin, here, target, capacity)
    says = f"It does not fit: {share}." + (
        "" if found else " None of the changes tried, alone or in pairs, makes it fit."
    )
    return Verdict(needs, by, capacity, False, says, found)
