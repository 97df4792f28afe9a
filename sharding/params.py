"""The abstract tree: every parameter's path, shape, dtype, names and initializer, before any array exists.

A model is built without arrays: each `param` holds a `jax.ShapeDtypeStruct`. Shapes, layouts, memory, FLOPs and the
initial values all derive from it. In a train state parameters are one flat dict, path -> array.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sharding.errors import InputError


class Model(Protocol):
    """What a model is to the step: a Flax NNX module that says what it reads and sums its loss."""

    inputs: dict[str, Entry]
    """Entries of a batch, by name."""

    def loss(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Global sums over a batch: "loss", "weight" by which it is divided, and any others to be reported as means. Where
        more than the loss is to be made small (a penalty), the sum of it all is "objective".
        """
        ...


def objective(sums: Mapping[str, jax.Array]) -> jax.Array:
    """Of a model's sums the one that is minimized: "objective" where it gives one, else "loss"."""
    return sums.get("objective", sums["loss"])


Init = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
M = TypeVar("M")


FLAT_UP_TO = 2**24
"""Elements up to which `normal` draws an array as one dim: the same numbers, and XLA:CPU compiles them 6 times faster.
Above, each device must be able to draw its own part alone."""


@functools.cache
def _quantiles() -> np.ndarray:
    """The standard normal's quantiles at the middles of 2^16 equal steps of probability, float32, rescaled to variance 1."""
    upper = [NormalDist().inv_cdf(0.5 + (i + 0.5) / 2**16) for i in range(2**15)]
    both = np.concatenate([-np.array(upper[::-1]), np.array(upper)])
    return (both / both.std()).astype(np.float32)


def normal(stddev: float) -> Init:
    """Initializer: normal with this standard deviation, mean 0, in 2^16 equally likely values (up to 4.3 deviations).

    Random bits choose from a table: integers, a look-up and one product are exact, so the values are bitwise equal on
    every mesh and platform. A formula is not: compilers contract and vectorize the inverse error function differently
    for differently split arrays.
    """

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        size = math.prod(shape)
        drawn = (size,) if size <= FLAT_UP_TO else shape
        chosen = jnp.right_shift(jax.random.bits(key, drawn, jnp.uint32), jnp.uint32(16)).astype(jnp.int32)
        table = jnp.asarray(_quantiles())
        taken = jnp.take(table, chosen, axis=0, mode="clip").reshape(shape)
        return (taken * jnp.float32(stddev)).astype(dtype)

    return draw


