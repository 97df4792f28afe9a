"""The catalogue of probes: files of experiments/probes, or anywhere else, read but not imported until they run.

A probe file has a docstring whose first line names the bug, with the sections Reported, Unsafe and Do; a dict literal `NEEDS`
where the defaults of `Needs` do not fit; and `probe(devices) -> Verdict`, which runs in a process made for it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from experiments.doctor.verdict import Verdict
from sharding.errors import InputError

FOLDER = Path(__file__).resolve().parent.parent / "probes"
SECTIONS = ("Reported", "Unsafe", "Do")
EXAMPLE = (
    'It is a Python file whose docstring names the bug in its first line and has the sections "Reported:", "Unsafe:" and '
    '"Do:", with a function probe(devices) that returns an experiments.doctor.verdict.Verdict.'
)


@dataclass(frozen=True)
class Needs:
    """What a probe runs on. Where `gloo` is set it gets pretend CPU devices of its own, and jax.distributed."""

    devices: int = 1
    """Devices it takes; where fewer are there it is not applicable."""
    processes: int = 1
    """Processes that run it together; more than one only with `gloo`."""
    gloo: bool = False
    """CPU devices of processes that talk through gloo, whatever else the machine has."""
    seconds: float = 0.0
    """How long it may take, compilation included, where that is more than `--limit`."""
    quick: bool = True
    """Whether `--quick` runs it too."""


@dataclass(frozen=True)
class Probe:
    """A probe before it runs: its name (the file's), what its docstring says, and what it needs."""

    name: str
    path: Path
    title: str
    reported: str
    unsafe: str
    do: str
    needs: Needs


def catalogue(more: Sequence[Path] = ()) -> list[Probe]:
    """The probes of the house by name, then those of other files. InputError for a file that is none."""
    own = sorted(p for p in FOLDER.glob("*.py") if p.stem != "__init__")
    found = [read(p) for p in (*own, *more)]
    names = [p.name for p in found]
    for probe in found:
        if names.count(probe.name) > 1:
            raise InputError(
                f"Two probes are named {probe.name!r}; the last is {probe.path}. Give its file another name."
            )
    return found


def read(path: Path) -> Probe:
    """What a probe's file says, without running it. InputError when it is not there or not a probe."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise InputError(f"The probe {path} cannot be read: {error}. {EXAMPLE}") from None
    doc = ast.get_docstring(tree) or ""
    said = {name: _section(doc, name) for name in SECTIONS}
    missing = [f'the section "{name}:"' for name, text in said.items() if not text]
    if not any(isinstance(n, ast.FunctionDef) and n.name == "probe" for n in tree.body):
        missing.append("a function probe(devices)")
    if missing:
        raise InputError(f"{path} is no probe: it lacks {' and '.join(missing)}. {EXAMPLE}")
    title = " ".join(doc.partition("\n\n")[0].split())
    return Probe(path.stem, path, title, said["Reported"], said["Unsafe"], said["Do"], _needs(tree, path))


def load(path: Path) -> Callable[[list[Any]], Verdict]:
    """The probe's function; its file is run, with its folder importable when it is not one of the house."""
    path = path.resolve()
    if path.parent == FOLDER:
        return importlib.import_module(f"experiments.probes.{path.stem}").probe
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.probe


def _section(doc: str, name: str) -> str:
    """The text after `Name:` up to the next section or the end, as one line."""
    found = re.search(rf"^{name}:(.*?)(?=^(?:{'|'.join(SECTIONS)}):|\Z)", doc, re.MULTILINE | re.DOTALL)
    return " ".join(found.group(1).split()) if found else ""


def _needs(tree: ast.Module, path: Path) -> Needs:
    named = [
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "NEEDS" for t in n.targets)
    ]
    known = {f.name: type(f.default) for f in fields(Needs)}
    try:
        asked = ast.literal_eval(named[-1]) if named else {}
        if not isinstance(asked, dict) or any(
            not isinstance(v, _accepts(known[k])) for k, v in asked.items()
        ):
            raise ValueError(asked)
        return Needs(**asked)
    except (ValueError, KeyError) as error:
        kinds = ", ".join(f"{k} ({t.__name__})" for k, t in known.items())
        raise InputError(
            f"NEEDS in the probe {path} cannot be used ({error}). It is a dict literal of some of: {kinds}."
        ) from None


def _accepts(kind: type) -> type | tuple[type, ...]:
    return (int, float) if kind is float else kind
