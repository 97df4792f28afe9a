"""What the tests of the core share: rules and models found by their place, shrunk steps, and the one-device oracle."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from sharding import ordered
from sharding.axes import NAMES, MeshShape
from sharding.layout import Layouts
from sharding.ledger import Collective, collectives
from sharding.mesh import device_mesh
from sharding.params import bind, declare, param, zeros
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.pipeline.grid import Schedule
from sharding.proof.double import doubled
from sharding.proof.meshes import axes_of
from sharding.region import Region, Tap, enter
from sharding.rule import Ask, Rule, Rules, also, rule
from sharding.step import Split, State, TrainStep

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "vocab": 32,
    "layers": 2,
    "embed": 16,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 4,
    "mlp": 32,
    "length": 8,
    "features": 16,
    "classes": 8,
}
"""Sizes to which a model's configuration is shrunk, where it has a field of that name."""
ROWS = 16


def load(path: Path, name: str = "") -> Any:
    """The module in a file; from inside the repo by its own name, from outside under `name` or the file's."""
    if path.is_relative_to(ROOT):
        return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    spec = importlib.util.spec_from_file_location(name or path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rule_files() -> list[Path]:
    """Every rule file of the repo."""
    return sorted(p for p in (ROOT / "sharding" / "rules").glob("*.py") if p.stem != "__init__")


def factory(path: Path) -> Callable[..., Rules]:
    """The rule factory of a rule file: what bears the file's name."""
    return getattr(load(path), path.stem)


def examples(path: Path, name: str = "") -> list[Rules]:
    """The rules on which a rule file is tested: its factory without arguments, where it needs none, and every call of
    itself that the factory's docstring shows in backquotes.
    """
    module = load(path, name)
    make = getattr(module, path.stem)
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needs = [
        p.name
        for p in inspect.signature(make).parameters.values()
        if p.default is p.empty and p.kind not in free
    ]
    shown = re.findall(rf"`({path.stem}\(.+?\))`", make.__doc__ or "", re.DOTALL)
    calls = [*([] if needs else [f"{path.stem}()"]), *shown]
    assert calls, (
        f"{path.name}: {path.stem} needs {', '.join(needs)}, so its docstring must show a call of it in backquotes to be "
        f"tested on, such as `{path.stem}({needs[0]}=...)`."
    )
    return [eval(call, dict(vars(module))) for call in calls]


def split_axes(rules: Rules) -> tuple[str, ...]:
    """Mesh axes that rules speak of in their mappings, or place on the small perceptron or on an activation that has every
    name, outermost first.
    """
    model = model_configs()["mlp"].build()
    inputs = [tuple(entry.names.split()) for entry in model.inputs.values()]
    return axes_of(rules, declare(model), [*inputs, tuple(NAMES)])


def split_mesh(rules: Rules) -> MeshShape:
    """A mesh of up to 8 devices that gives every axis that rules split over more than one device."""
    axes = split_axes(rules)
    sizes = {1: (4,), 2: (2, 4), 3: (2, 2, 2)}.get(len(axes), ())
    sizes = tuple(min(n, SMALL["layers"]) if a == "stage" else n for a, n in zip(axes, sizes, strict=True))
    return MeshShape.of(*zip(axes, sizes, strict=True))


def model_configs() -> dict[str, Any]:
    """File name -> shrunk configuration of every model in models/, found by its place."""
    found = {}
    for path in sorted((ROOT / "models").glob("*_config.py")):
        module = load(path)
        kinds = [k for k in vars(module).values() if inspect.isclass(k) and k.__module__ == module.__name__]
        (kind,) = [k for k in kinds if dataclasses.is_dataclass(k) and hasattr(k, "build")]
        found[path.stem.removesuffix("_config")] = shrunk(kind())
    return found


def shrunk(config: Any, **changes: Any) -> Any:
    """A model configuration with small sizes and the changes named."""
    fields = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in SMALL.items() if k in fields}, **changes)


@rule
def _drawn(roles: Mapping[str, Any]) -> Rule:
    return Rule(**roles)


def custom(**roles: Any) -> Rules:
    """A rule made on the spot from drawn mappings, a role each."""
    return _drawn(roles)


class Remembered(NamedTuple):
    """Optimizer state that is the last gradient."""

    gradient: Any


