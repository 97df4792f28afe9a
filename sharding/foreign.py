"""Models that know nothing of shardlab: `init(key)` and `loss(params, batch)` in plain jax, made into a model for a step.

The arrays of the tree that `init` returns become parameters whose paths are its keys, whose shapes come from
`jax.eval_shape` and whose names come from patterns of path (`sharding.paths`). The code of `loss` is written for whole
arrays, so XLA partitions it (`Auto()`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sharding.axes import PLACES
from sharding.errors import InputError
from sharding.params import Entry, drawing, param
from sharding.paths import LEAVE, check_spoken, speaker, words
from sharding.region import current

VECTORS = ("*bias", "*scale")
"""Arrays that are vectors by kind, whatever their number of dims: attention's biases in Linen are `heads head_dim`."""


class Foreign(nnx.Module):
    """A tree of arrays and a function of it as a model; `TrainStep` and every command take it like any other.

    `init(key)` returns any pytree of floating-point arrays. `loss(params, batch)` takes a tree like it and returns scalars
    by name, sums over the batch: "loss", "weight" by which it is divided, others to be reported as means. Neither may
    keep state or draw numbers of its own during a step. `names` maps a pattern of path to one name a dim (`-`: none);
    dims without a name are called `dim0`, `dim1`, ..., which rules that go by place, such as `fsdp`, split as well.
    `vectors`: patterns of arrays that weight decay leaves alone besides those of fewer than two dims.

    Raises InputError for a tree that cannot be trained, and for a pattern that speaks for no array or does not fit one.
    """

    def __init__(
        self,
        init: Callable[[Array], Any],
        loss: Callable[[Any, dict[str, Array]], Mapping[str, Array]],
        inputs: Mapping[str, Entry],
        names: Mapping[str, str] | None = None,
        vectors: tuple[str, ...] = VECTORS,
    ):
        self.inputs = dict(inputs)
        self._init, self._loss = init, loss
        with drawing(0) as key:
            shapes = jax.eval_shape(lambda: _arrays(init(key)))
        flat, self._structure = jax.tree_util.tree_flatten_with_path(shapes)
        leaves = [(_path(keys), leaf) for keys, leaf in flat]
        self._paths = tuple(path for path, _ in leaves)
        for path, leaf in leaves:
            if hasattr(self, path):
                raise InputError(
                    f"The foreign model's tree has an array whose path is {path!r}, which another array or the model itself "
                    f"uses already. Rename its key, or nest the tree one level deeper, as in {{'params': ...}}."
                )
            made = param(
                " ".join(_names(names or {}, path, leaf.shape)), leaf.shape, _with_the_rest, leaf.dtype
            )
            made.set_metadata(vector=speaker(vectors, path) is not None)
            setattr(self, path, made)
        check_spoken("A foreign model's names: the pattern", names or {}, self._paths)
        if vectors != VECTORS:
            check_spoken("A foreign model's vectors: the pattern", vectors, self._paths)

    def initial(self, seed: int) -> dict[str, np.ndarray]:
        """Path -> initial array on the host: what `jax.jit(init)(key)` gives on one device, `key` being `drawing(seed)`'s.

        Drawn whole, so that its bits do not depend on the mesh: compilers round the same formula differently for
        differently split arrays (see `sharding.params.normal`, which own models use). The model must fit one device.
        """
        with drawing(seed) as key:
            made = jax.device_get(jax.tree.leaves(jax.jit(self._init)(key)))
        return dict(zip(self._paths, made, strict=True))

    def loss(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Global sums over a batch, by the foreign function on the tree as the `compute` role says."""
        region = current()
        if region is not None and (region.mesh is None or max(region.layouts.sizes.values()) == 1):
            region = None  # one device has every array whole
        if region is not None and region.manual:
            raise InputError(
                "The model is foreign: its loss is plain jax written for whole arrays, but under the partitioner Manual() it "
                "would see each device's shard, and its sums, softmaxes and products would be those of a part. "
                "Set partitioner=Auto() in the config (--partitioner auto), or write the model in named ops "
                "(CONTRIBUTING.md)."
            )
        variables = [getattr(self, path) for path in self._paths]
        arrays = [
            v.get_value() if region is None else region.constrain(v.get_value(), region.param(v).compute.dims)
            for v in variables
        ]
        return _sums(self._loss(jax.tree.unflatten(self._structure, arrays), batch))


def _path(keys: tuple[Any, ...]) -> str:
    """The keys of a leaf joined by dots, Haiku's slashes too; a tree that is one array has the path `array`."""
    parts = (getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in keys)
    return ".".join(str(p) for p in parts).replace("/", ".") or "array"


def _arrays(tree: Any) -> Any:
    """The tree itself, when all its leaves can be trained; called while `init` is traced."""
    if isinstance(tree, Mapping) and "params" in tree and len(tree) > 1:
        others = ", ".join(str(k) for k in tree if k != "params")
        raise InputError(
            f"The foreign model's init returns other collections beside params: {others}. A step carries and trains "
            f"parameters alone. Return variables['params'], and use layers that keep no state (in place of batch "
            f"normalization, another); if {others} is to be trained, give the key params another name."
        )
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise InputError("The foreign model's init returns no array. Return the tree of its parameters.")
    for keys, leaf in leaves:
        kind = leaf.dtype if isinstance(leaf, Array | np.ndarray) else type(leaf).__name__
        if not isinstance(leaf, Array | np.ndarray) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(
                f"The foreign model's init returns {_path(keys)}, which is {kind}: each leaf is trained, so each must be an "
                f"array of floating-point numbers. Leave it out of the tree and let loss close over it."
            )
    return tree


def _names(table: Mapping[str, str], path: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """One name a dim: those of the first pattern that matches, the dim's place where it says none."""
    said = words("A foreign model's names:", table, path, shape) or (LEAVE,) * len(shape)
    named = tuple(PLACES[i] if name == LEAVE else name for i, name in enumerate(said))
    if len(set(named)) < len(named):
        raise InputError(
            f"A foreign model's names: {speaker(table, path)!r} calls two dims of {path} by one name ({' '.join(said)}), "
            f"and a rule could not tell them apart. Leave one of them unnamed with {LEAVE!r}."
        )
    return named


def _sums(sums: Any) -> dict[str, Array]:
    """What the foreign loss returned, when it is what a step adds up."""
    lacking = (
        {"loss", "weight"} - set(sums)
        if isinstance(sums, Mapping)
        else f"a mapping (it is {type(sums).__name__})"
    )
    if lacking:
        raise InputError(
            f"The foreign model's loss lacks {lacking}. It must return a dict with the scalars 'loss' (summed over the "
            f"batch) and 'weight' (what the sum is divided by), and any others to be reported as means."
        )
    for name, value in sums.items():
        if jnp.shape(value) != ():
            raise InputError(
                f"The foreign model's loss returns {name!r} of shape {jnp.shape(value)}. Sum it over the batch: a scalar."
            )
    return dict(sums)


def _with_the_rest(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    raise InputError(
        "One array of a foreign model is not drawn alone: `Foreign.initial(seed)` draws all of them."
    )
