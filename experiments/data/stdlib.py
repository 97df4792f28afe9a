"""The Python standard library's own sources, of the running interpreter: real text on every machine. The default."""

from __future__ import annotations

import dataclasses
import os
import sysconfig
from pathlib import Path
from typing import Literal

from experiments.data.store.corpus import Corpus, list_files
from experiments.data.store.text_source import TextSource
from sharding.errors import InputError

_NOT_OURS = {"site-packages", "dist-packages", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Stdlib(TextSource):
    """About 12 MB of Python; 31.5 MB with `tests="include"` (Python 3.11).

    Tests are left out by default because many distributions install Python without them: so the text is nearly
    the same everywhere. It still depends on the Python version; `facts["sha256"]` says which text it was.
    `_sysconfigdata*` is left out: it holds paths of the machine that built Python. Files that are not valid
    UTF-8 on purpose (a handful, all tests) are skipped and listed in `facts["skipped_files"]`.
    """

    tests: Literal["exclude", "include"] = "exclude"

    def corpus(self) -> Corpus:
        """The .py files below the standard library's folder, sorted; site-packages is never read."""
        root = Path(sysconfig.get_paths()["stdlib"])
        leave = _NOT_OURS if self.tests == "include" else _NOT_OURS | _TESTS
        paths = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in leave]
            paths += [
                Path(folder, name)
                for name in names
                if name.endswith(".py") and not name.startswith("_sysconfigdata")
            ]
        files = list_files(paths, root)
        if len(files) < 2:
            raise InputError(
                f"The standard library at {root} has {len(files)} .py files (this Python may carry it as a zip or "
                "as bytecode only). Use a Python installed with its sources, or another data source."
            )
        return Corpus("stdlib", "PSF-2.0", files, unreadable="skip")
