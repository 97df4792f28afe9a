"""Typed overrides of a config value from the command line, through tyro with the value itself as the default.

Every field is a flag: `--steps 20 --mesh.tensor 4 --rules "data | fsdp"`. A field that is annotated with a protocol
takes the type of the config's value, so `--model.layers 2` works for whichever model the config has. Nothing here
imports jax; tyro is imported when there is something to parse.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

from experiments.config import Experiment
from experiments.expressions import parse_partitioner, parse_rules, show_partitioner
from experiments.field_types import words
from experiments.schedules.named import parse_schedule, show_schedule
from sharding.errors import InputError
from sharding.partitioner import Partitioner
from sharding.pipeline.grid import Schedule
from sharding.rule import Rules


def apply(experiment: Experiment, arguments: Sequence[str], base: Path | None = None) -> Experiment:
    """The experiment with overrides such as ("--steps", "20") applied; a rule FILE.py is looked up from `base`."""
    return parse("shardlab", "", None, Path("the config"), experiment, arguments, base)[1]


def parse(
    program: str,
    description: str,
    flags: type | None,
    config: Path | None,
    experiment: Experiment | None,
    arguments: Sequence[str],
    base: Path | None = None,
) -> tuple[Any, Any]:
    """Read a command's own flags (a dataclass type) and an experiment's overrides from one argument list.

    Returns (flags or None, experiment or None). `--help` prints every value with its default and raises SystemExit(0);
    anything that cannot be read raises `InputError`, with the nearest flag for a typo.
    """
    import tyro

    parts: list[tuple[str, Any]] = []
    defaults: dict[str, Any] = {}
    if flags is not None:
        parts.append(("flags", Annotated[flags, tyro.conf.arg(name="")]))
        # Only what has no default is missing: a flags value that were missing whole would lose its other defaults.
        absent = {f.name: tyro.MISSING for f in dataclasses.fields(flags) if _required(f)}
        defaults["flags"] = flags(**absent)
    if experiment is not None:
        parts.append(("experiment", Annotated[type(experiment), tyro.conf.arg(name="")]))
        defaults["experiment"] = experiment
    arguments_type = dataclasses.make_dataclass("Arguments", parts, frozen=True)

    def read(words: Sequence[str]) -> Any:
        return tyro.cli(
            arguments_type,
            prog=f"{program} {config}" if config else program,
            description=description,
            args=list(words),
            default=arguments_type(**defaults),
            config=(tyro.conf.PositionalRequiredArgs,),
            registry=_registry(base or Path()),
            use_underscores=True,
        )

    known = {flag: leaf for part in (flags, experiment) if part is not None for flag, leaf in _leaves(part)}
    _check_finite(arguments, known)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            read_in = read(arguments)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _explain(stop, said.getvalue(), arguments, known, read, program, config) from stop
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{error}") from error
    return getattr(read_in, "flags", None), getattr(read_in, "experiment", None)


def groups(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """The arguments cut before every flag, [("--steps", "20"), ("--resume",), ...]; words before them alone."""
    out: list[tuple[str, ...]] = []
    for word in arguments:
        if re.match(r"--?[A-Za-z]", word) or not out:
            out.append((word,))
        else:
            out[-1] = (*out[-1], word)
    return out


def plain(flag: str) -> str:
    """`--log-every=5` -> `log_every`: the name of the field that a flag speaks of."""
    return flag.partition("=")[0].lstrip("-").replace("-", "_")


def _registry(base: Path) -> Any:
    """How tyro reads and shows the values that are expressions."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    def one(
        metavar: str, read: Callable[[str], Any], show: Callable[[Any], str], kinds: tuple[type, ...]
    ) -> Any:
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda words: read(words[0]),
            is_instance=lambda value: isinstance(value, kinds),
            str_from_instance=lambda value: [show(value)],
        )

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if info.type is Rules:
            return one("RULES|FILE.py", lambda text: parse_rules(text, base), repr, (Rules,))
        if info.type == Partitioner:
            kinds = get_args(Partitioner)
            return one(
                "|".join(k.__name__.lower() for k in kinds), parse_partitioner, show_partitioner, kinds
            )
        if info.type == Schedule | None:
            kinds = (Schedule, NoneType)
            return one("none|SCHEDULE", lambda text: parse_schedule(text, base), show_schedule, kinds)
        return None

    return registry


# What to say when tyro refuses.


