"""The pick of a search as a config file: it imports the original config and applies the words of the pick."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.assemble import ROOT
from experiments.config import Experiment, config_hash, load
from experiments.overrides import groups, plain
from experiments.run_config import Origin
from sharding.errors import InputError
from sharding.finding import human

if TYPE_CHECKING:
    from experiments.search.found import Found, Row


def check_out(out: Path, origin: Origin) -> str:
    """The module that a config file `out` imports the original from; InputError where a run could not keep it."""
    path = origin.path.resolve()
    stem = path.stem
    for group in groups(origin.overrides):
        value = (group[0].partition("=")[2] or " ".join(group[1:])).strip()
        if plain(group[0]) == "rules" and value.endswith(".py"):
            raise InputError(
                f"--out cannot be written where --rules {value} is a file of its own: a run of {out} would not keep it. Make "
                f"the config import its rules()."
            )
    if out.suffix != ".py" or not out.stem.isidentifier() or out.resolve() == path:
        raise InputError(
            f"--out {out} is to be another config file than {origin.path}, NAME.py with a NAME of letters, digits and _."
        )
    if path.parent == ROOT / "configs":
        return f"configs.{stem}"
    if out.resolve().parent == path.parent and stem.isidentifier():
        return stem
    raise InputError(
        f"--out {out} does not lie beside {origin.path}, which it imports, so that a run of it could not keep both. Write it "
        f"into {path.parent}, to a file beside a config whose name is a Python name."
    )


def write_pick(out: Path, origin: Origin, found: Found, row: Row) -> None:
    """Write the pick's config file and check that it gives the very experiment. InputError where it does not."""
    module = check_out(out, origin)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text(module, origin, found, row), encoding="utf-8")
    wanted: Experiment = Origin(origin.path, row.words).experiment()
    if config_hash(load(out)) != config_hash(wanted):
        raise InputError(
            f"{out} does not give the values of the pick: does another module called {module!r} stand before {origin.path}? "
            f"Rename that config."
        )


def text(module: str, origin: Origin, found: Found, row: Row) -> str:
    """The file's text: one for one search, so that it can be kept under version control."""
    listed = "".join(f"    {word!r},\n" for word in row.words)
    where = _escaped(os.fspath(origin.path))
    return f'''"""The split that a search picked for {where} on {found.target}: {row.candidate.shape().describe()}.

Search:     {_escaped(_command(origin))}
Candidates: {found.candidates}, of which {found.estimated} were traced; this is number {row.rank} by prediction
{_figures(found, row)}
Run:        shardlab train CONFIG, where CONFIG is this file
"""

from __future__ import annotations

from {module} import config as original

from experiments.config import Experiment
from experiments.overrides import apply

WORDS = (
{listed})


def config() -> Experiment:
    """The experiment."""
    return apply(original(), WORDS)
'''


def _figures(found: Found, row: Row) -> str:
    room = f" of {human(found.capacity)}" if found.capacity else ""
    step = (
        "no step: a figure of the machine is missing"
        if row.figure.step is None
        else f"{row.figure.step:.4g} s a step"
    )
    lines = [
        f"Predicted:  {human(row.figure.memory)}{room} on each device (read from the trace)",
        f"Modelled:   {step} (closed forms; not measured)",
    ]
    made = row.compiled
    if made is not None and made.memory is not None:
        lines.append(f"Compiled:   {human(made.memory)}{room} on each device (by the target's compiler)")
        if made.step is not None:
            lines.append(f"            {made.step:.4g} s a step modelled from the compiled collectives")
    return "\n".join(lines)


def _command(origin: Origin) -> str:
    """The command as typed, without where its results went."""
    kept = [g for g in groups(origin.typed[1:]) if plain(g[0]) not in ("out", "json", "jobs", "show")]
    return shlex.join(["shardlab", "search", *origin.typed[:1], *(w for g in kept for w in g)])


def _escaped(words: str) -> str:
    return words.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
