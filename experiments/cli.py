"""The `shardlab` command: finds its commands by their place, and says what went wrong in one paragraph.

A command is a file experiments/commands/NAME.py with `main(argv: list[str]) -> int`. The first line of its docstring is
its help line. A command that takes a CONFIG begins with

    experiment, flags, origin = read(argv, Flags)

where `Flags` is its own frozen dataclass of options. Nothing here imports jax; tyro is imported to parse values.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import errno
import importlib
import importlib.metadata
import io
import itertools
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from experiments.record_schema import RecordError
from sharding.errors import InputError

if TYPE_CHECKING:
    from experiments.config import Experiment
    from experiments.run_config import Origin

F = TypeVar("F")

COMMANDS = Path(__file__).parent / "commands"

BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
"""Exit codes; the last two as a shell reports SIGINT and SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `shardlab ARGV` and return its exit code: 0, or 2 for bad input (one paragraph on stderr).

    `--debug`, anywhere, shows the traceback as well. Any other exception is a bug and is shown whole.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [word for word in given if word != "--debug"]
    _show_what_can_be_shown()
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("shardlab: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _print_no_more()  # the reader is gone (`| head`)
        return PIPE_CLOSED
    except (InputError, RecordError, OSError) as error:
        if len(arguments) != len(given):
            traceback.print_exc()
        text = _refused(error) if isinstance(error, OSError) else error
        print(paragraph(f"shardlab: {text}"), file=sys.stderr)
        return BAD_INPUT


def _show_what_can_be_shown() -> None:
    """A terminal that cannot show a character shows `?`, and a closed standard stream takes everything."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it lives as long as the process)
    if sys.stderr is None:
        sys.stderr = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _print_no_more() -> None:
    """What Python flushes at its end must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refused(error: OSError) -> str:
    """What the system refused, where nothing nearer said it better: a full disk, a name too long, no permission."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) and error.filename is None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        _print_no_more()
        return f"standard output or a file of the run cannot be written ({error.strerror}). Free some room there."
    name = f"{str(error.filename)[:200]!r} " if error.filename else ""
    return (
        f"the system refused {name}({error.strerror or error}). Give another path, or change what stands there; --debug "
        f"shows where it happened."
    )


def read(argv: Sequence[str], flags: type[F]) -> tuple[Experiment, F, Origin]:
    """What `CONFIG [--flags] [--overrides]` says: the experiment, the command's own flags, and where it came from.

    `flags` is a frozen dataclass in the command's file; its fields become flags (those without a default become
    positional, after CONFIG). CONFIG comes first. `--help` prints everything with its default and raises SystemExit(0).
    A mesh axis given twice is an InputError, as is whatever cannot be read, and a `json` that cannot be written.
    """
    from experiments.assemble import check_axes
    from experiments.config import load
    from experiments.overrides import groups, parse, plain
    from experiments.run_config import Origin

    program, description = _about(flags)
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            more = f"{description}\n\nCONFIG comes first. `{program} CONFIG --help` shows every value of that config."
            parse(f"{program} CONFIG", more, flags, None, None, ["--help"])
        raise InputError(
            f"{program} takes a CONFIG first, then flags{f', but got {argv[0]!r}' if argv else ''}. "
            f"For example: {program} configs/quickstart.py"
        )
    typed, path, argv = tuple(argv), Path(argv[0]), [argv[0], *_spelled_out(argv[1:])]
    experiment = load(path)
    own = {field.name for field in dataclasses.fields(flags)}  # pyright: ignore[reportArgumentType]
    both = own & {field.name for field in dataclasses.fields(experiment)}
    assert not both, f"{program} has flags that the config has too: {both}"
    options, experiment = parse(program, description, flags, path, experiment, argv[1:])

    def mine(flag: str) -> bool:  # --json, --no-resume, --processes.count
        return plain(flag).partition(".")[0].removeprefix("no_") in own

    overrides = tuple(word for group in groups(argv[1:]) if not mine(group[0]) for word in group)
    check_axes(overrides)
    _check_json(options)
    return experiment, options, Origin(path, overrides, typed)


def read_flags(argv: Sequence[str], flags: type[F]) -> F:
    """The flags of a command that takes no CONFIG; fields without a default are positional."""
    from experiments.overrides import parse

    options = parse(*_about(flags), flags, None, None, argv)[0]
    _check_json(options)
    return options


def check_file(path: Path, flag: str) -> None:
    """Refuse a file that could not be written later: InputError. Nothing is made, and what is there stays as it is."""
    try:
        if not path.exists():
            _check_folder(path.parent)
        elif path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif path.is_file():  # a pipe is left alone: its reader would take the closing for the end
            path.open("a").close()
    except OSError as error:
        raise InputError(
            f"{flag} {path} cannot be written ({error.strerror}). Give the path of a file in a folder that is writable."
        ) from None


def check_folder(path: Path, flag: str, change: str = "Give a folder that is writable.") -> None:
    """Refuse a folder in which no file could be made later, itself or its parents being made: InputError, ending in what to
    `change`.
    """
    try:
        _check_folder(path)
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be written ({error.strerror}). {change}") from None


def _check_folder(folder: Path) -> None:
    """OSError when no file can be made in the folder or, where it is still to be made, in the nearest one above."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    # Permission bits do not tell for root nor for /proc, so a file without a name is made for a moment.
    with tempfile.TemporaryFile(dir=there):
        pass


