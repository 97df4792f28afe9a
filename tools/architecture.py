"""Who may know whom: the rooms of the house, read from the sources without running them.

`faults(root)` returns one line per breach. A tree is a parameter so that the tests can plant each fault in a small one.
"""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ARRAYS = frozenset({"jax", "jaxlib", "flax", "optax"})
FILES_CLOCK_PROCESS = frozenset(
    "asyncio concurrent datetime fileinput glob http io logging mmap multiprocessing os pathlib selectors "
    "shelve shutil signal socket sqlite3 subprocess tempfile threading time urllib uuid".split()
)
"""Standard modules of the outer world: no pure room needs them. `sys` and `inspect` (who calls) are allowed."""
IMPORT_NAMES = {"orbax-checkpoint": "orbax", "scikit-learn": "sklearn"}
PURE_CALLS = frozenset({"open", "print", "input", "breakpoint", "exit", "quit"})


@dataclass(frozen=True)
class Room:
    """What the modules under one dotted prefix may import. `third=None`: any declared dependency."""

    own: tuple[str, ...]
    third: frozenset[str] | None
    pure: bool = False


# The longest prefix that matches a module decides.
ROOMS = {
    "sharding": Room(("sharding",), ARRAYS | {"numpy"}, pure=True),
    "models": Room(("models", "sharding"), ARRAYS | {"numpy"}, pure=True),
    "experiments": Room(("experiments", "models", "sharding"), None),
    # One command draws: it starts what the figures' room offers, which in turn sees the records alone.
    "experiments.commands": Room(("experiments", "models", "sharding", "paper_figures"), None),
    # records.py and its helpers record_*.py: what a figure needs, and nothing to install for it.
    "experiments.record": Room(("experiments.record",), frozenset()),
    "configs": Room(("configs", "experiments", "models", "sharding"), frozenset()),
    "paper_figures": Room(
        ("paper_figures", "experiments.record"), frozenset({"matplotlib", "numpy", "scipy"})
    ),
}
HOUSE = ("sharding", "models", "experiments", "configs", "paper_figures")
LAYOUT_MODULES = (
    "jax.sharding",
    "jax.experimental",
    "sharding.rules",
    "sharding.mesh",
    "sharding.partitioner",
)
"""A model that imports one of these decides where arrays lie, which is the rules' part."""

LINES = 300
HOST = re.compile(r"(pypi|pythonhosted|npmjs|anaconda)\.\w|//[\w.-]+/simple\b", re.I)
MACHINE_PATH = re.compile(r"(?<![\w.~})-])/(?:work|root|tmp|home|Users|opt)/[\w.]", re.I)


def files(root: Path) -> list[Path]:
    """The tree's own files, relative to `root`: what git tracks or would add, else all but what .gitignore names."""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
        return sorted(Path(name) for name in set(listed) if name and (root / name).is_file())
    ignore = root / ".gitignore"
    patterns = [p.rstrip("/") for p in ignore.read_text().split()] if ignore.exists() else []

    def ignored(path: Path) -> bool:
        return any(fnmatch.fnmatch(f"/{path}" if p.startswith("/") else path.name, p) for p in patterns)

    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not ignored((Path(folder) / f).relative_to(root))]
        found += [(Path(folder) / n).relative_to(root) for n in names]
    return sorted(found)


def module_name(path: Path) -> str:
    """`sharding/rules/data.py` -> `sharding.rules.data`; a package is named without its `__init__`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> Room | None:
    """The room whose prefix is the longest one of `module`, or None outside the house."""
    prefixes = [p for p in ROOMS if module.startswith(p)]
    return ROOMS[max(prefixes, key=len)] if prefixes else None


def imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in the file; `from a import b` counts as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], base]).strip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def declared(root: Path) -> frozenset[str]:
    """Import names of what pyproject.toml declares, extras included."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in wanted}
    return frozenset(IMPORT_NAMES.get(n, n.replace("-", "_")) for n in names)


def _refused(name: str, room: Room, known_third: frozenset[str]) -> str:
    top = name.split(".")[0]
    if top in HOUSE:
        return "" if name.startswith(room.own) else f"may not know {top}"
    if top in sys.stdlib_module_names:
        return f"is pure, {top} is not" if room.pure and top in FILES_CLOCK_PROCESS else ""
    if room.third is None:
        return "" if top in known_third else f"needs {top}, which pyproject.toml does not declare"
    return "" if top in room.third else f"does without {top}"


