"""A training state as paths and leaves: what is stored, what can be, and how two states differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sharding.errors import InputError


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path, the parts joined with "/": {"optimizer/1/0/mu/embed": leaf}.

    Dict keys, sequence positions and attribute or field names count alike; empty nodes have no path.
    """
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {"/".join(_part(key) for key in path): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise InputError(
            f"a state of {len(leaves)} arrays has only {len(flat)} distinct paths: rename its keys."
        )
    return flat


def is_key(leaf: Any) -> bool:
    """Whether an array, or a jax.ShapeDtypeStruct, is of typed PRNG keys (`jax.random.key`), as some optimizers keep."""
    import jax
    import jax.numpy as jnp

    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def numbers(leaf: Any) -> Any:
    """A leaf as it is stored: typed PRNG keys as the uint32 that they hold, one dim more; anything else as it is.

    An abstract leaf (jax.ShapeDtypeStruct with a sharding) becomes the abstract array of these numbers.
    """
    import jax

    if not is_key(leaf):
        return leaf
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    held = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(held.shape, held.dtype, sharding=leaf.sharding)


def like(asked: Any, stored: Any) -> Any:
    """A stored array as what the abstract leaf `asked` says: the inverse of ``numbers``."""
    import jax

    if not is_key(asked):
        return stored
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), asked)  # only keys tell, shapes do not
    return jax.random.wrap_key_data(stored, impl=kinds[0])


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The dict of dicts with these paths; the inverse of ``flatten`` up to the kinds of container."""
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *above, last = path.split("/")
        node = root
        for part in above:
            node = node.setdefault(part, {})
        node[last] = leaf
    return root


def summary(flat: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{path: [shape, dtype]} as JSON knows it, for instance {"step": [[], "int32"]}."""
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in flat.items()}


def differences(stored: Mapping[str, list[Any]], asked: Mapping[str, list[Any]]) -> list[str]:
    """What sets two tree summaries apart, a phrase for each kind of difference; empty if they are equal."""
    both = [path for path in asked if path in stored]
    shapes = [f"{p} {stored[p][0]} against {asked[p][0]}" for p in both if stored[p][0] != asked[p][0]]
    dtypes = [f"{p} {stored[p][1]} against {asked[p][1]}" for p in both if stored[p][1] != asked[p][1]]
    kinds = {
        "asked for but not in the checkpoint": [path for path in asked if path not in stored],
        "in the checkpoint but not asked for": [path for path in stored if path not in asked],
        "other shapes (stored against asked)": shapes,
        "other dtypes (stored against asked)": dtypes,
    }
    return [f"{kind}: {some(found)}" for kind, found in kinds.items() if found]


def complete_meta(meta: Mapping[str, Any], step: int, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """``meta`` with "step" and "tree"; InputError if it says otherwise itself, or is no JSON."""
    if step < 0:
        raise InputError(f"a checkpoint's step is a count of updates and cannot be {step}.")
    own = {"step": step, "tree": summary(arrays)}
    for key, value in own.items():
        if meta.get(key, value) != value:
            raise InputError(
                f"meta[{key!r}] disagrees with the state saved as step {step}: leave it to the store."
            )
    complete = {**meta, **own}
    try:
        faithful = json.loads(json.dumps(complete)) == complete
    except (TypeError, ValueError) as error:
        raise InputError(f"the meta of a checkpoint must be JSON, and this is not: {error}.") from error
    if not faithful:
        raise InputError(
            "the meta of a checkpoint must be JSON: string keys, lists instead of tuples, no NaN."
        )
    return complete


def check_savable(arrays: Mapping[str, Any]) -> None:
    """Raise InputError unless these are arrays that a checkpoint can hold: jax.Arrays, at least one."""
    import jax

    strange = [f"{path} ({type(x).__name__})" for path, x in arrays.items() if not isinstance(x, jax.Array)]
    if not arrays:
        raise InputError("a checkpoint needs at least one array, and this state has none.")
    if strange:
        raise InputError(
            f"a checkpoint holds jax.Arrays alone; put these into arrays first: {some(strange)}."
        )


def _part(key: Any) -> str:
    """One part of a path: a dict's key, a sequence's position, a field's name."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            part = str(getattr(key, attribute))
            if not part or "/" in part:
                raise InputError(f"{part!r} cannot be a key of a state: keys are not empty and hold no '/'.")
            return part
    raise InputError(
        f"a state is made of dicts, sequences and named fields; {key!r} is the path of none of them."
    )


def some(items: list[str], most: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
