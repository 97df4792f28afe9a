"""Whether a config value holds what its annotations say, and annotations in words. No jax and no tyro here.

Dataclasses check nothing by themselves: `loop="foo"` in a field that is a `Literal` trains, `embed=64.0` fails late.
The command line's overrides are typed as they are read; what a config file gives is checked here, once it is loaded.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from sharding.axes import nearest
from sharding.errors import InputError
from sharding.rule import Rules

SHOWN = 60
"""Characters of a wrong value that an error shows; of a longer one it names the type."""


@dataclass(frozen=True)
class Fault:
    """A value that is not of its annotation; `where` is its path, such as `points[2].mesh.data`."""

    where: str
    value: Any
    annotation: Any


def check_types(value: Any, source: str) -> None:
    """Raise `InputError` at the first field, however deep in the dataclass `value`, that is not of its annotation.

    An int may stand for a float, a bool for no number. Looked into: dataclasses, unions, `Literal`, tuples, lists, sets
    and mappings. Left alone: functions, rules, `Any`, and a protocol that cannot be asked; of a value behind a protocol
    the fields are checked by its own class. `source` says where the value comes from. A value that holds itself is
    refused, whatever its annotation.
    """
    if ring := _ring(value, "", {}, set()):
        raise InputError(
            f"{source} gives a {ring[0]} that is the {ring[1]} which holds it, so it has no end: it could neither be "
            f"recorded nor compared. Give {ring[0]} another value."
        )
    fault = _first(value, type(value), "")
    if fault is None:
        return
    options = [o for o in _options(fault.annotation) if isinstance(o, str)]
    near = nearest(fault.value, options) if isinstance(fault.value, str) else ""
    raise InputError(
        f"{source} gives {fault.where} = {_shown(fault.value)}, but it takes {words(fault.annotation)}{near}. "
        f"{python_number(fault.value, fault.annotation) or f'Change {fault.where}.'}"
    )


def python_number(value: object, annotation: Any) -> str:
    """What to write where a value is a number of an array library (numpy's, jax's) and Python's own would do; else "".

    Not converted: a config is frozen, and what it was given is what it compares and is hashed by.
    """
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return ""
    number: Any = value.item()  # pyright: ignore[reportAttributeAccessIssue]
    if _first(number, annotation, "") is not None:
        return ""
    kind = type(value)
    return (
        f"It is a {kind.__module__.partition('.')[0]} {kind.__name__}, and a config holds Python's own numbers: write "
        f"{type(number).__name__}(...) around it, or {number!r}."
    )


def words(annotation: Any, place: Literal["file", "flag"] = "file") -> str:
    """A type in words, for an error: as a Python file writes its values, or as a flag of the command line does."""
    annotation, in_file = _bare(annotation), place == "file"
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "True or False" if in_file else "no value",
        Path: "a Path" if in_file else "a path",
        NoneType: "None",
    }
    origin, args = get_origin(annotation), [a for a in get_args(annotation) if a is not ...]
    if origin is Literal:
        return f"one of {', '.join(map(repr if in_file else str, args))}"
    if annotation in names:
        return names[annotation]
    if args and (in_file and origin not in (Union, UnionType)):
        return f"a {getattr(origin, '__name__', origin)} of {', '.join(words(a) for a in args)}"
    if args:
        joint = " or " if origin not in (tuple, list) else ", "
        return joint.join(words(a, place) for a in args)
    return getattr(annotation, "__name__", str(annotation))


def _bare(annotation: Any) -> Any:
    """The annotation without what only names or wraps it: an alias (`type X = ...`), a `NewType`, `Final`."""
    if annotation is None:
        return NoneType
    for inner in ("__value__", "__supertype__"):
        if hasattr(annotation, inner):
            return _bare(getattr(annotation, inner))
    return _bare(get_args(annotation)[0]) if get_origin(annotation) is typing.Final else annotation


def _ring(value: Any, where: str, above: dict[int, str], known: set[int]) -> tuple[str, str] | None:
    """(path, path of the same value above it) of the first value that holds itself. `above`: id -> path of what holds
    `value`; `known`: ids of what has been looked through.
    """
    if id(value) in above:
        return where, above[id(value)] or "whole"
    if id(value) in known or isinstance(value, (Rules, type, str, bytes)):
        return None
    if is_dataclass(value):
        held = [(f".{f.name}", getattr(value, f.name)) for f in fields(value) if hasattr(value, f.name)]
    elif isinstance(value, Mapping):
        held = [(f"[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        held = [(f"[{i}]", item) for i, item in enumerate(value)]
    else:
        return None
    within = {**above, id(value): where}
    rings = (_ring(item, f"{where}{at}".lstrip("."), within, known) for at, item in held)
    found = next((ring for ring in rings if ring), None)
    known.add(id(value))
    return found


def _options(annotation: Any) -> Iterator[Any]:
    """What the `Literal`s of an annotation allow."""
    annotation = _bare(annotation)
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _options(one)


def _first(value: Any, annotation: Any, where: str) -> Fault | None:
    """The first fault of a value and of what is in it."""
    annotation = _bare(annotation)
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any or Callable in (annotation, origin):
        return None
    if origin in (Union, UnionType):
        faults = [_first(value, a, where) for a in args]
        # One that is of a member but for a field of it: that field is what is wrong.
        within = [f for f in faults if f is not None and f.where != where]
        return None if None in faults else (within or [Fault(where, value, annotation)])[0]
    if not _is(value, annotation, origin, args):
        return Fault(where, value, annotation)
    parts = _parts(value, annotation, args, where)
    return next((fault for part in parts if (fault := _first(*part)) is not None), None)


def _is(value: Any, annotation: Any, origin: Any, args: tuple[Any, ...]) -> bool:
    """Whether a value is of a type, without a look at what is in it."""
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if annotation in (int, float):
        numbers = (int,) if annotation is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    kind = origin or annotation
    if kind is tuple and args and args[-1] is not ... and isinstance(value, tuple):
        return len(value) == len(args)
    if kind is Sequence and isinstance(value, (str, bytes)):
        return False  # a text is a sequence of texts, which nobody means
    try:
        return isinstance(value, kind)
    except TypeError:  # no class, or a protocol that does not say what its instances have
        return True


def _parts(value: Any, annotation: Any, args: tuple[Any, ...], where: str) -> Iterable[tuple[Any, Any, str]]:
    """(value, annotation, path) of each thing in a value."""
    if isinstance(value, (Rules, type)):
        return
    if is_dataclass(value):
        hints = _hints(type(value), where)
        for field in fields(value):
            if hasattr(value, field.name):
                yield getattr(value, field.name), hints[field.name], f"{where}.{field.name}".lstrip(".")
    elif isinstance(value, Mapping) and len(args) == 2:
        for key, item in value.items():
            yield key, args[0], f"a key of {where}"
            yield item, args[1], f"{where}[{key!r}]"
    elif isinstance(value, tuple) and len(args) == len(value) and args[-1:] != (...,):
        yield from ((v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    elif isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes)) and args:
        yield from ((v, args[0], f"{where}[{i}]") for i, v in enumerate(value))


def _hints(kind: type, where: str) -> dict[str, Any]:
    """The annotations of a dataclass, resolved; `InputError` for one that names what the running program has not."""
    try:
        return typing.get_type_hints(kind)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise InputError(
            f"The annotations of {kind.__name__}{f', of which {where} is one,' if where else ''} cannot be read: {error}. "
            f"Import what they name at the top of its file, not only for the type checker."
        ) from error


def _shown(value: Any) -> str:
    """A wrong value as its file would write it, or its type where that is long."""
    text = repr(value)
    return text if len(text) <= SHOWN and "\n" not in text else f"a value of type {type(value).__name__}"
