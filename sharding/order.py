"""Orders of positions: where the elements of a dim stand when they do not lie in their natural order. No jax here.

A rule may say that a name's positions are laid out in another order than they count in (`Rule.order`), so that equal
parts of the dim are equal work. Inputs are brought to that order where they enter the manual region and results back
where they leave it; in between only `sharding.ops.positions` and attention ask for positions, and they ask the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sharding.errors import InputError

Index = Any
"""An int, or an integer array of numpy or jax."""


class Order(Protocol):
    """A permutation of a dim that depends on how many parts an axis cuts it into."""

    @property
    def axis(self) -> str:
        """The mesh axis whose devices it makes equal."""
        ...

    def position(self, index: Index, size: int, parts: int) -> Index:
        """Natural position of what lies at `index` of a dim of `size` elements that the axis cuts into `parts`."""
        ...

    def check(self, size: int, parts: int, name: str) -> None:
        """Raise InputError when a dim called `name` of `size` elements cannot be laid out so."""
        ...


@dataclass(frozen=True)
class ZigZag:
    """Of 2n equal chunks, device i holds chunks i and 2n-1-i: under a causal mask all devices see equally many keys.

    Source: the load-balanced context parallelism of Megatron-LM and of Dubey et al. 2024, arXiv:2407.21783, 3.3.2.
    """

    axis: str

    def position(self, index: Index, size: int, parts: int) -> Index:
        """Natural position of what lies at `index`."""
        chunk = size // (2 * parts)
        part, second = index // (2 * chunk), index // chunk % 2
        return part * chunk + index % (2 * chunk) + second * chunk * (2 * parts - 2 - 2 * part)

    def check(self, size: int, parts: int, name: str) -> None:
        """A dim must divide into two chunks a device."""
        if size % (2 * parts):
            raise InputError(
                f"{name} = {size} is to lie in zig-zag order over {self.axis}={parts}, two chunks a device, but it does not "
                f"divide into {2 * parts} chunks. Make {name} a multiple of {2 * parts}, or choose order='contiguous'."
            )