def ones(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Initializer: ones."""
    return jnp.ones(shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Initializer: zeros."""
    return jnp.zeros(shape, dtype)


@dataclass(frozen=True)
class Entry:
    """One entry of a batch that a model reads: names of its dims, `batch` first, and the shape and dtype of one row."""

    names: str
    row: tuple[int, ...]
    dtype: str
    indexes: str = ""
    """For integers: the name of the dim that they are indices of, as token ids are of `vocab`; then any index of it is
    a legal value. Empty where values mean something else."""
    documents: Literal["", "number", "place"] = ""
    """For integers over positions that documents share: "number" where a value says in which of its row's documents a position
    is (from 1; 0 in none, padding at the row's end), "place" which of its document's positions it is (from 0; 0 in padding).
    Then any cut of a row into documents is legal. Empty where values mean something else."""

    def abstract(self, rows: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of `rows` rows."""
        return jax.ShapeDtypeStruct((rows, *self.row), self.dtype)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the abstract tree. `shape` is global, stacked dims included; `names` names every dim."""

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    names: tuple[str, ...]
    init: Init
    vector: bool = False
    """Whether it is a vector by kind, though it may have two dims (a bias of heads and head_dim)."""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype as jax asks for them."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


def param(names: str, shape: tuple[int, ...], init: Init, dtype: jnp.dtype = jnp.float32) -> nnx.Param:
    """Declare a parameter: `param("embed mlp", (256, 1024), normal(256**-0.5))`. No array is made."""
    words = tuple(names.split())
    if len(words) != len(shape):
        raise InputError(
            f"A parameter names {len(words)} dims ({names}) for a shape of {len(shape)} dims {shape}. Name every dim."
        )
    return nnx.Param(
        jax.ShapeDtypeStruct(shape, dtype), names=words, global_shape=tuple(shape), init=init, path=""
    )


def stack(block: M, n: int) -> M:
    """Stack a block `n` times: every parameter gets a leading dim `layers` of size n. Returns the same block."""
    for _, variable in nnx.to_flat_state(nnx.state(block, nnx.Param)):
        at_rest = jax.ShapeDtypeStruct((n, *variable.global_shape), variable.get_value().dtype)
        variable.set_metadata(names=("layers", *variable.names), global_shape=at_rest.shape)
        variable.set_value(at_rest)
    return block


def declare(model: Any) -> dict[str, ParamSpec]:
    """The abstract tree of a model, path -> ParamSpec; also tells each parameter its path."""
    tree: dict[str, ParamSpec] = {}
    for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path = ".".join(map(str, keys))
        meta = variable.get_metadata()
        if "names" not in meta or "init" not in meta:
            raise InputError(
                f"Parameter {path} carries no names: declare it with sharding.params.param(names, shape, init)."
            )
        variable.set_metadata(path=path)
        value = variable.get_value()
        tree[path] = ParamSpec(
            path,
            tuple(meta["global_shape"]),
            value.dtype,
            tuple(meta["names"]),
            meta["init"],
            meta.get("vector", False),
        )
    return tree


def matrices(tree: Mapping[str, ParamSpec]) -> dict[str, bool]:
    """path -> whether the parameter is a matrix (two dims or more besides `layers`, and no vector by kind): what weight
    decay applies to.
    """
    own = {path: [n for n in spec.names if n != "layers"] for path, spec in tree.items()}
    return {path: len(own[path]) >= 2 and not spec.vector for path, spec in tree.items()}


def bind(model: M, arrays: Mapping[str, jax.Array]) -> M:
    """A copy of `model` whose parameters hold `arrays` (path -> array); the paths must be the model's own."""
    graph, state = nnx.split(model)  # type: ignore[arg-type]  (M is a module: a protocol cannot say so)
    flat = [
        (k, v.replace(arrays[".".join(map(str, k))]) if isinstance(v, nnx.Param) else v)
        for k, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def values(model: Any) -> dict[str, jax.Array]:
    """The arrays that a model's parameters hold now, path -> array."""
    return {".".join(map(str, k)): v.get_value() for k, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@contextlib.contextmanager
def drawing(seed: int) -> Iterator[jax.Array]:
    """The key of a seed for what is drawn within, whatever jax's own settings are.

    JAX_DEFAULT_PRNG_IMPL and JAX_RANDOM_SEED_OFFSET would change the numbers of a run, JAX_THREEFRY_PARTITIONABLE also from
    mesh to mesh, and no record tells any of them. So the key is made of the seed's lowest 32 bits, which are all that
    `jax.random.key` takes without the offset and 64-bit types.
    """
    bits: Any = np.array([0, int(seed) & 0xFFFFFFFF], np.uint32)
    with jax.threefry_partitionable(True):
        yield jax.random.wrap_key_data(bits, impl="threefry2x32")


def initial(tree: Mapping[str, ParamSpec], seed: int) -> dict[str, jax.Array]:
    """Initial parameters: each a pure function of (seed, path), hence bitwise equal on every mesh."""
    with drawing(seed) as key:
        keys = {p: jax.random.fold_in(key, zlib.crc32(p.encode())) for p in tree}
        return {p: s.init(keys[p], s.shape, s.dtype) for p, s in tree.items()}


def lay(whole: Mapping[str, np.ndarray], shardings: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that every process has whole, each laid out by its sharding; as they are where that is None."""
    return {
        p: w
        if (s := shardings[p]) is None
        else jax.make_array_from_callback(w.shape, s, lambda at, w=w: w[at])
        for p, w in whole.items()
    }
