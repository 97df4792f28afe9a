"""The experiment as one frozen value: what is trained, on what, split how, and what is kept. No jax and no tyro here.

A config file returns it, the command line overrides it (`experiments.overrides`), a run records it
(`experiments.run_config`), and every later stage is a function of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path, PurePath
from types import NoneType
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from experiments.config_file import LOADED, call, execute
from experiments.data.contract import Source
from experiments.field_types import check_types
from experiments.optimizers import AdamW
from experiments.record_schema import NOT_FINITE
from experiments.require import require
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.partitioner import Manual, Partitioner
from sharding.pipeline.grid import Schedule
from sharding.rule import Rules


@runtime_checkable
class ModelConfig(Protocol):
    """A frozen dataclass of sizes, jax-free, that builds a model."""

    def build(self) -> Any:
        """The Flax NNX module; its `.inputs` names the dims of each entry of a batch."""
        ...


@runtime_checkable
class Optimizer(Protocol):
    """A frozen dataclass, jax-free, that makes an optax transformation for a run of so many steps."""

    def largest_norm(self) -> float:
        """Global norm to which a larger gradient is clipped; inf: none is. The train step clips, before the
        transformation, because only there the norm over all shards is known.
        """
        ...

    def schedule(self, steps: int) -> Any:
        """Step -> learning rate."""
        ...

    def build(self, steps: int, matrices: Any = None) -> Any:
        """The `optax.GradientTransformation` of a run of `steps` steps; `matrices`: which parameters are matrices."""
        ...


NOT_TEXT = re.compile("[\ud800-\udfff]")
"""What Python makes of bytes that are not UTF-8 in a word of the command line."""

MOST_SEEDS = 2**32
"""Seeds there are: jax's key takes the lowest 32 bits of one, so that a larger seed would be another's twin."""

MOST_STEPS = 2**31 - 2
"""Steps a run can have: the optimizer and its schedule count them, and the one after them, in int32."""


@dataclass(frozen=True)
class Devices:
    """The devices that the mesh is laid over."""

    kind: Literal["pretend", "present"] = "pretend"
    """"pretend": the CPU shown as `count` devices that share its cores. "present": the devices that are there."""
    count: int = 8
    """How many devices; -1 with kind "present" takes all there are."""

    def __post_init__(self) -> None:
        if self.kind not in ("pretend", "present"):
            raise InputError(f'devices.kind is {self.kind!r}; it is "pretend" or "present". Change it.')
        if self.kind == "present" and self.count == -1:
            return
        if self.kind == "pretend" and self.count == -1:
            raise InputError(
                "devices.count is -1 (all there are), but pretend devices are as many as one asks for. "
                'Give devices.count a number, or make devices.kind "present".'
            )
        require("devices.", "count", self.count, 1, "the number of devices")


@dataclass(frozen=True)
class Evaluate:
    """When and on how much held-out data the loss is measured."""

    every: int = 50
    """Steps between two evaluations; 0 evaluates after the last step only."""
    batches: int = 8
    """Held-out batches (of `batch` rows each) in one evaluation."""

    def __post_init__(self) -> None:
        require("evaluate.", "every", self.every, 0, "the steps between evaluations (0: only after the last)")
        require("evaluate.", "batches", self.batches, 1, "the batches of one evaluation")


@dataclass(frozen=True)
class Checkpoints:
    """When the state is saved and how much of it is kept."""

    every: int = 50
    """Steps between two checkpoints; 0 saves after the last step (and when told to stop) only."""
    keep: int = 2
    """Newest checkpoints that are kept; older ones are deleted."""

    def __post_init__(self) -> None:
        require(
            "checkpoints.", "every", self.every, 0, "the steps between checkpoints (0: only after the last)"
        )
        require("checkpoints.", "keep", self.keep, 1, "the checkpoints kept")


@dataclass(frozen=True)
class Sample:
    """The text that a trained language model writes at the end."""

    prompt: str = "def "
    """Text that the sample goes on from."""
    tokens: int = 0
    """Tokens to write; 0 writes no sample (a classifier has none)."""
    temperature: float = 0.8
    """Logits are divided by it before drawing; 0 takes the likeliest token each time."""

    def __post_init__(self) -> None:
        if NOT_TEXT.search(str(self.prompt)):
            raise InputError(f"sample.prompt is {self.prompt!r}, but text is UTF-8. Change sample.prompt.")
        require("sample.", "tokens", self.tokens, 0, "the length of the sample in tokens (0: none)")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"sample.temperature is {self.temperature!r}; it is a number from 0. Change it.")


@dataclass(frozen=True)
class Experiment:
    """One training run, whole: two equal values train the same numbers. Immutable and free of jax."""

    name: str
    """Names the run's folder, runs/NAME/TIME-HASH/."""
    model: ModelConfig
    """Sizes of the model."""
    data: Source
    """Rows that are trained on and held out."""
    rules: Rules
    """How arrays are split: files of sharding/rules/ joined by |, or a FILE.py with `def rules() -> Rules`."""
    mesh: MeshShape
    """Sizes of the mesh axes, in devices; one may be -1 (fill)."""
    batch: int
    """Global rows in one optimizer step, over all devices and micro-batches."""
    steps: int
    """Optimizer steps of the whole run."""
    partitioner: Partitioner = Manual()
    """Who turns layouts into collectives: "manual" (named ops in one manual region) or "auto" (XLA's partitioner);
    options as in "manual(gathered='keep')"."""
    pipeline: Schedule | None = None
    """How micro-batches go through stages of layers: a schedule of sharding/schedules/ on the mesh axis `stage`."""
    devices: Devices = Devices()
    """Devices that the mesh is laid over."""
    optimizer: Optimizer = AdamW()
    """The optimizer and its schedule."""
    accumulate: int = 1
    """Times that the model, or the pipeline, runs before one optimizer step, its gradients summed; divides `batch`."""
    seed: int = 0
    """Decides the initial parameters, the order of rows and the sample."""
    log_every: int = 10
    """Steps between two logged lines and records."""
    evaluate: Evaluate = Evaluate()
    """Held-out loss."""
    checkpoints: Checkpoints = Checkpoints()
    """Saved states."""
    sample: Sample = Sample()
    """Text written at the end."""

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..", *NOT_FINITE) or re.search(f"[/\\\\\0]|{NOT_TEXT.pattern}", self.name):
            raise InputError(
                f"name is {self.name!r}, but it names a folder, and in records {', '.join(NOT_FINITE)} are numbers: "
                f"give it other letters, digits, '-' or '_'."
            )
        for name, kinds in PARTS.items():
            if not isinstance(getattr(self, name), kinds):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise InputError(
                    f"{name} is {_article(getattr(self, name))}, but an experiment has a {wanted} there"
                    f"{_lacking(getattr(self, name), kinds)}. Change {name}."
                )
        require("", "batch", self.batch, 1, "the global rows of one step")
        require(
            *("", "steps", self.steps, 1, "the optimizer steps of the run"),
            *(MOST_STEPS, " (they are counted in 32 bits)"),
        )
        require("", "accumulate", self.accumulate, 1, "the micro-batches of one step")
        require("", "seed", self.seed, 0, "the seed", MOST_SEEDS - 1, " (jax's random key takes 32 bits)")
        require("", "log_every", self.log_every, 1, "the steps between log lines")
        if self.pipeline is not None:
            require(
                "pipeline.", "microbatches", self.pipeline.microbatches, 1, "the micro-batches of a pipeline"
            )
        if self.batch % self.accumulate:
            raise InputError(
                f"A batch of {self.batch} rows does not divide into accumulate = {self.accumulate} micro-batches: "
                f"the remainder is {self.batch % self.accumulate}. Change batch or accumulate."
            )


