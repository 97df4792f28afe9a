"""The wire format of protocol buffers, read without descriptors: enough for messages whose field numbers are known.

protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Field = int | memoryview


def message(data: memoryview) -> dict[int, list[Any]]:
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


def numbers(fields: dict[int, list[Any]], number: int) -> tuple[int, ...]:
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


def last(fields: dict[int, list[Any]], number: int, otherwise: Any) -> Any:
    """A single value; protobuf's rule for one that is written several times is the last."""
    return fields[number][-1] if number in fields else otherwise


def text(fields: dict[int, list[Any]], number: int) -> str:
    """A single text, "" without one."""
    return bytes(last(fields, number, b"")).decode(errors="replace")


__all__ = ["last", "message", "numbers", "text"]
