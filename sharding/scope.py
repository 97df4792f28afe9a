"""What a traced or compiled instruction belongs to, by its name stack: the named op, the model's layers, the pass.

jax carries the names of enclosing scopes through autodiff and compilation, so the same text stands in the jaxpr, in the
compiled module and in a profile: `transpose(jvp(layers: 12))/einsum: batch embed, embed mlp -> batch mlp/all_gather`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

Phase = Literal["forward", "backward", "update"]
"""The pass of a step: the model's own, its transpose with what that computes again, and all that follows."""


@dataclass(frozen=True)
class Scope:
    """What a name stack says."""

    phase: Phase = "update"
    layers: int = 0
    """How many layers the model has where this stands in one of them; 0 outside."""
    op: str = ""
    """The named op that the model called; "" outside any."""
    names: str = ""
    """The names that the op was given: an einsum's text, an activation's dims."""
    task: str = ""
    """The slot of a pipeline's tick that this is done in (`sharding.pipeline.tables`); "" outside a pipeline."""


def named(op: Callable[P, R]) -> Callable[P, R]:
    """A named op whose instructions carry its name and the text that it is given first."""

    @functools.wraps(op)
    def scoped(*args: P.args, **kwargs: P.kwargs) -> R:
        text = next((x for x in (*args, *kwargs.values()) if isinstance(x, str)), "")
        with about(op.__name__, text):
            return op(*args, **kwargs)

    return scoped


def about(op: str, text: str) -> AbstractContextManager[object]:
    """Whatever is traced inside belongs to `op`, which was given `text`: no slash, no parenthesis, no colon in either."""
    return jax.named_scope(f"{op}: {text}")


def in_layers(depth: int) -> AbstractContextManager[object]:
    """Whatever is traced inside stands in one of `depth` layers."""
    return about("layers", str(depth))


def in_task(slot: str) -> AbstractContextManager[object]:
    """Whatever is traced inside is done in this slot of a pipeline's tick."""
    return about("task", slot)


def scope_of(stack: str) -> Scope:
    """The scope of a name stack, outermost first, parts divided by slashes."""
    phase: Phase = "forward" if "jvp(" in stack else "update"
    if "transpose(" in stack or "rematted_computation" in stack:
        phase = "backward"
    found = [(m[1], m[2].strip()) for m in _NAMED.finditer(stack)]
    layers = next((int(text) for op, text in found if op == "layers"), 0)
    task = next((text for op, text in reversed(found) if op == "task"), "")
    op, names = next(((op, text) for op, text in found if op not in ("layers", "task")), ("", ""))
    return Scope(phase, layers, op, names, task)


_NAMED = re.compile(r"(\w+): ?([^/()]*)")