PARTS: dict[str, tuple[type, ...]] = {
    "model": (ModelConfig,),
    "data": (Source,),
    "rules": (Rules,),
    "mesh": (MeshShape,),
    "partitioner": get_args(Partitioner),
    "pipeline": (Schedule, NoneType),
    "devices": (Devices,),
    "optimizer": (Optimizer,),
    "evaluate": (Evaluate,),
    "checkpoints": (Checkpoints,),
    "sample": (Sample,),
}
"""What each part of an experiment must be an instance of."""


def load(path: str | Path) -> Experiment:
    """The experiment that the `config()` of a file returns. The file may lie anywhere, helpers beside it.

    Errors: `InputError`, in one paragraph with the line, for a missing file, no `config()`, a `config()` that raises,
    one that returns something else than an `Experiment`, and a field that is not of its annotation.
    """
    path = Path(path)
    value = call(execute(path), "config", path, example="def config() -> Experiment")
    if not isinstance(value, Experiment):
        raise InputError(
            f"config() in {path} returns {_article(value)}, but it must return an Experiment "
            f"(`from experiments.config import Experiment`). Is the `return` missing?"
        )
    check_types(value, f"config() in {path}")
    return value


def _lacking(value: object, kinds: tuple[type, ...]) -> str:
    """` (it lacks clip)` for a value that has a part of a protocol, else an empty string."""
    parts = [n for kind in kinds if issubclass(kind, Protocol) for n in dir(kind) if not n.startswith("_")]
    lacking = [n for n in parts if not hasattr(value, n)]
    return f" (it lacks {', '.join(lacking)})" if len(lacking) < len(parts) else ""


def _article(value: object) -> str:
    return "nothing (None)" if value is None else f"a value of type {type(value).__name__}"


def to_json(value: Any, where: str = "") -> Any:
    """A config value as plain JSON types: a dataclass becomes {"class": its name, field: ...}, rules their expression.

    Fields that do not take part in equality are left out. Infinite floats become their repr, so that the result is
    strict JSON. `InputError` names the field that holds something a file cannot keep.
    """
    if isinstance(value, Rules):
        return repr(value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {
            f.name: to_json(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value) if f.compare
        }
        return {"class": class_name(type(value)), **parts}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, (tuple, list)):
        return [to_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: to_json(v, f"{where}.{k}") for k, v in value.items()}
    raise InputError(
        f"The config holds a {type(value).__name__} at {where.lstrip('.') or 'its top'}, which cannot be recorded. "
        f"A config is made of dataclasses, numbers, text, paths, tuples and dicts with text keys."
    )


def class_name(kind: type) -> str:
    """module.Class, or Class alone for one defined in a config file, whose place must not change the hash."""
    return (
        kind.__qualname__ if kind.__module__.startswith(LOADED) else f"{kind.__module__}.{kind.__qualname__}"
    )


def config_hash(experiment: Experiment) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON: keys sorted, no spaces, ASCII, floats by repr.

    The same in every process, on every machine and Python version.
    """
    text = json.dumps(to_json(experiment), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
