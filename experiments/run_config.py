"""A run's own config: the file it came from, its overrides and every value, written so that it can be run again.

    source.py    the config file as it was executed (what it imports from beside it is copied too)
    config.json  every value, the overrides and the hash
    config.py    a config file that loads source.py, applies the overrides and insists on the same values

`shardlab train runs/NAME/TIME-HASH/config.py` therefore works after the original is changed or gone; so does `shardlab
sweep` with a sweep's (`experiments.sweep`).
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import Experiment, config_hash, load, to_json
from experiments.config_file import alone, beside, execute
from experiments.overrides import apply, groups, plain
from sharding.errors import InputError

RESERVED = ("config.py", "source.py", "override_rules.py")


@dataclass(frozen=True)
class Origin:
    """Where a config's value came from: its file, the overrides given with it, and the command that was typed."""

    path: Path
    overrides: tuple[str, ...] = ()
    typed: tuple[str, ...] = ()
    """The words after `shardlab NAME`, the command's own flags included; empty where no command was typed."""

    def command(self, name: str) -> str:
        """`shardlab NAME ...` as a line for a shell: what was typed, or what would give the same value."""
        return shlex.join(["shardlab", name, *(self.typed or (str(self.path), *self.overrides))])

    def experiment(self) -> Experiment:
        """The config's value with the overrides applied."""
        return apply(load(self.path), self.overrides)


@dataclass(frozen=True)
class Recorded:
    """What a run's config.py knows of its run."""

    overrides: tuple[str, ...]
    config_hash: str

    def again(self, folder: Path) -> Experiment:
        """The run's experiment, from source.py in `folder`; `InputError` with the fields that are not as recorded."""
        made = load(folder / "source.py")
        if self.overrides:
            made = apply(made, self.overrides, base=folder)
        check_recorded(folder, "experiment", made, self.overrides, self.config_hash)
        return made


def check_recorded(folder: Path, kind: str, made: Any, overrides: Sequence[str], digest: str) -> None:
    """`InputError` with the fields in which what source.py in `folder` gives is not what config.json has under `kind`."""
    if config_hash(made) == digest:
        return
    try:
        recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))[kind]
    except (OSError, ValueError, KeyError, TypeError):
        different = "what differs is unknown, since config.json beside it cannot be read"
    else:
        different = (
            "; ".join(differences(recorded, to_json(made))) or "config.json agrees with what it gives now"
        )
    raise InputError(
        f"{folder / 'source.py'} with its overrides ({shlex.join(overrides) or 'none'}) does not give the "
        f"values that this run recorded (hash {digest[:8]}, now {config_hash(made)[:8]}): {different}. "
        f"A default may have changed since, or the config depends on time or place. Put the values back, or run "
        f"a config of your own."
    )


def write_run_config(folder: Path, origin: Origin, experiment: Experiment) -> None:
    """Write source.py, config.json and config.py into the existing run folder, and check that they run again.

    `experiment` is the value that `origin` gave. `InputError` when the folder cannot be written, or when the copy
    does not give the same values (a config that reads the clock or its own path).
    """
    path, overrides = _flattened(origin)
    with _writing(folder):
        overrides = _keep_rules(folder, overrides)
    stub = _stub(experiment.name, overrides, config_hash(experiment))
    keep(folder, path, "experiment", experiment, overrides, stub, load)


def keep(
    folder: Path,
    path: Path,
    kind: str,
    value: Any,
    overrides: Sequence[str],
    stub: str,
    load: Callable[[Path], Any],
) -> None:
    """Write `path` as source.py with what it imports from beside it, config.json with `value` under `kind`, and `stub` as
    config.py, which `load` must be able to run where nothing but the folder is left. `InputError` when it cannot.
    """
    document = {"config_hash": config_hash(value), "overrides": list(overrides), kind: to_json(value)}
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    with _writing(folder):
        _copy(path, folder / "source.py")
        (folder / "config.json").write_text(text, encoding="utf-8")
        (folder / "config.py").write_text(stub, encoding="utf-8")
    try:
        with alone():
            load(folder / "config.py")
    except InputError as error:
        raise InputError(
            f"A run keeps a copy of its config and of the files beside it that import statements name, and this copy "
            f"does not run again. {error}"
        ) from error


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"The run folder {folder} cannot be written: {error.strerror} ({error.filename}). Free space, change its "
            f"permissions, or name another folder."
        ) from error


