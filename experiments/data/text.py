"""Any text: a file, a folder, or a pattern such as 'notes/**/*.md'."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Self

from experiments.data.store.corpus import Corpus, SourceFile, list_files
from experiments.data.store.text_source import TextSource
from sharding.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(TextSource):
    """The text under `path`; .gz and .dz files are read unpacked, hidden files in a folder are left out.

    A folder means every file below it. Every file must be text in `encoding`: the first that is not is an
    InputError that names it. Several files are split by file, a single one by passage. `licence` is recorded.
    """

    path: str
    encoding: str = "utf-8"
    licence: str = "not stated"

    def corpus(self) -> Corpus:
        """The files that `path` names; InputError when there are none."""
        files = _find(self.path)
        if not files:
            raise InputError(
                f"No non-empty file matches {self.path!r}: the corpus is empty. Check the path or pattern."
            )
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", self.path).strip("-")[-40:] or "text"
        return Corpus(f"text-{stem}", self.licence, files, encoding=self.encoding)

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Three short files under `folder`, for the contract test."""
        for number in range(3):
            lines = (f"line {i} of {number}\n" for i in range(400))
            (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
        return cls(path=str(folder / "*.txt"), length=32)


def _find(path: str) -> tuple[SourceFile, ...]:
    """Files of a path, folder or pattern, named relative to the part before the first wildcard."""
    if not path:
        raise InputError(
            "The path of the text is empty. Give a file, a folder ('.' is this one) or a pattern."
        )
    given = Path(path).expanduser()
    if given.is_file():
        return list_files([given], given.parent)
    if given.is_dir():
        root, pattern = given, "**/*"
    else:
        parts = given.parts
        wild = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), None)
        root = Path(*parts[:wild]) if wild is not None else given
        if wild is None or not root.is_dir():
            missing = "is neither a file nor a folder" if root.exists() else "does not exist"
            raise InputError(
                f"There is no text at {path!r}: {root} {missing}. Give a file, a folder or a pattern."
            )
        pattern = str(Path(*parts[wild:]))
    found = (
        p for p in root.glob(pattern) if not any(part.startswith(".") for part in p.relative_to(root).parts)
    )
    return list_files(found, root)
