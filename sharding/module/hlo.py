"""A compiled XLA module as far as its collectives need it: computations, instructions, shapes, and who calls whom.

Read from the module's protobuf (xla/service/hlo.proto and xla/xla_data.proto of openxla/xla), whose field numbers stay
where the text form changes from version to version. Fields that are not named here are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharding.module.wire import last, message, numbers, text

DTYPES = {
    1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64",
    10: "float16", 11: "float32", 12: "float64", 15: "complex64", 16: "bfloat16", 18: "complex128",
    19: "float8_e5m2", 20: "float8_e4m3fn", 21: "int4", 22: "uint4", 23: "float8_e4m3b11fnuz", 24: "float8_e5m2fnuz",
    25: "float8_e4m3fnuz", 28: "float8_e4m3", 29: "float8_e3m4",
}  # fmt: skip
"""xla.PrimitiveType -> the name that jax has for it."""
BYTES = {"bool": 1, "bfloat16": 2, "complex64": 8, "complex128": 16, "int4": 0.5, "uint4": 0.5}
"""Bytes of an element where the name does not end in its bits."""

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """An array's, or a tuple's (`parts`)."""

    dtype: str
    dims: tuple[int, ...]
    parts: tuple[Shape, ...] = ()

    def leaves(self) -> Iterator[Shape]:
        """The arrays in it."""
        if self.parts:
            for part in self.parts:
                yield from part.leaves()
        elif self.dtype:
            yield self

    @property
    def bytes(self) -> int:
        """Of its elements, without padding."""
        if self.parts or not self.dtype:
            return sum(p.bytes for p in self.parts)
        bits = self.dtype.removeprefix("float8").lstrip("abcdefghijklmnopqrstuvwxyz_")
        each = BYTES.get(self.dtype) or (1 if self.dtype.startswith("float8") else int(bits) // 8)
        return math.ceil(math.prod(self.dims) * each)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. `groups`: devices that exchange with each other, by their place in the mesh; () says all of them."""

    id: int
    name: str
    opcode: str
    shape: Shape
    operands: tuple[int, ...]
    calls: tuple[int, ...]
    channel: int
    groups: Groups
    pairs: tuple[tuple[int, int], ...]
    """Of a permutation: from which device to which."""
    parameter: int
    element: int
    """Which element of a tuple `get-tuple-element` takes."""
    number: int | None
    """The value of a constant that is one whole number."""
    direction: str
    """Of a comparison: LT, LE, ..."""
    config: bytes
    """What the backend notes, JSON on CPU and GPU."""
    attributes: Mapping[str, str]
    """What earlier stages have noted (frontend attributes)."""
    op_name: str
    stack: tuple[tuple[str, int, str], ...]
    """(file, line, function) of the code that it comes from, innermost first; () where XLA keeps none."""


@dataclass(frozen=True, slots=True)
class Computation:
    """Instructions by id, in an order in which operands come first."""

    name: str
    instructions: Mapping[int, Instruction]
    root: int


@dataclass(frozen=True, slots=True)
class Module:
    """Computations by id, and the one that is run."""

    name: str
    computations: Mapping[int, Computation]
    entry: int
    partitions: int
    """Devices that run it together: of several TPU slices those of one; 0 where it does not say."""
    schedule: Mapping[int, tuple[int, ...]]
    """Computation -> its instructions in the order in which they are begun; empty before the compiler has laid it down."""


def module_of(compiled: Any) -> Module:
    """The module that XLA made of a `jax.stages.Compiled`."""
    (made,) = compiled.runtime_executable().hlo_modules()
    return read_module(made.as_serialized_hlo_module_proto())


def read_module(serialized: bytes) -> Module:
    """A serialized xla.HloModuleProto."""
    held = message(memoryview(serialized))
    frames = _Frames(message(last(held, 17, memoryview(b""))))
    computations: dict[int, Computation] = {}
    for part in held.get(3, ()):
        fields = message(part)
        made = [_instruction(message(x), frames) for x in fields.get(2, ())]
        computations[last(fields, 5, 0)] = Computation(
            text(fields, 1), {i.id: i for i in made}, last(fields, 6, 0)
        )
    order = (message(x) for x in message(last(held, 7, memoryview(b""))).get(1, ()))
    schedule = {last(x, 1, 0): numbers(message(last(x, 2, memoryview(b""))), 1) for x in order}
    devices = message(last(held, 15, memoryview(b"")))
    partitions = last(devices, 1, 0) * last(devices, 2, 0)
    return Module(text(held, 1), computations, last(held, 6, 0), partitions, schedule)


def _instruction(fields: dict[int, list[Any]], frames: _Frames) -> Instruction:
    meta = message(last(fields, 7, memoryview(b"")))
    own = ((text(meta, 3), last(meta, 4, 0), ""),) if 3 in meta else ()
    pairs = tuple((last(p, 1, 0), last(p, 2, 0)) for p in map(message, fields.get(52, ())))
    return Instruction(
        id=last(fields, 35, 0),
        name=text(fields, 1),
        opcode=text(fields, 2),
        shape=_shape(message(last(fields, 3, memoryview(b"")))),
        operands=numbers(fields, 36),
        calls=numbers(fields, 38),
        channel=last(fields, 26, 0),
        groups=_groups(fields),
        pairs=pairs,
        parameter=last(fields, 9, 0),
        element=last(fields, 13, 0),
        number=_whole_number(fields),
        direction=text(fields, 63),
        config=bytes(last(fields, 43, memoryview(b""))),
        attributes=_attributes(fields),
        op_name=text(meta, 2),
        stack=frames.stack(last(meta, 15, 0)) or own,
    )


