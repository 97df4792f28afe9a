"""Marks by which results are kept or dropped between the passes: every named op's result bears its op and its dims' names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

from sharding.errors import InputError
from sharding.remat import Remat

INSIDE = ("attention",)
"""Ops that mark what their backward pass needs by themselves: their result need not be kept too to spare the work."""
HOST = "pinned_host"
"""The memory of the host that a device reads by itself."""

_seen: ContextVar[set[str] | None] = ContextVar("seen", default=None)


def mark(x: Array, op: str, names: tuple[str, ...] = ()) -> Array:
    """`x`, which a remat policy by name then calls by `op` (if it is not "") and by each of `names`. Nothing is computed."""
    text = f"{op}:{' '.join(names)}"
    seen = _seen.get()
    if seen is not None:
        seen.add(text)
    return checkpoint_name(x, text)


@contextmanager
def marks() -> Iterator[set[str]]:
    """The marks that are made inside this context."""
    made: set[str] = set()
    token = _seen.set(made)
    try:
        yield made
    finally:
        _seen.reset(token)
        outer = _seen.get()
        if outer is not None:
            outer |= made


def policy(remat: Remat) -> Callable[..., Any]:
    """The policy of `jax.checkpoint` by which marked results are saved, offloaded or dropped; all else is dropped."""

    def keeps(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive.name != "name":
            return False
        name = params["name"]
        how = remat.of(name)
        named = checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[name] if how == "save" else [],
            names_which_can_be_offloaded=[name] if how == "offload" else [],
            offload_src="device",
            offload_dst=HOST,
        )
        return named(primitive, *avals, **params)

    return keeps


def check_words(remat: Remat, made: set[str], block: str) -> None:
    """Refuse a word that none of the marks `made` by a block has, with the words that there are."""
    ops = {op for op, _, _ in (text.partition(":") for text in made) if op}
    dims = {name for text in made for name in text.partition(":")[2].split()}
    for word in sorted(remat.words - ops - dims):
        near = difflib.get_close_matches(word, sorted(ops | dims), 1)
        raise InputError(
            f"remat={remat.text!r}: no result in {block} is called {word!r}. "
            f"{f'Did you mean {near[0]!r}? ' if near else ''}Its ops are {', '.join(sorted(ops)) or 'none'}; the dims of "
            f"their results are {', '.join(sorted(dims)) or 'none'}. Take one of these words."
        )


def require_host(mesh: Any, asked: str) -> None:
    """Refuse to put arrays in the host's memory where devices cannot read it; `asked`: what was asked for.

    A mesh of no devices, to trace only, is not asked; nor are a topology's devices that are not there.
    """
    if mesh is None:
        device = jax.devices()[0]
    elif isinstance(mesh, jax.sharding.Mesh):
        device = mesh.devices.flat[0]
    else:
        return
    try:
        kinds = [m.kind for m in device.addressable_memories()]
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return
    if HOST not in kinds:
        raise InputError(
            f"{asked} needs the memory {HOST!r}, which {device.platform} devices of this machine do not have: they have "
            f"{', '.join(kinds)}. Keep it on the devices, or take a backend that can."
        )
