"""What was measured of a prepared text once, kept beside it under a key of all that it depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path

FORMAT = 2
"""Raise it when the same text would be measured otherwise: it is part of every key."""


def remembered(folder: Path, of: object, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The figures that `measure()` gave for `of` when it was first asked, or gives now: the same to the last bit.

    `of`, which JSON can hold, is all that the figures depend on. They lie in `folder/measured-KEY.json`; a file that is
    damaged is written anew, and in a folder that cannot be written they are measured each time.
    """
    key = hashlib.sha256(json.dumps([FORMAT, of]).encode()).hexdigest()
    path = folder / f"measured-{key[:16]}.json"
    if (kept := _kept(path, key)) is not None:
        return kept
    figures = measure()
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        try:
            draft.write_text(
                json.dumps({"sha256": _seal(key, figures), "figures": figures}, indent=1) + "\n",
                encoding="utf-8",
            )
            os.replace(draft, path)  # processes that measure at once write the same
        finally:
            draft.unlink(missing_ok=True)
    return figures


def _kept(path: Path, key: str) -> dict[str, float] | None:
    """The figures in a file that is whole; None for any other and for none."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        figures = kept["figures"]
        return figures if kept["sha256"] == _seal(key, figures) else None
    # In a damaged file anything may stand: no JSON, another kind of value, a number beyond float, a million brackets.
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None


def _seal(key: str, figures: dict[str, float]) -> str:
    """A checksum of figures for what they are of; TypeError, ValueError or OverflowError where one is no finite number."""
    if not isinstance(figures, dict):
        raise TypeError(f"figures have names, but these are a {type(figures).__name__}")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in figures.values()):
        raise ValueError("figures are finite numbers")
    return hashlib.sha256((key + json.dumps(figures, sort_keys=True)).encode()).hexdigest()
