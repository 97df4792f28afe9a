"""A pipeline schedule by its name, its file or an expression: `1f1b`, `interleaved(microbatches=16, chunks=4)`,
`my.py`. No jax.

A schedule's file holds one frozen dataclass with `microbatches` and `grid(stages)`. Those of sharding/schedules are
known by the file's name, the class's name and its NAME. Expressions are parsed, never evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import sharding.schedules
from experiments.config_file import execute, told
from sharding.axes import nearest
from sharding.errors import InputError
from sharding.pipeline.grid import Grid, Schedule

T = TypeVar("T")

EXPRESSION = re.compile(r"(?P<name>[^()]+?)\s*(?:\((?P<arguments>.*)\))?", re.DOTALL)
NONE = ("", "none", "None")


def known() -> dict[str, type[Schedule]]:
    """Short name -> class of every schedule of the house, in the order of names."""
    found = {}
    for module in pkgutil.iter_modules(sharding.schedules.__path__):
        made = importlib.import_module(f"sharding.schedules.{module.name}")
        kind = class_of(made, Path(str(made.__file__)))
        found[short(kind)] = kind
    return dict(sorted(found.items()))


def short(kind: type) -> str:
    """The short name of a schedule: its NAME, else its class's name."""
    return str(getattr(kind, "NAME", kind.__name__))


def parse_schedule(text: str, base: Path | None = None) -> Schedule | None:
    """The schedule that an expression means; None for "" and "none".

    A name alone stands for the schedule with its own defaults. A FILE.py is looked up from the folder `base`.
    InputError names the word that is wrong and what there is.
    """
    if text.strip() in NONE:
        return None
    match = EXPRESSION.fullmatch(text.strip())
    if match is None:
        raise _unreadable(text, text)
    kind = find(match["name"], base)
    given, keywords = _arguments(text, match["arguments"] or "")
    try:
        inspect.signature(kind).bind(*given, **keywords)
    except TypeError as error:
        raise InputError(
            f"{text!r} cannot be a schedule: {kind.__name__} takes {takes(kind)}, but {error}. Change its arguments."
        ) from error
    return _of_a_user(kind, lambda: kind(*given, **keywords))


def show_schedule(value: Any) -> str:
    """The expression that `parse_schedule` reads back; a class that is not of sharding/schedules is told by its file."""
    if value is None:
        return "none"
    module = type(value).__module__
    own = module.startswith(f"{sharding.schedules.__name__}.")
    name = type(value).__name__ if own else getattr(sys.modules.get(module), "__file__", None) or module
    return written(value, name)


def written(value: Any, name: str = "") -> str:
    """`OneFOneB(microbatches=8)`: as a config has it, after its import."""
    given = ", ".join(f"{f.name}={getattr(value, f.name)!r}" for f in dataclasses.fields(value) if f.init)
    return f"{name or type(value).__name__}({given})"


def find(name: str, base: Path | None = None) -> type[Schedule]:
    """The class that a name or a FILE.py means. InputError with the nearest name and all names where there is none."""
    if name.endswith(".py"):
        path = (base or Path()) / name
        if not path.is_file():
            raise InputError(
                f"There is no schedule file {path}. Give the path of a Python file with one frozen dataclass that has "
                f"microbatches and grid(stages), or one of {', '.join(known())}."
            )
        return class_of(execute(path), path)
    there = known()
    words = {word: kind for short, kind in there.items() for word in (short, *_other_names(kind))}
    if name not in words:
        raise InputError(
            f"There is no schedule {name!r}{nearest(name, list(words))}. The schedules are {', '.join(there)}; one of your "
            f"own is the path of its file, such as ./my_schedule.py."
        )
    return words[name]


def _other_names(kind: type) -> tuple[str, str]:
    """The class's name and its file's."""
    return kind.__name__, kind.__module__.rpartition(".")[2]