def differences(recorded: Any, now: Any, where: str = "") -> Iterator[str]:
    """`mesh.tensor: recorded 4, now 2` for every value in which two JSON documents differ."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        for key in [*recorded, *(k for k in now if k not in recorded)]:
            yield from differences(recorded.get(key, "nothing"), now.get(key, "nothing"), f"{where}.{key}")
    elif recorded != now:
        yield f"{where.lstrip('.')}: recorded {recorded!r}, now {now!r}"


def _flattened(origin: Origin) -> tuple[Path, tuple[str, ...]]:
    """The file and overrides to record: those of the first run, then the new, when it is a run's config.py."""
    recorded = getattr(execute(origin.path), "RECORDED", None)
    if not isinstance(recorded, Recorded):
        return origin.path, origin.overrides
    folder = origin.path.resolve().parent
    return folder / "source.py", (*_absolute(recorded.overrides, folder), *origin.overrides)


def _rules_file(group: tuple[str, ...]) -> str | None:
    """The FILE.py that a flag group gives as rules, if it does."""
    value = (group[0].partition("=")[2] or " ".join(group[1:])).strip()
    return value if plain(group[0]) == "rules" and value.endswith(".py") else None


def _absolute(overrides: Sequence[str], folder: Path) -> Iterator[str]:
    for group in groups(overrides):
        file = _rules_file(group)
        yield from ("--rules", str(folder / file)) if file else group


def _keep_rules(folder: Path, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The overrides with their rule FILE.py copied into the run folder, and named relative to it."""
    kept = groups(overrides)
    of_rules = [i for i, group in enumerate(kept) if plain(group[0]) == "rules"]
    if of_rules:
        last = of_rules[-1]
        file = _rules_file(kept[last])
        if file:
            _copy(Path(file), folder / "override_rules.py")
            kept[last] = ("--rules", "override_rules.py")
        kept = [group for i, group in enumerate(kept) if i not in of_rules[:-1]]
    return tuple(word for group in kept for word in group)


def _copy(path: Path, target: Path) -> None:
    """Copy a file to `target`, and what the file imports from beside it next to that."""
    shutil.copyfile(path, target)
    for helper in beside(path).values():
        to = target.parent / helper.relative_to(path.resolve().parent)
        if to in [target.parent / name for name in RESERVED]:
            raise InputError(
                f"{path} imports {helper}, but a run folder has its own {helper.name}. Give that file another name."
            )
        if helper.is_dir():
            shutil.copytree(helper, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif to.exists() and to.read_bytes() != helper.read_bytes():
            raise InputError(
                f"{path} imports {helper}, but the run folder has another {helper.name}. Rename one of them."
            )
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(helper, to)


def _stub(name: str, overrides: tuple[str, ...], digest: str) -> str:
    listed = "".join(f"        {word!r},\n" for word in overrides)
    given = f"(\n{listed}    )" if overrides else "()"
    return f'''"""The run of {name!r} in this folder, with exactly its values.

Command:  shardlab train CONFIG, where CONFIG is this file
Overrides may follow, as with any config. Loading it fails when the values are no longer those recorded.
"""

from __future__ import annotations

from pathlib import Path

from experiments.config import Experiment
from experiments.run_config import Recorded

RECORDED = Recorded(
    overrides={given},
    config_hash="{digest}",
)


def config() -> Experiment:
    return RECORDED.again(Path(__file__).parent)
'''
