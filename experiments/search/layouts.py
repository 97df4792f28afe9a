"""Pruning without a trace: how a chain of rules lays a model's arrays on a mesh, or why it cannot.

The model's arrays are read from one trace of its forward pass, which no mesh and no rule changes; every mesh and chain is
then a matter of names and sizes. What divides here may still be refused while its own step is traced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from experiments.assemble import one_device, untouched
from experiments.config import Experiment
from sharding.errors import InputError
from sharding.layout import Layouts, local_shape
from sharding.rule import Rules

INSIDE = ({"length": "queries"}, {"length": "keys"})
"""What attention calls the length of an array of heads inside (`sharding.attention`)."""


@dataclass(frozen=True)
class Parameter:
    """A parameter and what the optimizer keeps for it."""

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    bytes: int
    """Of an element at rest."""
    moments: int
    """Bytes of an element that the optimizer keeps on the devices."""


@dataclass(frozen=True)
class Arrays:
    """Every array of a model, as a rule sees it."""

    parameters: tuple[Parameter, ...]
    activations: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
    """Names and global shape."""
    asked: tuple[tuple[str, ...], ...]
    """Names of further arrays whose layout an op asks for."""

    @property
    def names(self) -> set[str]:
        """Every name of a dim."""
        return {n for p in self.parameters for n in p.names} | {n for ns, _ in self.activations for n in ns}


@dataclass(frozen=True)
class Laid:
    """How a chain lays all arrays."""

    dims: tuple[Any, ...]
    """Two chains with equal ones split training alike."""
    rows: int
    """Parts that the batch is split into."""
    state: int
    """Bytes of parameters and optimizer on each device between steps."""


class Unfit(Exception):
    """A chain cannot lay the arrays on a mesh; the reason in few words."""


def arrays_of(experiment: Experiment) -> Arrays:
    """The arrays of an experiment's model: InputError where its forward pass cannot be traced."""
    return untouched(lambda: _arrays(replace(experiment, mesh=type(experiment.mesh)())))


def _arrays(experiment: Experiment) -> Arrays:
    import jax

    from sharding.check import optimizer_copies
    from sharding.region import enter

    step, taps = one_device(experiment), []
    state = step.abstract_state()
    with enter(step.region(taps)):
        jax.make_jaxpr(lambda p, b: step.evaluate_sums(p, b))(
            state["params"], step.abstract_batch(experiment.batch)
        )
    kept = optimizer_copies(step, state)
    on_devices = getattr(experiment.optimizer, "memory", "device") == "device"
    parameters = tuple(
        Parameter(
            path,
            s.names,
            s.shape,
            s.dtype.itemsize,
            sum(jax.numpy.dtype(d).itemsize for d in kept[path]) if on_devices else 0,
        )
        for path, s in step.tree.items()
    )
    shapes = dict.fromkeys((t.names, t.shape) for t in taps)
    batch = step.abstract_batch(experiment.batch)
    shapes |= dict.fromkeys((x.names, batch[entry].shape) for entry, x in step.inputs.items())
    for names, shape in list(shapes):
        if "length" in names and {"heads", "kv_heads"} & set(names):
            kind = INSIDE[0] if "heads" in names else INSIDE[1]
            shapes[tuple(kind.get(n, n) for n in names), shape] = None
    return Arrays(parameters, tuple(shapes), tuple(step.split.layouts.asked))


def axes_used(rules: Rules, arrays: Arrays) -> set[str]:
    """The mesh axes over which a chain splits any array of the model; InputError for rules that conflict."""
    layouts = _ask(rules, {}, arrays)
    every = [*layouts.asked.values(), *(p.optimizer for p in layouts.params.values())]
    return {reason.axis for layout in every for reason in layout.reasons}


def useful(rules: Rules, arrays: Arrays) -> bool:
    """Whether a rule speaks of any dim of the model and splits an array of it."""
    names = {n for rule in rules.chain for n in rule.names()}
    try:
        return bool(not names or names & arrays.names) and bool(axes_used(rules, arrays))
    except InputError:  # it needs others beside it, or does not know the model's own names
        return True


def lay(rules: Rules, sizes: Mapping[str, int], arrays: Arrays) -> Laid:
    """How a chain lays the arrays on a mesh (axis -> size); `Unfit` where it cannot."""
    try:
        layouts = _ask(rules, sizes, arrays)
        layouts.check_used()
    except InputError as error:
        raise Unfit(short(str(error))) from error
    dims: list[Any] = [layouts.asked[names].dims for names in sorted(layouts.asked)]
    state, rows = 0, 1
    for p in arrays.parameters:
        roles = layouts.params[p.path]
        dims.append(tuple(x.dims for x in roles.roles().values()))
        state += math.prod(local_shape(p.shape, roles.param.dims, layouts.sizes)) * p.bytes
        state += math.prod(local_shape(p.shape, roles.optimizer.dims, layouts.sizes)) * p.moments
    for names, _ in arrays.activations:
        for name, axes in zip(names, layouts.activation(names).dims, strict=True):
            if name == "batch":
                rows = max(rows, math.prod(layouts.sizes[a] for a in axes))
    dims.append(tuple(layouts.order(n) for n in sorted(arrays.names)))
    return Laid(tuple(dims), rows, state)


def _ask(rules: Rules, sizes: Mapping[str, int], arrays: Arrays) -> Layouts:
    """Layouts that were asked for every array; InputError for what does not divide."""
    from sharding.axes import AXES

    layouts = Layouts(rules, {a: sizes.get(a, 1) for a in AXES})
    for names, shape in arrays.activations:
        for name, n, axes in zip(names, shape, layouts.activation(names).dims, strict=True):
            if n % math.prod(layouts.sizes[a] for a in axes):
                raise InputError(f"{name} = {n} does not divide.")
    for names in arrays.asked:
        layouts.activation(names)
    for p in arrays.parameters:
        layouts.param(p.path, p.names, p.shape)
    return layouts


def short(message: str) -> str:
    """A refusal in few words, equal for equal causes: `heads = 12 does not divide`."""
    found = re.search(r"splits? (\w+) = (\d+) .*does not divide", message)
    if found:
        return f"{found[1]} = {found[2]} does not divide"
    found = re.search(r"does not divide into .* of \d+ micro-batches", message)
    if found:
        return "the batch does not divide into micro-batches of whole rows a device"
    first = re.sub(r"\S+\.py:\d+[:)]?\s*", "", message).split(". ")[0]
    return (
        re.sub(r"\d+", "N", first).rstrip(".")[:160]
        if not message.endswith("does not divide.")
        else first.rstrip(".")
    )


def count(reasons: Iterable[str]) -> dict[str, int]:
    """Reason -> how often, the most frequent first."""
    found: dict[str, int] = {}
    for reason in reasons:
        found[reason] = found.get(reason, 0) + 1
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