def remembering(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, with the gradient it was given kept in the state: one compiled step then shows all that a test
    compares.
    """

    def init(params: Any) -> Any:
        return Remembered(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, Remembered(updates)

    keep = optax.GradientTransformation(init, update)
    return optax.chain(keep, optimizer)


def make_step(
    config: Any,
    rules: Rules = Rules(),  # noqa: B008 (a frozen value)
    mesh: MeshShape | None = None,
    partitioner: Partitioner = Manual(),  # noqa: B008
    accumulate: int = 1,
    clip: float = math.inf,
    optimizer: optax.GradientTransformation | None = None,
    model: Any = None,
    schedule: Schedule | None = None,
) -> TrainStep:
    """A step that remembers its gradients, on the first devices; without `mesh`, plain jax.numpy on one device."""
    shape = mesh or MeshShape()
    layouts = Layouts(rules, shape.sizes())
    count = shape.devices
    devices = None if mesh is None else device_mesh(shape, jax.devices()[:count])
    split = Split(layouts, devices, Auto() if mesh is None else partitioner, accumulate, schedule=schedule)
    built = config.build() if model is None else model
    return TrainStep(built, remembering(optimizer or optax.sgd(0.1)), split, clip)


def batches(config: Any, steps: int, rows: int = ROWS, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Random batches for a model: weights differ from row to row, and the first eighth of the rows weighs nothing."""
    draw = np.random.default_rng(seed)
    limit = getattr(config, "vocab", None) or getattr(config, "classes", 2)
    made = []
    for _ in range(steps):
        batch: dict[str, np.ndarray] = {}
        for key, entry in config.build().inputs.items():
            shape = (rows, *entry.row)
            if np.issubdtype(entry.dtype, np.integer):
                batch[key] = draw.integers(0, limit, shape).astype(entry.dtype)
            elif key == "weights":
                batch[key] = draw.uniform(0.1, 2.0, shape).astype(entry.dtype)
                batch[key][: rows // 8] = 0.0
            else:
                batch[key] = draw.normal(size=shape).astype(entry.dtype)
        made.append(batch)
    return made


@functools.cache
def initial_params(config: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Initial parameters made on one device."""
    return jax.device_get(make_step(config).init(seed)["params"])


def start(step: TrainStep, params: Mapping[str, np.ndarray]) -> State:
    """The state before the first step from given parameters, laid out as the step wants it."""
    state = {
        "params": {p: jnp.array(w) for p, w in params.items()},
        "optimizer": step.optimizer.init({p: jnp.array(w) for p, w in params.items()}),
        "step": jnp.zeros((), jnp.int32),
    }
    shardings = step.state_shardings()
    return state if shardings is None else jax.device_put(state, shardings)


def place(step: TrainStep, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch where the step wants it."""
    shardings = step.batch_shardings()
    return {
        k: jnp.array(x) if shardings[k] is None else jax.device_put(x, shardings[k]) for k, x in batch.items()
    }


class Trained(NamedTuple):
    """What training some steps gave: losses and other metrics by step, gradients by step, parameters at the end."""

    metrics: list[dict[str, float]]
    gradients: list[dict[str, np.ndarray]]
    params: dict[str, np.ndarray]


def train(step: TrainStep, params: Mapping[str, np.ndarray], data: list[dict[str, np.ndarray]]) -> Trained:
    """Train one step a batch from the given parameters."""
    state, metrics, gradients = start(step, params), [], []
    for batch in data:
        state, seen = step.step(state, place(step, batch))
        metrics.append({k: float(v) for k, v in seen.items()})
        gradients.append(jax.device_get(state["optimizer"][0].gradient))
    return Trained(metrics, gradients, jax.device_get(state["params"]))


@functools.cache
def oracle(config: Any, steps: int, seed: int = 0, clip: float = math.inf) -> Trained:
    """What one device computes, from `initial_params` over `batches`."""
    step = make_step(config, clip=clip)
    made = train(step, initial_params(config), batches(config, steps, seed=seed))
    # two runs that both do nothing would agree
    assert all(np.abs(g).max() > 0 for g in made.gradients[0].values()), "a leaf without a gradient"
    assert all((made.params[p] != w).any() for p, w in initial_params(config).items()), (
        "a leaf that is not updated"
    )
    return made


def worst(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """Largest departure over the leaves, relative to the leaf's largest entry, and the leaf."""
    assert set(found) == set(expected)
    errors = [(departure(found[p], expected[p]), p) for p in expected]
    return max(errors)


def departure(found: Any, expected: Any) -> float:
    """max |found - expected| / max |expected|, in float64; infinite when anything is not finite or shapes differ."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.max(np.abs(a - b), initial=0.0) / max(float(np.max(np.abs(b), initial=0.0)), 1e-30))


def assert_same(found: Trained, expected: Trained, bound: float) -> None:
    """Loss and metrics, every gradient and every parameter agree to `bound`, relative to each leaf's largest entry."""
    for at, (a, b) in enumerate(zip(found.metrics, expected.metrics, strict=True)):
        assert set(a) == set(b)
        for key in b:
            assert abs(a[key] - b[key]) <= bound * max(abs(b[key]), 1e-30), (at, key, a[key], b[key])
    for at, (a, b) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        error, leaf = worst(a, b)
        assert error <= bound, f"gradient of {leaf} in step {at} departs by {error:.2e}"
    error, leaf = worst(found.params, expected.params)
    assert error <= bound, f"parameter {leaf} departs by {error:.2e}"


def widened_arrays(tree: Any) -> Any:
    """The floating-point NumPy arrays of a pytree in float64."""
    return jax.tree.map(
        lambda x: (
            x.astype(np.float64) if isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating) else x
        ),
        tree,
    )


def in_double(
    config: Any,
    rules: Rules,
    mesh: MeshShape,
    partitioner: Partitioner = Manual(),  # noqa: B008 (a frozen value)
    schedule: Schedule | None = None,
) -> tuple[Trained, Trained]:
    """What two updates of a split and of one device give, both in double."""
    params, rows = widened_arrays((initial_params(config), batches(config, 2)))
    wide = dataclasses.replace(config, dtype="float64") if hasattr(config, "dtype") else config
    with jax.enable_x64(True):
        one = train(make_step(wide, model=doubled(wide.build()), schedule=schedule), params, rows)
        split = make_step(wide, rules, mesh, partitioner, model=doubled(wide.build()), schedule=schedule)
        many = train(split, params, rows)
    assert all(g.dtype == np.float64 for g in many.gradients[0].values())
    return many, one


class Holder(nnx.Module):
    """A module that holds parameters and computes nothing: what a test calls an op with."""

    def __init__(self, shapes: Mapping[str, tuple[str, tuple[int, ...]]]):
        for key, (names, shape) in shapes.items():
            setattr(self, key, param(names, shape, zeros))


Named = tuple[str, Any]
"""Names of an array's dims, and the array."""


class Through:
    """A function of parameters and activations, run through the named ops on a mesh, and what it gives.

    `call(params, inputs)` gets both by key and returns one array whose dims are `out`. With `mesh` None it runs as
    plain jax.numpy on one device.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        params: Mapping[str, Named],
        inputs: Mapping[str, Named],
        out: str,
        rules: Rules = Rules(),  # noqa: B008
        mesh: MeshShape | None = None,
        partitioner: Partitioner = Manual(),  # noqa: B008
    ):
        self.call, self.out = call, tuple(out.split())
        self.params, self.inputs = (
            {k: a for k, (_, a) in params.items()},
            {k: a for k, (_, a) in inputs.items()},
        )
        self.names = {k: tuple(n.split()) for k, (n, _) in inputs.items()}
        self.holder = Holder({k: (n, a.shape) for k, (n, a) in params.items()})
        tree = declare(self.holder)
        self.sizes = (mesh or MeshShape()).sizes()
        self.layouts = Layouts(rules, self.sizes)
        self.mesh = None if mesh is None else device_mesh(mesh)
        self.partitioner = partitioner
        self.lies = {k: self.layouts.param(k, s.names, s.shape) for k, s in tree.items()}
        self.taps: list[Tap] = []

    def function(self, params: dict[str, Any], inputs: dict[str, Any]) -> Any:
        """Global arrays in, a global array out."""
        if self.mesh is None:
            return self.call(self._bound(params), inputs)

        def run(params: dict[str, Any], inputs: dict[str, Any]) -> Any:
            with enter(Region(self.layouts, self.mesh, self.partitioner, self.taps)) as region:
                laid = {k: ordered.enter(region, x, self.names[k]) for k, x in inputs.items()}
                return ordered.leave(region, self.call(self._bound(params), laid), self.out)

        if isinstance(self.partitioner, Auto):
            return run(params, inputs)
        rest, given = self._specs()
        out = self.layouts.activation(self.out).spec()
        return jax.shard_map(run, mesh=self.mesh, in_specs=(rest, given), out_specs=out, check_vma=True)(
            params, inputs
        )

    def _bound(self, params: dict[str, Any]) -> dict[str, Any]:
        module = bind(self.holder, params)
        return {k: getattr(module, k) for k in params}

    def _specs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        rest = {k: x.param.spec() for k, x in self.lies.items()}
        return rest, {k: self.layouts.activation(n).spec() for k, n in self.names.items()}

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters and inputs where they lie."""
        if self.mesh is None:
            return jax.tree.map(jnp.array, (self.params, self.inputs))
        mesh = self.mesh
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), self._specs())
        return jax.device_put((self.params, self.inputs), shardings)

    def value(self) -> np.ndarray:
        """The result, whole."""
        return np.asarray(jax.jit(self.function)(*self.arguments()))

    def value_and_gradients(self) -> dict[str, np.ndarray]:
        """The result under "" and, by key, the gradients of its sum weighed by fixed random numbers."""
        params, inputs = self.arguments()
        exact = {k: x for k, x in inputs.items() if not jnp.issubdtype(x.dtype, jnp.inexact)}
        real = {k: x for k, x in inputs.items() if k not in exact}

        @jax.jit
        def both(params: dict[str, Any], real: dict[str, Any]) -> tuple[Any, Any]:
            out, pull = jax.vjp(lambda p, r: self.function(p, {**r, **exact}), params, real)
            weigh = np.random.default_rng(1).normal(size=out.shape).astype(out.dtype)
            return out, pull(jnp.array(weigh))

        out, (of_params, of_inputs) = jax.device_get(both(params, real))
        return {"": out, **of_params, **of_inputs}

    def traced(self) -> list[Collective]:
        """Every collective of the forward pass."""
        return collectives(jax.make_jaxpr(self.function)(*self.arguments()), self.sizes)


@st.composite
def placements(draw: Any, activations: list[str], params: list[str], axes: tuple[str, ...]) -> Rules:
    """Rules that lay each of the named arrays anyhow: each axis on some dim or none, in an order drawn for the array.

    Parameters get such a layout for their use, and at rest are split further by the axes that this leaves.
    """
    order = {n: draw(st.permutations(axes)) for n in {*activations, *params}}
    used = {n: [draw(st.sampled_from([*n.split(), None])) for _ in axes] for n in activations}
    compute = {n: [draw(st.sampled_from([*n.split(), None])) for _ in axes] for n in params}
    rest = {n: [draw(st.sampled_from([*n.split(), None])) for _ in axes] for n in params}

    def kth(
        table: dict[str, list[str | None]], k: int, unless: dict[str, list[str | None]] | None = None
    ) -> Any:
        def place(ask: Ask) -> dict[str, Any]:
            key = " ".join(ask.names)
            if key not in table or table[key][k] is None or (unless and unless[key][k] is not None):
                return {}
            return {str(table[key][k]): also(order[key][k])}

        return place

    made = Rules()
    for k in range(len(axes)):
        made |= custom(compute=kth(compute, k), param=kth(rest, k, compute), activation=kth(used, k))
    return made


def assert_like_one_device(
    call: Callable[..., Any],
    params: Mapping[str, Named],
    inputs: Mapping[str, Named],
    out: str,
    rules: Rules,
    mesh: MeshShape,
    partitioner: Partitioner = Manual(),  # noqa: B008 (a frozen value)
    bound: float = 4e-6,
) -> None:
    """Value and gradients of `call` (see `Through`) on the mesh are those of one device to `bound`."""
    plain = Through(call, params, inputs, out).value_and_gradients()
    found = Through(call, params, inputs, out, rules, mesh, partitioner).value_and_gradients()
    error, leaf = worst(found, plain)
    assert error < bound, (leaf or "value", error)
