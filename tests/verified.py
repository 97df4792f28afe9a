"""What tests of `verify` share: small configs, datasets opened once, one case verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax

from configs import digits_mlp, quickstart
from experiments.config import Experiment
from experiments.data.contract import Dataset
from experiments.data.stdlib import Stdlib
from experiments.verification import cases, verify
from experiments.verified import Outcome, Verified
from models.mlp import MLP
from models.mlp_config import MLPConfig
from sharding.axes import MeshShape
from sharding.partitioner import Manual, Partitioner
from sharding.rule import Rules
from sharding.rules.data import data
from sharding.rules.tensor import tensor
from tests.support import shrunk

DATA = MeshShape(data=2)
BOTH = MeshShape(data=2, tensor=2)


def small(kind: str = "mlp", rules: Rules = data() | tensor()) -> Experiment:  # noqa: B008
    """The quickstart or the digits config, shrunk."""
    if kind == "mlp":
        e = digits_mlp.config()
        model = MLPConfig(features=64, embed=16, mlp=32, layers=2, classes=10)
        return replace(e, model=model, batch=16, rules=rules)
    e = quickstart.config()
    model = replace(shrunk(e.model), vocab=256)
    return replace(e, model=model, data=Stdlib(length=model.length), batch=16, rules=rules)


Opened = Callable[[Experiment], Dataset]
"""A config's dataset, opened once: the fixture `opened`."""


def judged(
    e: Experiment,
    opened: Opened,
    mesh: MeshShape = DATA,
    by: Partitioner = Manual(),  # noqa: B008
    x64: bool = False,
    steps: int = 2,
) -> Verified:
    """One mesh under one partitioner."""
    return verify(e, opened(e), jax.devices(), cases(e, 8, [mesh], [by]), steps, x64)


def only(made: Verified) -> Outcome:
    (outcome,) = made.outcomes
    return outcome


@dataclass(frozen=True)
class Own:
    """A test's own model on the digits."""

    kind: type[MLP]

    def build(self) -> MLP:
        """The model."""
        return self.kind(MLPConfig(features=64, embed=16, mlp=32, layers=2, classes=10))
