"""Values that the command line writes as an expression: rules and the partitioner. Parsed, never evaluated."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import sharding.rules
from experiments.config_file import call, execute
from sharding.axes import nearest
from sharding.errors import InputError
from sharding.partitioner import Partitioner
from sharding.rule import Rules


def show_partitioner(value: Any) -> str:
    """The expression that `parse_partitioner` reads back."""
    options = [f"{f.name}={getattr(value, f.name)!r}" for f in dataclasses.fields(value)]
    options = [] if value == type(value)() else options
    return type(value).__name__.lower() + (f"({', '.join(options)})" if options else "")


def parse_rules(text: str, base: Path | None = None) -> Rules:
    """Rules from an expression over the files of sharding/rules/, `data | fsdp(axis='data')`, or from a FILE.py.

    The expression is parsed, never evaluated: names, `|`, and calls with literal arguments. A FILE.py (looked up from
    the folder `base`) has `def rules() -> Rules`. `InputError` names the word that is wrong and what there is.
    """
    if text.strip() == repr(Rules()):  # the expression of an empty chain
        return Rules()
    if text.strip().endswith(".py"):
        path = (base or Path()) / text.strip()
        value = call(execute(path), "rules", path, example="def rules() -> Rules")
        if not isinstance(value, Rules):
            raise InputError(
                f"rules() in {path} returns a {type(value).__name__}, but it must return Rules, as data() does."
            )
        return value
    chain = Rules()
    for name, args, keywords in _calls(text, "--rules"):
        known = sorted(m.name for m in pkgutil.iter_modules(sharding.rules.__path__))
        if name not in known:
            raise InputError(
                f"--rules {text!r} names a rule {name!r}, but there is no sharding/rules/{name}.py"
                f"{nearest(name, known)}. The rules are {', '.join(known)}."
            )
        chain |= _make(getattr(importlib.import_module(f"sharding.rules.{name}"), name), name, args, keywords)
    return chain


def parse_partitioner(text: str) -> Any:
    """`manual`, `auto`, or one with options: `manual(gathered='keep')`."""
    kinds = {kind.__name__.lower(): kind for kind in get_args(Partitioner)}
    calls = _calls(text, "--partitioner")
    name, args, keywords = calls[0]
    if len(calls) != 1 or name not in kinds:
        raise InputError(
            f"--partitioner is {text!r}{nearest(name, list(kinds))}, but it is one of {', '.join(kinds)}."
        )
    return _make(kinds[name], name, args, keywords)


def _calls(text: str, flag: str) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """`a | b(1, c=2)` -> [("a", [], {}), ("b", [1], {"c": 2})], from the syntax alone."""

    def literal(node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise ValueError(ast.unparse(node)) from None

    def walk(node: ast.expr) -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
        match node:
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                yield from walk(left)
                yield from walk(right)
            case ast.Name(id=name):
                yield name, [], {}
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(
                k.arg for k in keywords
            ):
                yield name, [literal(a) for a in args], {str(k.arg): literal(k.value) for k in keywords}
            case _:
                raise ValueError(ast.unparse(node))

    try:
        return list(walk(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ValueError) as error:
        where = text if isinstance(error, SyntaxError) else str(error)
        raise InputError(
            f"{flag} {text!r} cannot be read at `{where}`. It takes names joined by |, each with literal "
            f"arguments if any, such as \"data | fsdp(axis='data')\"."
        ) from error


def _make(factory: Callable[..., Any], name: str, args: list[Any], keywords: dict[str, Any]) -> Any:
    try:
        inspect.signature(factory).bind(*args, **keywords)
    except TypeError as error:
        raise InputError(
            f"{name} takes {inspect.signature(factory)}: {error}. Change its arguments."
        ) from error
    return factory(*args, **keywords)
