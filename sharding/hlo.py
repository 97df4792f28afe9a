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
Field = int | memoryview


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


def module_of(compiled: Any) -> Module:
    """The module that XLA made of a `jax.stages.Compiled`."""
    (made,) = compiled.runtime_executable().hlo_modules()
    return read_module(made.as_serialized_hlo_module_proto())


def read_module(serialized: bytes) -> Module:
    """A serialized xla.HloModuleProto."""
    held = _message(memoryview(serialized))
    frames = _Frames(_message(_last(held, 17, memoryview(b""))))
    computations: dict[int, Computation] = {}
    for part in held.get(3, ()):
        fields = _message(part)
        made = [_instruction(_message(x), frames) for x in fields.get(2, ())]
        computations[_last(fields, 5, 0)] = Computation(
            _text(fields, 1), {i.id: i for i in made}, _last(fields, 6, 0)
        )
    return Module(_text(held, 1), computations, _last(held, 6, 0))


def _instruction(fields: dict[int, list[Any]], frames: _Frames) -> Instruction:
    meta = _message(_last(fields, 7, memoryview(b"")))
    own = ((_text(meta, 3), _last(meta, 4, 0), ""),) if 3 in meta else ()
    pairs = tuple((_last(p, 1, 0), _last(p, 2, 0)) for p in map(_message, fields.get(52, ())))
    return Instruction(
        id=_last(fields, 35, 0),
        name=_text(fields, 1),
        opcode=_text(fields, 2),
        shape=_shape(_message(_last(fields, 3, memoryview(b"")))),
        operands=_numbers(fields, 36),
        calls=_numbers(fields, 38),
        channel=_last(fields, 26, 0),
        groups=_groups(fields),
        pairs=pairs,
        parameter=_last(fields, 9, 0),
        element=_last(fields, 13, 0),
        number=_whole_number(fields),
        direction=_text(fields, 63),
        config=bytes(_last(fields, 43, memoryview(b""))),
        op_name=_text(meta, 2),
        stack=frames.stack(_last(meta, 15, 0)) or own,
    )


def _shape(fields: dict[int, list[Any]]) -> Shape:
    parts = tuple(_shape(_message(p)) for p in fields.get(4, ()))
    return Shape(DTYPES.get(_last(fields, 2, 0), ""), _numbers(fields, 3), parts)


def _whole_number(fields: dict[int, list[Any]]) -> int | None:
    """The value of a scalar constant of whole numbers."""
    if 8 not in fields:
        return None
    literal = _message(_last(fields, 8, memoryview(b"")))
    found = [n for at in (4, 5, 6, 7) for n in _numbers(literal, at)]
    return found[0] if len(found) == 1 else None


# Replica groups have been written in four ways.


def _groups(fields: dict[int, list[Any]]) -> Groups:
    if 49 in fields:
        return _listed(fields[49])
    if 87 in fields:
        listed = _message(_last(fields, 87, memoryview(b"")))
        return _iota(_message(listed[2][-1])) if 2 in listed else _listed(listed.get(1, []))
    if 92 in fields:
        return _iota(_message(fields[92][-1]))
    return _of_axes(_message(fields[93][-1])) if 93 in fields else ()


def _listed(groups: list[Any]) -> Groups:
    return tuple(_numbers(_message(g), 1) for g in groups)


def _iota(fields: dict[int, list[Any]]) -> Groups:
    """All devices counted in order, reshaped, transposed, and cut into groups of one size."""
    count, size, dims = _last(fields, 1, 0), _last(fields, 2, 0), _numbers(fields, 3)
    order = _numbers(fields, 4) or tuple(range(len(dims)))
    found = np.arange(count * size).reshape(dims or (count * size,))
    return _rows(found.transpose(order) if dims else found, count, size)


def _of_axes(fields: dict[int, list[Any]]) -> Groups:
    """Axes, or parts of axes, of a mesh that the module itself carries."""
    mesh = _message(_last(fields, 1, memoryview(b"")))
    sizes = [_last(_message(a), 2, 0) for a in mesh.get(1, ())]
    ids = np.array(_numbers(mesh, 2) or range(math.prod(sizes)))
    cuts: dict[int, list[tuple[int, int]]] = {}
    for ref in map(_message, fields.get(2, ())):
        at = _last(ref, 1, 0)
        part = _message(_last(ref, 2, memoryview(b"")))
        cuts.setdefault(at, []).append((_last(part, 1, 1), _last(part, 2, sizes[at])))
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
        self._places = [_message(x) for x in fields.get(3, ())]
        self._frames = [_message(x) for x in fields.get(4, ())]
        self._known: dict[int, tuple[tuple[str, int, str], ...]] = {0: ()}

    def stack(self, frame: int) -> tuple[tuple[str, int, str], ...]:
        """(file, line, function) of a frame and its callers; frames, like all here, count from 1, and 0 is none."""
        if frame not in self._known:
            held = self._frames[frame - 1]
            place = self._places[_last(held, 1, 1) - 1]
            file, function = _last(place, 1, 1) - 1, _last(place, 2, 1) - 1
            mine = (self._files[file], _last(place, 3, 0), self._functions[function])
            self._known[frame] = (mine, *self.stack(_last(held, 2, 0)))
        return self._known[frame]


# The wire format of protocol buffers.


def _message(data: memoryview) -> dict[int, list[Any]]:
    """Field number -> its values in order: whole numbers, or the bytes of texts, messages and packed numbers."""
    found: dict[int, list[Any]] = {}
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        value: Field
        if kind == 0:
            value, at = _varint(data, at)
            value = value - (1 << 64) if value >> 63 else value
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            size = 8 if kind == 1 else 4
            value, at = data[at : at + size], at + size
        found.setdefault(tag >> 3, []).append(value)
    return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _numbers(fields: dict[int, list[Any]], number: int) -> tuple[int, ...]:
    """A repeated whole number, packed or not."""
    return tuple(n for value in fields.get(number, ()) for n in _unpacked(value))


def _unpacked(value: Field) -> Iterator[int]:
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        n, at = _varint(value, at)
        yield n - (1 << 64) if n >> 63 else n


def _last(fields: dict[int, list[Any]], number: int, otherwise: Any) -> Any:
    """A single value; protobuf's rule for one that is written several times is the last."""
    return fields[number][-1] if number in fields else otherwise


def _text(fields: dict[int, list[Any]], number: int) -> str:
    return bytes(_last(fields, number, b"")).decode(errors="replace")


__all__ = ["Computation", "Groups", "Instruction", "Module", "Shape", "module_of", "read_module"]
