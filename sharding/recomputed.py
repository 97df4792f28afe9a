"""Cheap work that the backward pass does again instead of keeping its results: norms, gates, activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import Array, lax

R = TypeVar("R")


def recomputed(f: Callable[..., R]) -> Callable[..., R]:
    """`f`, of which only the arguments are kept for the backward pass, where it is computed again.

    What `jax.checkpoint(f)` is elsewhere. Within another checkpoint, such as that in which layers gather their parameters
    again, jax asks the outer one's policy alone and would keep all that is computed in `f`; a backward pass of its own is
    left as it is. f: a function of arrays, which closes over no traced value.
    """

    @jax.custom_vjp
    def run(*given: Array) -> R:
        return f(*given)

    def forward(*given: Array) -> tuple[R, tuple[Array, ...]]:
        return f(*given), given

    def backward(given: tuple[Array, ...], cotangent: Any) -> tuple[Array, ...]:
        given, cotangent = lax.optimization_barrier((given, cotangent))  # not before it is needed
        return jax.vjp(f, *given)[1](cotangent)

    run.defvjp(forward, backward)
    return run
