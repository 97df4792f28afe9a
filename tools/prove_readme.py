"""Runs what the documents promise: every fenced block marked `run` in README.md, CONTRIBUTING.md and docs/.

    ```sh run                 run by `sh -eu` from the repository's root, this Python's folder first on PATH
    ```python run timeout=60  run by this Python; the timeout in seconds is 900 where none is given

Blocks run in the order of the page, each a process of its own; the first that fails ends the proof with its file:line.
    .venv/bin/python tools/prove_readme.py [PAGE ...]     from the repository's root
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})\s*(?P<info>.*?)\s*$")
INFO = re.compile(r"(?P<language>\S+) run(?: timeout=(?P<timeout>\d+))?$")
TIMEOUT = 900
BIN = Path(sys.executable).parent
COMMANDS = {"sh": ["sh", "-eu", "-c"], "python": [sys.executable, "-c"]}


class ProofError(Exception):
    """A promise that does not hold, as `page:line: why`."""


@dataclass(frozen=True)
class Block:
    """One runnable block; `line` is that of its opening fence, `timeout` is in seconds."""

    page: Path
    line: int
    language: str
    timeout: int
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The runnable blocks of a Markdown page in order; ProofError for a fence left open or an unknown language."""
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        opening = FENCE.match(line)
        if not opening:
            continue
        body: list[str] = []
        for _, inner in lines:
            closing = FENCE.match(inner)
            if closing and not closing["info"] and closing["fence"].startswith(opening["fence"]):
                break
            body.append(inner.removeprefix(opening["indent"]))
        else:
            raise ProofError(f"{page}:{number}: this block is never closed")
        if not re.search(r"\brun\b", opening["info"]):
            continue
        info = INFO.match(opening["info"])
        if not info or info["language"] not in COMMANDS:
            raise ProofError(
                f"{page}:{number}: {opening['info']!r} is neither 'sh run' nor 'python run' (with 'timeout=SECONDS')"
            )
        text = "\n".join(body) + "\n"
        yield Block(page, number, info["language"], int(info["timeout"] or TIMEOUT), text)


def prove(block: Block, root: Path) -> None:
    """Runs one block from `root` with its output passed through; ProofError when it fails or takes too long."""
    where = f"{block.page}:{block.line}"
    print(f"== {where} ({block.language})", *block.text.splitlines(), sep="\n   ", flush=True)
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    started = time.monotonic()
    # A session of its own, so that the time-out reaches what the block started in turn.
    process = subprocess.Popen(
        [*COMMANDS[block.language], block.text],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(block.timeout)
    except BaseException as error:  # an interrupt must not leave the block running either
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise ProofError(f"{where}: took more than {block.timeout} s") from None
        raise
    print(f"== {where}: exit {code} after {time.monotonic() - started:.1f} s", flush=True)
    if code:
        raise ProofError(f"{where}: exit {code}")


def pages(root: Path) -> list[Path]:
    """README.md, CONTRIBUTING.md and every page under docs/, relative to `root`."""
    named = [root / name for name in ("README.md", "CONTRIBUTING.md") if (root / name).exists()]
    return [p.relative_to(root) for p in [*named, *sorted(root.glob("docs/**/*.md"))]]


def main(arguments: list[str]) -> int:
    """Proves the pages named, or all of them; 1 when a promise does not hold or none was made."""
    root = Path.cwd()
    wanted = [Path(a) for a in arguments] or pages(root)
    try:
        promised = [block for page in wanted for block in blocks(page)]
        for block in promised:
            prove(block, root)
    except ProofError as error:
        print(f"prove_readme: {error}", file=sys.stderr)
        return 1
    print(f"prove_readme: {len(promised)} block(s) of {len(wanted)} page(s) ran as the pages say")
    return 0 if promised else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