@dataclass(frozen=True)
class Leaf:
    """One value that a flag sets: its type and what it is now (`...` when it must be given)."""

    type: Any
    now: Any
    infinite: str = ""
    """What infinity means there; "" where it means nothing. A field says so as metadata={"infinite": "no clipping"}."""


def _check_finite(arguments: Sequence[str], known: dict[str, Leaf]) -> None:
    """Refuse nan for any number, and infinity where the field does not say what it means: both spoil a run unseen."""
    for group in groups(arguments):
        leaf = known.get(plain(group[0]))
        if leaf is None or float not in (leaf.type, *get_args(leaf.type)):
            continue
        flag, _, value = group[0].partition("=")
        for word in (value, *group[1:]):
            if _spoils(word, leaf):
                more = f", or inf ({leaf.infinite})" if leaf.infinite else ""
                raise InputError(
                    f"{flag} {word} is no finite number. It is {leaf.now} now: give a finite number{more}."
                )


def _spoils(word: str, leaf: Leaf) -> bool:
    try:
        number = float(word)
    except ValueError:  # tyro says so
        return False
    return math.isnan(number) or (math.isinf(number) and not leaf.infinite)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """(field path with underscores, leaf) of every value of a dataclass; a bool also by its `no_` flag."""
    hints = get_type_hints(value if isinstance(value, type) else type(value))
    for field in dataclasses.fields(value):
        factory = field.default_factory if isinstance(value, type) else None
        now = factory() if callable(factory) else getattr(value, field.name, ...)
        whole = isinstance(now, (Rules, *get_args(Partitioner)))
        if dataclasses.is_dataclass(now) and not whole:
            yield from _leaves(now, f"{prefix}{field.name}.")
            continue
        yield prefix + field.name, Leaf(hints[field.name], now, field.metadata.get("infinite", ""))
        if hints[field.name] is bool:
            yield f"{prefix}no_{field.name}", Leaf(bool, now)


def _explain(
    stop: SystemExit,
    said: str,
    arguments: Sequence[str],
    known: dict[str, Leaf],
    read: Callable[[Sequence[str]], Any],
    program: str,
    config: Path | None,
) -> InputError:
    """The one paragraph for arguments that tyro refused, from our own errors, the flags' names, then flag by flag."""
    cause: BaseException | None = stop
    reason = ""
    while cause := cause.__context__:
        if isinstance(cause, InputError):
            return cause
        if type(cause) is ValueError:
            reason = str(cause)
    see = f"`{program}{f' {config}' if config else ''} --help` shows every value."
    for group in groups(arguments):
        if group[0].startswith("-") and plain(group[0]) not in known:
            return InputError(
                f"There is no value {group[0].partition('=')[0]}{_perhaps(group[0], known)} {see}"
            )
    if not any(leaf.now is ... for leaf in known.values()):
        for group in groups(arguments):
            if not _reads(group, read):
                because = f" ({reason})" if reason else ""
                return InputError(f"{_refused(group, known)}{because}. {see}")
    lines = [line.strip("│╭╮╰╯─ ") for line in said.splitlines()[1:]]
    return InputError(" ".join(line for line in lines if line) or reason)


def _reads(group: Sequence[str], read: Callable[[Sequence[str]], Any]) -> bool:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(ValueError):
        try:
            read(group)
        except SystemExit:
            return False
    return True


def _perhaps(flag: str, known: dict[str, Leaf]) -> str:
    """`: perhaps --mesh.tensor?`, for a misspelt flag or one whose part was left out; else `.`."""
    name = plain(flag)
    same = [k for k in known if k.rpartition(".")[2] == name]
    ends = {k.rpartition(".")[2]: k for k in known}
    close = get_close_matches(name, list(known), n=1) or [
        ends[e] for e in get_close_matches(name, list(ends), n=1)
    ]
    near = same or close
    return f": perhaps {' or '.join('--' + k for k in near)}?" if near else "."


def _refused(group: Sequence[str], known: dict[str, Leaf]) -> str:
    """`--steps abc: it takes a whole number and is 60 now`."""
    asked = " ".join(group)
    leaf = known.get(plain(group[0])) if group[0].startswith("-") else None
    if leaf is None:
        return f"{asked!r} belongs to no flag; a value is given as --NAME VALUE"
    return f"{asked} cannot be read: it takes {words(leaf.type, 'flag')} and is {leaf.now} now"
