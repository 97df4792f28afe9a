"""A config on a target: what its traced step will do there, and the time modelled from it. Nothing is compiled or run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from experiments.assemble import train_step, untouched
from experiments.config import Experiment
from experiments.schedules.named import grid_of
from sharding.partitioner import Manual
from sharding.pipeline.tables import useful

if TYPE_CHECKING:
    from sharding.price.prediction import Prediction
    from sharding.price.target import Target
    from sharding.price.timing import Modelled
    from sharding.step import TrainStep


@dataclass(frozen=True)
class Estimate:
    """What is known of a split before anything is compiled."""

    predicted: Prediction
    modelled: Modelled


def estimate(experiment: Experiment, target: Target) -> Estimate:
    """The estimate of an experiment, whose mesh must fit the target: InputError for what does not, and for a rule or an axis
    that no array uses, whose devices would only repeat work. Under XLA's partitioner there is nothing to be read from a
    trace: it is made for shardlab's.
    """
    experiment = on_target(experiment, target)
    made = untouched(lambda: _predicted(experiment, target))
    return Estimate(made, priced(made, experiment, target))


def _predicted(experiment: Experiment, target: Target) -> Prediction:
    from sharding.price.prediction import predict

    step = step_for(experiment, target)
    made = predict(step, experiment.batch, machine=target.machine)
    step.split.layouts.check_used()
    return made


def priced(made: Prediction, experiment: Experiment, target: Target) -> Modelled:
    """The time modelled from a prediction. Of a pipeline all that its devices do in a tick, also in vain, takes time; what is
    in vain is the bubble, and counts in no op and in no MFU.
    """
    from sharding.price.standins import grid
    from sharding.price.timing import modelled

    laid = grid(experiment.mesh, target)
    whole = modelled(made.work, made.collectives, target, laid)
    if experiment.pipeline is None or whole.step is None:
        return whole
    share = useful(grid_of(experiment.pipeline, experiment.mesh.sizes()["stage"]))
    of_use = lambda x: replace(x, times=round(x.times * share.get(x.scope.task, 1.0)))
    works, moved = [of_use(w) for w in made.work], [of_use(c) for c in made.collectives]
    busy = modelled(works, moved, target, laid).step or 0.0
    return modelled(works, moved, target, laid, bubble=1 - busy / whole.step)


def on_target(experiment: Experiment, target: Target) -> Experiment:
    """The experiment as it would be there: its mesh filled, over as many slices as the target has, by named ops."""
    mesh = experiment.mesh.resolve(target.devices)
    if target.platform == "tpu":  # GPU hosts are islands only where the config says so
        mesh = replace(mesh, slices=target.islands)
    own = experiment.partitioner
    return replace(experiment, mesh=mesh, partitioner=own if isinstance(own, Manual) else Manual())


def step_for(experiment: Experiment, target: Target) -> TrainStep:
    """The step on the target's devices, to trace only."""
    return train_step(experiment, target.devices, platform=target.platform)
