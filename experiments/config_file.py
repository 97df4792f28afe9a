"""Run a Python file for the value that one of its functions returns, and say in one paragraph what went wrong.

The file may lie anywhere. What lies beside it can be imported by it: helpers come last on the path, after shardlab and
everything installed, so that they can never take the place of those.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import linecache
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from sharding.axes import nearest
from sharding.errors import InputError

LOADED = "config_file_"
"""How the module names of executed files begin."""

OWN = Path(__file__).resolve().parents[1]
"""The folder of shardlab's packages; what they are called is never taken from beside a config."""

_folders: list[str] = []
"""Folders of the files executed so far that were not on sys.path; they stand at its end, newest first."""


def execute(path: Path) -> ModuleType:
    """Run the file and return it as a module, registered in `sys.modules`. `InputError` says file, line and reason."""
    if not path.is_file():
        raise InputError(_missing(path))
    if path.suffix != ".py":
        raise InputError(
            f"{path} is no Python file: a config is a .py file with `def config() -> Experiment`."
        )
    file = path.resolve()
    name = f"{LOADED}{file.stem}_{hashlib.sha256(os.fsencode(file)).hexdigest()[:12]}"
    module = ModuleType(name)
    module.__file__, module.__package__ = str(file), ""
    with told(path):
        # Its bytes, not its text: Python knows the encoding of a source, and says in a SyntaxError what is none.
        code = compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
        _make_importable(file)
        linecache.checkcache(str(file))
        sys.modules[name] = module  # dataclasses and tyro look up annotations there
        # Not the import system: its bytecode cache takes a file edited within the same second for unchanged.
        exec(code, module.__dict__)
    return module


def call(module: ModuleType, function: str, path: Path, example: str) -> Any:
    """What `function()` of an executed file returns; `example` is shown when the file has no such function."""
    made = getattr(module, function, None)
    if not callable(made):
        near = get_close_matches(function, [k for k, v in vars(module).items() if callable(v)], n=1)
        hint = f" (it has {near[0]}())" if near else ""
        raise InputError(f"{path} has no {function}(){hint}. Write `{example}` in it.")
    with told(path, module):
        return made()


@contextlib.contextmanager
def told(path: Path, module: ModuleType | None = None) -> Iterator[None]:
    """Turn any exception within into an `InputError` of one paragraph: file, line, its text, the reason."""
    try:
        yield
    except RecursionError as error:
        raise InputError(f"{path} calls itself without end. Does it load itself?") from error
    except SyntaxError as error:
        line = f", line {error.lineno}: `{(error.text or '').strip()}`" if error.lineno else ""
        place = path if error.filename == str(path.resolve()) else error.filename or path
        raise InputError(f"{place}{line} is not Python: {error.msg}.") from error
    except Exception as error:  # the file is its author's code: it may raise anything
        place = _place(error, path)
        if isinstance(error, InputError):
            raise InputError(f"{place}: {error}") from error
        reason = f"{type(error).__name__}: {error}".rstrip(". ")
        raise InputError(
            f"{place} fails with {reason}.{_keyword(error, module)}{_relative(error)}"
        ) from error


def beside(path: Path) -> dict[str, Path]:
    """Dotted name -> file or package folder of everything beside `path` that it imports, directly or through one another.

    Read from the source, so that imports inside functions count although they have not run. Of a folder without
    `__init__.py` only what is imported counts, each file under its own name.
    """
    folder, found, queue = path.resolve().parent, {}, [path.resolve()]
    while queue:
        file = queue.pop()
        for imported in _imported(
            ast.parse(file.read_bytes(), str(file)), file.parent.relative_to(folder).parts
        ):
            name, target = _lies(folder, imported)
            if target is None or name in found or _is_own(folder, imported):
                continue
            found[name] = target
            queue += sorted(target.rglob("*.py")) if target.is_dir() else [target]
    return found


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let what is executed within import nothing from beside the files executed before it, as in a process of its own."""
    path, folders = list(sys.path), list(_folders)
    hidden = _forget(folders)
    sys.path[:] = [p for p in path if p not in folders]
    _folders.clear()
    try:
        yield
    finally:
        _forget(_folders)
        sys.modules.update(hidden)
        sys.path[:], _folders[:] = path, folders


def _imported(tree: ast.Module, package: tuple[str, ...]) -> list[str]:
    """Dotted names that the source of a file in `package` imports; `from a import b`: a.b, be b a module or not."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level <= len(package):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            whole = [*above, *([node.module] if node.module else [])]
            names += [".".join([*whole, alias.name]) for alias in node.names]
    return names


def _lies(folder: Path, imported: str) -> tuple[str, Path | None]:
    """The file or the package folder below `folder` that holds what is imported, and its own name; None: no such."""
    name, place = "", folder
    for part in imported.split("."):
        name, place = f"{name}.{part}".lstrip("."), place / part
        if (place / "__init__.py").is_file():
            return name, place
        if (file := place.with_name(f"{part}.py")).is_file():
            return name, file
    return name, None


def _is_own(folder: Path, imported: str) -> bool:
    """Whether an import means shardlab's package of that name: it does, unless only what lies in `folder` has such a thing."""
    package = OWN / imported.partition(".")[0] / "__init__.py"
    return package.is_file() and (_serves(OWN, imported) or not _serves(folder, imported))