def class_of(module: ModuleType, path: Path) -> type[Schedule]:
    """The one schedule that a module defines. InputError where it has none, several, or one that cannot be a config's
    value.
    """
    own = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__
    ]
    found = [kind for kind in own if callable(getattr(kind, "grid", None))]
    if len(found) != 1:
        there = " and ".join(kind.__name__ for kind in found) if found else "none"
        raise InputError(
            f"{path} is to have one schedule, a frozen dataclass with microbatches and grid(stages), but has {there}. "
            f"Give each schedule a file of its own."
        )
    kind = found[0]
    parameters = getattr(kind, "__dataclass_params__", None)
    if "__dataclass_params__" not in vars(kind) or parameters is None or not parameters.frozen:
        raise InputError(
            f"{kind.__name__} in {path} is no frozen dataclass, so it cannot be a config's value. Write "
            f"@dataclass(frozen=True) above the class."
        )
    if "microbatches" not in {f.name for f in dataclasses.fields(kind)}:
        raise InputError(
            f"{kind.__name__} in {path} has no field microbatches, which says how many micro-batches a step has. Write "
            f"`microbatches: int = 8` in it."
        )
    return kind


def takes(kind: type) -> str:
    """`microbatches=8, chunks=2`: the fields of a schedule with their defaults."""
    shown = []
    for f in dataclasses.fields(kind):
        default = f.default_factory() if callable(f.default_factory) else f.default
        shown.append(f.name if default is dataclasses.MISSING else f"{f.name}={default!r}")
    return ", ".join(shown)


def changed(schedule: Schedule, values: Mapping[str, Any]) -> Schedule:
    """The schedule with other values of its fields; None leaves one as it is. InputError where it has no such field."""
    given = {name: value for name, value in values.items() if value is not None}
    own = [f.name for f in dataclasses.fields(schedule)]  # pyright: ignore[reportArgumentType]
    for name in given:
        if name not in own:
            raise InputError(
                f"{type(schedule).__name__} has no {name}, so it cannot be {given[name]}. It has {', '.join(own)}; leave "
                f"{name} out."
            )
    return _of_a_user(type(schedule), lambda: dataclasses.replace(schedule, **given))  # pyright: ignore[reportArgumentType]


def grid_of(schedule: Schedule, stages: int) -> Grid:
    """Its grid; whatever a user's own `grid` raises is told as InputError with its file and line."""
    grid = _of_a_user(type(schedule), lambda: schedule.grid(stages))
    if not isinstance(grid, Grid):
        raise InputError(
            f"grid({stages}) of {written(schedule)} returns a {type(grid).__name__}, but it is to return a "
            f"sharding.pipeline.grid.Grid, as sharding.pipeline.grid.placed makes it."
        )
    if grid.microbatches != schedule.microbatches:
        raise InputError(
            f"grid({stages}) of {written(schedule)} has {grid.microbatches} micro-batches, but the schedule says "
            f"microbatches={schedule.microbatches}, by which the batch is divided. Make them the same."
        )
    return grid


def _of_a_user(kind: type, make: Callable[[], T]) -> T:
    """What `make` returns. Whatever a user's code raises is told with its file and line, an InputError as it is."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or kind.__module__
    with told(Path(file)):
        try:
            return make()
        except InputError as error:
            refused = error
    raise refused


def _arguments(text: str, arguments: str) -> tuple[list[Any], dict[str, Any]]:
    """`16, chunks=2` -> ([16], {"chunks": 2}), from the syntax alone."""
    try:
        parsed = ast.parse(f"f({arguments}\n)", mode="eval").body
    except SyntaxError:
        raise _unreadable(text, arguments) from None
    if not isinstance(parsed, ast.Call) or not isinstance(parsed.func, ast.Name):  # "a)(b"
        raise _unreadable(text, arguments)
    given: list[Any] = []
    keywords: dict[str, Any] = {}
    for name, node in [("", node) for node in parsed.args] + [(k.arg, k.value) for k in parsed.keywords]:
        try:
            value = ast.literal_eval(node)
        except ValueError:
            raise _unreadable(text, ast.unparse(node)) from None
        if name is None or name in keywords:  # **{...}, or twice
            raise _unreadable(text, f"{name}={ast.unparse(node)}" if name else f"**{ast.unparse(node)}")
        elif name:
            keywords[name] = value
        else:
            given.append(value)
    return given, keywords


def _unreadable(text: str, where: str) -> InputError:
    return InputError(
        f"The schedule {text!r} cannot be read at `{where}`. It is a name or a FILE.py, with literal arguments if any, such "
        f"as interleaved(microbatches=16, chunks=2)."
    )
