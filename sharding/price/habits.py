"""What lies in memory of a program that a compiler has fused, and what each platform's compiler does besides.

Seen in the schedules of modules that jax 0.10.2's compilers made for CPU, H100, TPU v5e and v5p: transformers, experts, rings,
perceptrons and convolutions, scanned over layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sharding.ledger import KINDS, PRODUCTS

SAME = frozenset(
    "reshape squeeze expand_dims pcast pvary copy optimization_barrier sharding_constraint stop_gradient name".split()
)
"""jax primitives whose result lies where their operand does."""

LOOPS = ("scan", "while", "cond")

WHOLE = frozenset([*KINDS, *PRODUCTS, *LOOPS, "sort", "top_k", "custom_call", "pallas_call"])
"""jax primitives whose operands and results lie in memory."""

FRESH = frozenset(
    "gather scatter scatter-add scatter_add concatenate reduce_sum reduce_max reduce_min reduce_and reduce_or argmax argmin "
    "cumsum cumlogsumexp cummax random_bits rng_bit_generator threefry2x32 dynamic_update_slice".split()
)
"""jax primitives whose results lie in memory while their operands may be fused into them. Of every other both may be."""

ELSEWHERE = WHOLE | FRESH | {"pad", "transpose"}
"""jax primitives whose results cannot be written over their operands."""


@dataclass(frozen=True)
class Habits:
    """What a platform's compiler does beside fusing, as it was seen in the schedules of its modules."""

    alone: frozenset[str] = frozenset()
    """Primitives whose results lie too."""
    dear: frozenset[str] = frozenset()
    """Primitives whose results lie where several read them: they are not computed again for each."""
    turned: bool = False
    """Whether the left operand of a product is copied where what is summed does not lie last in it. Whatever makes that operand
    is then done again for the copy, so that what it reads lies until then."""
    rows: bool = False
    """Whether a loop's body cuts all its rows of stacked arrays out at its beginning, into memory of their own."""
    late: bool = False
    """Whether products that no other product and no loop waits for, gradients of matrices above all, are done last, so that
    what they read lies until then."""
    hoists: bool = False
    """Whether stacked arrays that a loop only casts to fewer bits are cast before it, whole."""
    on_chip: int = 0
    """Bytes of memory on the chip in which work of the moment is put as far as it fits: arrays of at most half of it that no
    loop has stacked."""


HABITS: Mapping[str, Habits] = {
    "cpu": Habits(alone=frozenset(["pad"]), dear=frozenset("exp logistic tanh log div".split()), turned=True),
    "gpu": Habits(rows=True, late=True),
    "tpu": Habits(hoists=True),
}
"""Platform -> what its compiler does. A TPU's memory on the chip is the machine's (`Machine.on_chip`)."""
