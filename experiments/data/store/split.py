"""Which documents are held out: decided by name, so that it never depends on order, machine or seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sharding.errors import InputError

HELDOUT_ONE_IN = 14  # about 7 %


def place(name: str) -> float:
    """A fixed pseudo-random number in 0..1 for a name: the first 8 bytes of its sha256."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def heldout_files(names: Sequence[str]) -> frozenset[str]:
    """The held-out ones of at least two file names: those whose place is below 1/14.

    A file's side does not change when other files come and go, except that each side gets at least one.
    """
    if len(set(names)) < 2:
        raise InputError(f"A split by file needs at least two files with different names, got {list(names)}.")
    chosen = {name for name in names if place(name) < 1 / HELDOUT_ONE_IN}
    chosen = chosen or {min(names, key=place)}
    if len(chosen) == len(set(names)):
        chosen.remove(max(names, key=place))
    return frozenset(chosen)


def is_heldout_passage(file: str, number: int) -> bool:
    """Whether passage `number` of a corpus of one file is held out: one, drawn by hash, of each 14 in a row."""
    block, within = divmod(number, HELDOUT_ONE_IN)
    return within == int(place(f"{file}#{block}") * HELDOUT_ONE_IN)
