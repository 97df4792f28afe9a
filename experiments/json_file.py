"""One JSON document in a file: what `--json` of a command and a run's folder leave."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write `result` to the file `path`, whose folders are made; None, as of a `--json` that was not given, is nothing.

    Strict JSON: floats that it has no number for are texts, as in records: "NaN", "Infinity", "-Infinity".
    """
    if path is not None:
        text = json.dumps(_strict(result), indent=1, allow_nan=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