def _shape(fields: dict[int, list[Any]]) -> Shape:
    parts = tuple(_shape(message(p)) for p in fields.get(4, ()))
    return Shape(DTYPES.get(last(fields, 2, 0), ""), numbers(fields, 3), parts)


def _whole_number(fields: dict[int, list[Any]]) -> int | None:
    """The value of a scalar constant of whole numbers."""
    if 8 not in fields:
        return None
    literal = message(last(fields, 8, memoryview(b"")))
    found = [n for at in (4, 5, 6, 7) for n in numbers(literal, at)]
    return found[0] if len(found) == 1 else None


def _attributes(fields: dict[int, list[Any]]) -> dict[str, str]:
    held = message(last(fields, 68, memoryview(b"")))
    return {text(x, 1): text(x, 2) for x in map(message, held.get(1, ()))}


# Replica groups have been written in four ways.


def _groups(fields: dict[int, list[Any]]) -> Groups:
    if 49 in fields:
        return _listed(fields[49])
    if 87 in fields:
        listed = message(last(fields, 87, memoryview(b"")))
        return _iota(message(listed[2][-1])) if 2 in listed else _listed(listed.get(1, []))
    if 92 in fields:
        return _iota(message(fields[92][-1]))
    return _of_axes(message(fields[93][-1])) if 93 in fields else ()


def _listed(groups: list[Any]) -> Groups:
    return tuple(numbers(message(g), 1) for g in groups)


def _iota(fields: dict[int, list[Any]]) -> Groups:
    """All devices counted in order, reshaped, transposed, and cut into groups of one size."""
    count, size, dims = last(fields, 1, 0), last(fields, 2, 0), numbers(fields, 3)
    order = numbers(fields, 4) or tuple(range(len(dims)))
    found = np.arange(count * size).reshape(dims or (count * size,))
    return _rows(found.transpose(order) if dims else found, count, size)


def _of_axes(fields: dict[int, list[Any]]) -> Groups:
    """Axes, or parts of axes, of a mesh that the module itself carries."""
    mesh = message(last(fields, 1, memoryview(b"")))
    sizes = [last(message(a), 2, 0) for a in mesh.get(1, ())]
    ids = np.array(numbers(mesh, 2) or range(math.prod(sizes)))
    if 3 in mesh:  # the devices in another order: counted, reshaped and transposed
        turned = message(mesh[3][-1])
        ids = ids.reshape(numbers(turned, 1)).transpose(numbers(turned, 2)).ravel()
    cuts: dict[int, list[tuple[int, int]]] = {}
    for ref in map(message, fields.get(2, ())):
        at = last(ref, 1, 0)
        part = message(last(ref, 2, memoryview(b"")))
        cuts.setdefault(at, []).append((last(part, 1, 1), last(part, 2, sizes[at])))
    dims: list[int] = []
    grouped: list[int] = []
    for at, size in enumerate(sizes):
        before = 1
        for ahead, part in sorted(cuts.get(at, [])):
            if ahead > before:
                dims.append(ahead // before)
            grouped.append(len(dims))
            dims.append(part)
            before = ahead * part
        dims.append(size // before)
    alone = [d for d in range(len(dims)) if d not in grouped]
    size = math.prod(dims[d] for d in grouped)
    return _rows(ids.reshape(dims).transpose(*alone, *grouped), ids.size // size, size)


def _rows(found: np.ndarray, count: int, size: int) -> Groups:
    return tuple(tuple(int(i) for i in row) for row in found.reshape(count, size))


# Where an instruction comes from: newer modules hold each file and line once and number the call stacks.


class _Frames:
    """xla.StackFrameIndexProto: files, functions, places, and frames that name a place and their caller."""

    def __init__(self, fields: dict[int, list[Any]]):
        self._files, self._functions = (
            [bytes(x).decode(errors="replace") for x in fields.get(n, ())] for n in (1, 2)
        )
        self._places = [message(x) for x in fields.get(3, ())]
        self._frames = [message(x) for x in fields.get(4, ())]
        self._known: dict[int, tuple[tuple[str, int, str], ...]] = {0: ()}

    def stack(self, frame: int) -> tuple[tuple[str, int, str], ...]:
        """(file, line, function) of a frame and its callers; frames, like all here, count from 1, and 0 is none."""
        if frame not in self._known:
            held = self._frames[frame - 1]
            place = self._places[last(held, 1, 1) - 1]
            file, function = last(place, 1, 1) - 1, last(place, 2, 1) - 1
            mine = (self._files[file], last(place, 3, 0), self._functions[function])
            self._known[frame] = (mine, *self.stack(last(held, 2, 0)))
        return self._known[frame]


__all__ = ["Computation", "Groups", "Instruction", "Module", "Shape", "module_of", "read_module"]
