"""Optimizers as config values, jax-free: optax is imported when the transformation is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sharding.errors import InputError

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with linear warm-up, cosine decay and global-norm clipping.

    With t counted from 0 and T steps in all, the rate is `peak (t+1)/warmup` while t < warmup, then
    `peak (floor + (1-floor) (1 + cos(pi (t-warmup)/(T-warmup))) / 2)`. The first step has a rate above 0.
    """

    peak: float = 3e-3
    """Learning rate at the end of the warm-up."""
    warmup: int = 20
    """Steps of linear warm-up; a run that is shorter ends within it."""
    floor: float = 0.1
    """Rate that the cosine ends at, as a fraction of `peak`."""
    b1: float = 0.9
    """Decay of the mean of the gradient."""
    b2: float = 0.95
    """Decay of the mean of the squared gradient."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    weight_decay: float = 0.1
    """Fraction of a parameter taken off per unit of learning rate, from matrices; scales and biases do not decay."""
    mean_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the mean of the gradient is kept between steps; bfloat16 takes a quarter off the optimizer's state."""
    memory: Literal["device", "host"] = "device"
    """Where both means lie between steps: "host" frees 8 bytes a parameter on the devices and moves them to and fro each
    step, which their link has to carry (docs/memory.md)."""
    clip: float = field(default=1.0, metadata={"infinite": "no clipping"})
    """Largest norm of the gradient over all parameters together; inf leaves it as it is."""

    def __post_init__(self) -> None:
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int):
            raise InputError(
                f"optimizer.warmup is {self.warmup!r}, but it counts steps: give a whole number."
            )
        for name, holds, wanted in (
            ("peak", 0 < self.peak < math.inf, "above 0"),
            (
                "warmup",
                0 <= self.warmup < 2**31,
                "at least 0 steps and below 2**31, since they are counted in 32 bits",
            ),
            ("floor", 0 <= self.floor <= 1, "a fraction from 0 to 1"),
            ("b1", 0 <= self.b1 < 1, "at least 0 and below 1"),
            ("b2", 0 <= self.b2 < 1, "at least 0 and below 1"),
            ("eps", 0 < self.eps < math.inf, "above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("mean_dtype", self.mean_dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
            ("memory", self.memory in ("device", "host"), "'device' or 'host'"),
            ("clip", self.clip > 0, "above 0 (inf: no clipping)"),
        ):
            if not holds:
                raise InputError(
                    f"optimizer.{name} is {getattr(self, name)!r}, but it must be {wanted}. Change it."
                )

    def largest_norm(self) -> float:
        """`clip`, at which the train step clips."""
        return self.clip

    def schedule(self, steps: int) -> Callable[[Any], Any]:
        """Step (int or traced int32 scalar, from 0) -> learning rate (float32 scalar) of a run of `steps` steps."""
        import jax.numpy as jnp

        def rate(step: Any) -> Any:
            t = jnp.asarray(step, jnp.float32)
            warm = (t + 1) / max(self.warmup, 1)
            # A run that ends within the warm-up never reads the cosine: the 1 only keeps the division defined.
            done = jnp.clip((t - self.warmup) / max(steps - self.warmup, 1), 0, 1)
            cosine = self.floor + (1 - self.floor) * (1 + jnp.cos(math.pi * done)) / 2
            return self.peak * jnp.where(t < self.warmup, warm, cosine)

        return rate

    def build(self, steps: int, matrices: Any = None) -> optax.GradientTransformation:
        """AdamW and its schedule for a run of `steps` optimizer steps, without clipping.

        The train step clips before it (`largest_norm`), because only there the norm over all shards is known. `matrices`, a
        tree of truths like the parameters, says which of them decay; None decays all.
        """
        import optax

        return optax.adamw(
            self.schedule(steps),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            # None is the parameters' own type: float32, and double where a step is computed in double
            mu_dtype=None if self.mean_dtype == "float32" else self.mean_dtype,
            weight_decay=self.weight_decay,
            mask=matrices,
        )