def _check_json(options: object) -> None:
    path = getattr(options, "json", None)
    if isinstance(path, Path):
        check_file(path, "--json")


def commands() -> dict[str, str]:
    """Command -> its help line, from the files in experiments/commands, which are read but not imported."""
    files = sorted(path for path in COMMANDS.glob("*.py") if not path.name.startswith("_"))
    return {path.stem: _first_line(path) for path in files}


def version() -> str:
    """shardlab's version and those it runs on, without importing them."""
    about = f"Python {platform.python_version()}, jax {importlib.metadata.version('jax')}"
    return f"shardlab {importlib.metadata.version('shardlab')} ({about})"


def paragraph(text: str) -> str:
    """Text wrapped to the terminal; as one line where stderr is no terminal, so that it can be searched."""
    text = " ".join(text.split())
    if not sys.stderr.isatty():
        return text
    return textwrap.fill(
        text, shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False
    )


def _spelled_out(words: Sequence[str]) -> list[str]:
    """`--devices 4` for `--devices.count 4`: the number of devices is what nearly everybody means."""
    named = list(words)
    for i, (word, value) in enumerate(itertools.pairwise(words)):
        if word == "--devices" and value.lstrip("-").isdecimal():
            named[i] = "--devices.count"
    return [re.sub(r"^--devices=(?=-?\d+$)", "--devices.count=", word) for word in named]


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(version())
        return 0
    known, name = commands(), arguments[0]
    if name not in known:
        near = get_close_matches(name, list(known), n=1)
        hint = f"Perhaps `shardlab {near[0]}`?" if near else f"The commands are {', '.join(known)}."
        raise InputError(f"There is no command {name!r}. {hint}")
    return importlib.import_module(f"experiments.commands.{name}").main(arguments[1:])


def _help() -> str:
    known = commands()
    width = max(map(len, known), default=0)
    columns = shutil.get_terminal_size().columns
    listed = [
        textwrap.fill(
            line, columns, initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4)
        )
        for name, line in known.items()
    ]
    return "\n".join(
        [
            "usage: shardlab COMMAND [CONFIG] [--flags]",
            "",
            "Say how training is split over a mesh, once, as a value: explain it, train it, draw it.",
            "",
            "commands:",
            *listed,
            "",
            "shardlab COMMAND --help           what a command does and takes",
            "shardlab COMMAND CONFIG --help    every value of a config with its default; each is a flag",
            "shardlab --version                this version, Python's and jax's",
            "--debug, anywhere                 the traceback behind an error",
        ]
    )


def _first_line(path: Path) -> str:
    try:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    except (SyntaxError, UnicodeDecodeError) as error:
        return f"(cannot be read: {error})"
    return doc.partition("\n")[0]


def _about(flags: type) -> tuple[str, str]:
    """("shardlab NAME", the docstring) of the command whose file defines `flags`."""
    module = sys.modules[flags.__module__]
    return f"shardlab {flags.__module__.rpartition('.')[2]}", module.__doc__ or ""


if __name__ == "__main__":
    sys.exit(main())
