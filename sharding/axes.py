"""The words: mesh axes, logical names of array dims, and the letters of array suffixes. No jax here.

*axis* is a named axis of the device mesh, *dim* a dimension of an array, *name* the logical name of a dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches

from sharding.errors import InputError

AXES = ("replica", "stage", "data", "fsdp", "expert", "context", "tensor")
"""Mesh axes, outermost (slowest network) first. All of them always exist; size 1 costs nothing."""

NAMES = {
    "batch": "B",  # independent examples
    "length": "L",  # positions of a sequence
    "embed": "D",  # the residual stream
    "mlp": "F",  # hidden features of a feed-forward layer
    "gates": "G",  # the gate and the value of a gated feed-forward layer
    "heads": "H",  # query heads
    "kv_heads": "J",  # key and value heads (grouped-query attention)
    "head_dim": "K",  # features of one head
    "vocab": "V",  # tokens of the vocabulary
    "layers": "N",  # layers stacked in one array
    "expert": "E",  # experts of a mixture
    "routes": "R",  # the same experts, as a router scores them for a token
    "queries": "Q",  # positions that ask, inside attention
    "keys": "M",  # positions that are asked, inside attention
    "slots": "S",  # places for tokens at an expert
    "height": "Y",  # rows of an image
    "width": "X",  # columns of an image
    "channels": "P",  # planes of an image: one of grey, three of colour
    "kernel_height": "R",  # rows of a window over an image
    "kernel_width": "T",  # columns of a window
    "kernel_length": "U",  # positions of a window over a sequence
    "features": "I",  # input features that are not a sequence
    "classes": "C",  # classes of a classifier
}
"""Logical names and the capital letter each has in array suffixes (`x_BLD`). Suffixes speak of names, never of layout."""


PLACES = tuple(f"dim{i}" for i in range(16))
"""What the dims of an array that carries no names are called, by their place. Rules that go by place split them too."""


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """`" (nearest: ...)"` when some known word is close to `word`, else an empty string."""
    close = get_close_matches(word, list(known), n=1)
    return f" (nearest: {close[0]!r})" if close else ""


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes in devices. One of them may be -1: it takes the devices that the others leave.

    `slices` says over how many slow-network islands (TPU slices, GPU hosts without a common NVLink) the mesh extends;
    the outermost axes are then laid across islands, see `sharding.mesh.device_mesh`.
    """

    replica: int = 1
    stage: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    slices: int = 1

    @classmethod
    def of(cls, *pairs: tuple[str, int]) -> MeshShape:
        """A shape from (axis, size) pairs, refusing an unknown or a repeated axis with `InputError`."""
        sizes: dict[str, int] = {}
        for axis, size in pairs:
            if axis not in AXES:
                raise InputError(
                    f"The mesh names an axis {axis!r}, which does not exist{nearest(axis, AXES)}. "
                    f"The axes are {', '.join(AXES)}."
                )
            if axis in sizes:
                raise InputError(
                    f"The mesh names the axis {axis!r} twice, with sizes {sizes[axis]} and {size}. Give it once."
                )
            sizes[axis] = size
        return cls(**sizes)

    def sizes(self) -> dict[str, int]:
        """Axis -> size in devices, outermost first; -1 where the size is still to be filled."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def devices(self) -> int:
        """Devices of the whole mesh, an axis that is still to be filled counting as one."""
        return math.prod(max(n, 1) for n in self.sizes().values())

    def resolve(self, devices: int) -> MeshShape:
        """The shape with -1 filled so that the product of all axes is `devices`; `InputError` when it cannot be."""
        if devices < 1:
            raise InputError(
                f"The mesh {self.describe()} is asked for over {devices} devices. Give it at least one."
            )
        sizes = self.sizes()
        wrong = {a: n for a, n in sizes.items() if n < 1 and n != -1}
        if wrong or self.slices < 1:
            raise InputError(
                f"A mesh axis needs a size of at least 1, or -1 to be filled; got {wrong or {'slices': self.slices}}."
            )
        fill = [a for a, n in sizes.items() if n == -1]
        if len(fill) > 1:
            raise InputError(
                f"Only one mesh axis may be -1 (filled), but {' and '.join(fill)} are. Give all but one a size."
            )
        fixed = math.prod(n for n in sizes.values() if n != -1)
        if not fill and fixed != devices:
            raise InputError(
                f"The mesh {self.describe()} asks for {fixed} devices, but there are {devices}. "
                f"Change one axis so that the product is {devices}, or give one axis -1 to fill it."
            )
        if fill and devices % fixed:
            raise InputError(
                f"The mesh {self.describe()} leaves {devices} devices to be divided by {fixed}, which does not go evenly, so "
                f"{fill[0]} = -1 cannot be filled. Change the other axes so that their product divides {devices}."
            )
        return replace(self, **{fill[0]: devices // fixed}) if fill else self

    def describe(self) -> str:
        """The axes that matter, as `data=2 fsdp=4`; `one device` when every axis is 1."""
        named = [f"{a}={n}" for a, n in self.sizes().items() if n != 1]
        return " ".join(named) or "one device"


assert tuple(f.name for f in fields(MeshShape))[:-1] == AXES, "MeshShape's fields are the axes, in order"