def import_faults(path: Path, tree: ast.Module, known_third: frozenset[str]) -> Iterator[str]:
    """Arrows against the order of the rooms, and imports that a room does without."""
    module = module_name(path)
    room = room_of(module)
    if room is None:
        return
    for line, name in imports(tree, module):
        why = _refused(name, room, known_third)
        if why:
            yield f"{path}:{line}: imports {name}: {module} {why}"
        if path.parts[0] == "models" and name.startswith(LAYOUT_MODULES):
            yield f"{path}:{line}: imports {name}: a model does not decide where arrays lie"


def purity_faults(path: Path, tree: ast.Module) -> Iterator[str]:
    """Files, clock and printing in a pure room, by call or by attribute (`jax.debug.print`)."""
    room = room_of(module_name(path))
    if room is None or not room.pure:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name | ast.Attribute):
            continue
        name = node.id if isinstance(node, ast.Name) else node.attr
        if name == "print" or (isinstance(node, ast.Name) and name in PURE_CALLS):
            yield f"{path}:{node.lineno}: uses {name}: {path.parts[0]} opens no file, prints nothing, asks no one"


def _docstrings(tree: ast.Module) -> set[int]:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [n.body for n in ast.walk(tree) if isinstance(n, holders)]
    return {id(b[0].value) for b in bodies if b and isinstance(b[0], ast.Expr)}


def axis_faults(path: Path, tree: ast.Module, axes: frozenset[str]) -> Iterator[str]:
    """String literals in a model that are made of mesh axes alone (`"tensor"`, `"data fsdp"`), docstrings aside."""
    if path.parts[0] != "models":
        return
    docstrings = _docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words = re.findall(r"\w+", node.value)
            if words and axes.issuperset(words):
                yield f"{path}:{node.lineno}: {node.value!r} is a mesh axis: a model speaks of named dims"


def mesh_axes(root: Path) -> frozenset[str]:
    """Mesh axes that are not logical names as well (`expert` is both), read from sharding/axes.py."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.parse((root / "sharding" / "axes.py").read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in ("AXES", "NAMES")
        ):
            found[node.targets[0].id] = tuple(ast.literal_eval(node.value))
    return frozenset(found["AXES"]) - frozenset(found["NAMES"])


def form_faults(path: Path, tree: ast.Module, text: str) -> Iterator[str]:
    """A module without a docstring, an `__init__` that holds more, a room's file that is too long to read at once."""
    if ast.get_docstring(tree) is None:
        yield f"{path}:1: has no docstring"
    if path.name == "__init__.py" and len(tree.body) > 1:
        yield f"{path}:{tree.body[1].lineno}: holds more than a docstring"
    if path.parts[0] in HOUSE and text.count("\n") > LINES:
        yield f"{path}: has {text.count(chr(10))} lines, more than {LINES}"


def text_faults(path: Path, text: str) -> Iterator[str]:
    """Registry hosts and paths of one machine, in a file of any kind."""
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, what in ((HOST, "a package registry's host"), (MACHINE_PATH, "a path of one machine")):
            if hit := pattern.search(line):
                yield f"{path}:{number}: {hit.group()!r} is {what}"


def faults(root: Path) -> list[str]:
    """Every breach in the tree under `root`, as `path:line: what`."""
    found: list[str] = []
    listed = files(root)
    axes, known_third = mesh_axes(root), declared(root)
    for path in listed:
        raw = (root / path).read_bytes()
        if b"\0" in raw:
            continue
        text = raw.decode("utf-8", "replace")
        found += text_faults(path, text)
        if path.suffix != ".py":
            continue
        tree = ast.parse(text, str(path))
        found += [
            *import_faults(path, tree, known_third),
            *purity_faults(path, tree),
            *axis_faults(path, tree, axes),
        ]
        found += form_faults(path, tree, text)
        if path.parts[0] in HOUSE and path.parent / "__init__.py" not in listed:
            found.append(f"{path}: its folder has no __init__.py")
    return sorted(set(found))
