"""Whole numbers within bounds, or one clear paragraph. No jax."""

from __future__ import annotations

import math

from experiments.field_types import python_number
from sharding.errors import InputError


def require(
    owner: str, name: str, value: object, least: int, meaning: str, most: float = math.inf, reason: str = ""
) -> None:
    """Refuse, with `InputError`, a value that is not a whole number from `least` to `most`; `reason`: why no more."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        bounds = f"at least {least}" + ("" if most == math.inf else f" and at most {most}{reason}")
        raise InputError(
            f"{owner}{name} is {value!r}, but {meaning} is a whole number of {bounds}. "
            f"{python_number(value, int) or f'Change {owner}{name}.'}"
        )