def _serves(folder: Path, imported: str) -> bool:
    """Whether a module below `folder` is what is imported, or its source has the word that is imported of it."""
    place, source = folder, b""
    for name in imported.split("."):
        files = place / name / "__init__.py", place / f"{name}.py"
        file = next((f for f in files if f.is_file()), None)
        if file is None and not (place / name).is_dir():
            return bool(source and (name == "*" or re.search(rb"\b%s\b" % name.encode(), source)))
        place, source = place / name, file.read_bytes() if file else b""
    return True


def _forget(folders: list[str], tops: Collection[str] | None = None) -> dict[str, ModuleType]:
    """Take what was imported from the folders out of `sys.modules`; `tops`: of it, what has these first parts of names."""

    def lies(name: str) -> bool:
        known = getattr(sys.modules[name], "__dict__", {})
        places = {os.path.splitext(p)[0] for p in (*known.get("__path__", ()), known.get("__file__") or "")}
        return any(os.path.join(folder, *name.split(".")) in places for folder in folders)

    names = {n: n.partition(".")[0] for n in list(sys.modules)}
    gone = {top for n, top in names.items() if (tops is None or top in tops) and lies(n)}
    return {n: sys.modules.pop(n) for n, top in names.items() if top in gone}


def _make_importable(file: Path) -> None:
    """Let the file import what lies beside it, for the rest of the process (a `build()` may import late)."""
    folder = str(file.parent)
    helpers = beside(file)
    # Two configs in one process may each have a helper of the same name: this one's is the one to import.
    _forget([f for f in _folders if f != folder], {name.partition(".")[0] for name in helpers})
    if folder in _folders or folder not in sys.path:
        _folders[:] = [folder, *(f for f in _folders if f != folder)]
        sys.path[:] = [p for p in sys.path if p not in _folders] + _folders
    importlib.invalidate_caches()
    for name, target in helpers.items():
        origin = _origin(name)
        if origin is None or not _same(origin.resolve(), target.resolve()):
            top = name.partition(".")[0]
            if (OWN / top / "__init__.py").is_file():
                raise InputError(
                    f"it imports {name!r}, and {target} lies beside it, but shardlab's own package {top} ({OWN / top}) "
                    f"hides what is called {top} beside a config. Rename {folder}/{target.relative_to(folder).parts[0]}."
                )
            hides = origin or _origin(top) or "built into Python"
            raise InputError(
                f"it imports {name!r}, and {target} lies beside it, but {name!r} is {hides} "
                f"already and that one would be imported. Rename the file beside the config."
            )


def _origin(name: str) -> Path | None:
    """The file that a module would be imported from; None where there is none."""
    with contextlib.suppress(ModuleNotFoundError):  # what stands for the first part of the name is no package
        spec = importlib.util.find_spec(name)
        return Path(spec.origin) if spec and spec.origin and spec.has_location else None
    return None


def _same(found: Path, target: Path) -> bool:
    """Whether the module file `found` is the helper `target` (a file or a package folder), or a copy of it.

    A copy, because a run folder holds copies of the helpers beside its config: under `python -m`, which puts the
    working directory first on the path, the originals are what is imported, and that changes nothing.
    """
    if found.is_relative_to(target):
        return True
    if target.is_file():
        return found.read_bytes() == target.read_bytes()

    def sources(folder: Path) -> dict[Path, bytes]:
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.py")}

    return found.name == "__init__.py" and sources(found.parent) == sources(target)


def _missing(path: Path) -> str:
    """What to say of a path that is no file, with the nearest files that are there."""
    if path.is_dir():
        there = sorted(p.name for p in path.glob("*.py") if p.name != "__init__.py")
        return f"{path} is a folder, and a config is a file. " + (
            f"In it: {', '.join(there)}." if there else "It has none."
        )
    known = {
        p.stem: p for folder in (OWN / "configs", path.parent) if folder.is_dir() for p in folder.glob("*.py")
    }
    known.pop("__init__", None)
    near = get_close_matches(path.stem, list(known), n=1)
    if not near:
        return f"There is no file {path}. Give the path of a config file, such as configs/quickstart.py."
    found = known[near[0]].resolve()
    here = Path.cwd()
    return f"There is no file {path}. Perhaps {found.relative_to(here) if found.is_relative_to(here) else found}?"


def _place(error: Exception, path: Path) -> str:
    """`FILE, line N: `text`` of the last line, in the file or a helper beside it, that the error came through."""
    file, helpers = path.resolve(), []
    # What cannot be read may be just the error that is told here: then the file alone is named.
    with contextlib.suppress(SyntaxError, ValueError, OSError):
        helpers = list(beside(path).values())
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        at = Path(frame.filename)
        if at == file or any(at.is_relative_to(h) for h in helpers):
            shown = path if at == file else path.parent / at.relative_to(file.parent)
            return f"{shown}, line {frame.lineno}: `{(frame.line or '').strip()}`"
    return str(path)


def _keyword(error: Exception, module: ModuleType | None) -> str:
    """` Perhaps ...?` for a misspelt field of a dataclass that the file names, else an empty string."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kind = getattr(module, match[1], None) if match else None
    if not match or not is_dataclass(kind) or "Did you mean" in str(error):
        return ""
    known = [f.name for f in fields(kind) if f.init]
    return f" {match[1]} has {', '.join(known)}{nearest(match[2], known)}."


def _relative(error: Exception) -> str:
    """What to write instead of `from .base import X`, where that is the error."""
    if not isinstance(error, ImportError) or "no known parent package" not in str(error):
        return ""
    return (
        " A config and the files beside it are run by themselves, not as parts of a package: import a file beside it by "
        "its name alone (`from base import X`), and any other absolutely (`from package.base import X`), with the folder "
        "that holds the package on PYTHONPATH."
    )
