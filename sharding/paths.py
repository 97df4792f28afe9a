"""Parameters by path: which pattern speaks of which array, for trees whose arrays carry no names. No jax here.

A path is the keys of a tree joined by dots: `Block_0.attention.query.kernel`. A pattern is matched against the whole of it:
`*` stands for any run of characters, dots included, `?` for one character, `[abc]` for one of these. Of a table of
patterns the first that matches an array speaks for it, and says one word a dim, `-` for a dim left as it is. A pattern
that speaks for no array is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from sharding.axes import AXES, nearest
from sharding.errors import InputError
from sharding.rule import PARAM_ROLES, Ask

LEAVE = "-"
"""The word for a dim that a pattern says nothing of."""


def speaker(patterns: Iterable[str], path: str) -> str | None:
    """The first pattern that matches `path`, None where none does."""
    return next((p for p in patterns if fnmatchcase(path, p)), None)


def words(owner: str, table: Mapping[str, str], path: str, shape: tuple[int, ...]) -> tuple[str, ...] | None:
    """What a table says of an array of `shape`, a word a dim; None where no pattern matches its path.

    `owner` begins the error for a pattern that has another number of words than the array has dims.
    """
    pattern = speaker(table, path)
    if pattern is None:
        return None
    said = tuple(table[pattern].split())
    if len(said) != len(shape):
        raise InputError(
            f"{owner} {pattern!r}: {table[pattern]!r} has {len(said)} words, but {path}, the first array that it is asked "
            f"of, has {len(shape)} dims {shape}. Give one word a dim, {LEAVE!r} for a dim to leave as it is, or put a "
            f"narrower pattern for this array before it."
        )
    return said


def check_spoken(owner: str, patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Refuse, with InputError, a pattern that speaks for none of the arrays: it matches none, or others come first."""
    paths, patterns = list(paths), list(patterns)
    heard = {speaker(patterns, path) for path in paths}
    for pattern in patterns:
        if pattern in heard:
            continue
        matched = next((p for p in paths if fnmatchcase(p, pattern)), None)
        if matched is not None:
            raise InputError(
                f"{owner} {pattern!r} speaks for no array: {speaker(patterns, matched)!r} stands before it and matches "
                f"{matched} and whatever else it does. Put the narrower pattern first, or remove one of the two."
            )
        close = get_close_matches(pattern, paths, n=1, cutoff=0.3)
        near = f" (nearest: {close[0]!r})" if close else ""
        some = ", ".join(paths[:6]) + (f", ... {len(paths)} in all" if len(paths) > 6 else "")
        raise InputError(
            f"{owner} {pattern!r} matches no array{near}. A pattern is matched against the whole path, and * stands for any "
            f"characters. The paths are {some}. Correct the pattern, or remove it."
        )


@dataclass(frozen=True)
class ByPath:
    """A placing, for one role of a `Rule`, by pattern of path -> one mesh axis a dim: `ByPath({"*.kernel": "- tensor"})`."""

    table: Mapping[str, str]

    def __post_init__(self) -> None:
        for pattern, said in self.table.items():
            if not isinstance(said, str):
                raise InputError(
                    f"A rule by path places {pattern!r} as {said!r}, but what is meant is text: one axis a dim, or {LEAVE!r}."
                )
            for axis in said.split():
                if axis not in (*AXES, LEAVE):
                    raise InputError(
                        f"A rule by path places {pattern!r} as {said!r}, but there is no axis {axis!r}{nearest(axis, AXES)}. "
                        f"The axes are {', '.join(AXES)}; {LEAVE!r} leaves a dim as it is."
                    )

    def __call__(self, ask: Ask) -> Mapping[str, str]:
        """Name -> axis for the dims of one array."""
        said = words("A rule by path:", self.table, ask.path, ask.shape or ())
        placed = [(n, axis) for n, axis in zip(ask.names, said or (), strict=False) if axis != LEAVE]
        twice = next((n for n, _ in placed if ask.names.count(n) > 1), None)
        if twice is not None:
            raise InputError(
                f"A rule by path splits one dim {twice} of {ask.path}, which has two of that name ({' '.join(ask.names)}): "
                f"which of them is meant cannot be said. Give the model's two dims different names."
            )
        return dict(placed)


def placings(roles: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Role -> placing, for `Rule(**...)`; InputError for a role that parameters do not have."""
    for role, table in roles.items():
        if role not in PARAM_ROLES:
            raise InputError(
                f"A rule by path speaks of a role {role!r}{nearest(role, PARAM_ROLES)}, but only parameters have paths; "
                f"their roles are {', '.join(PARAM_ROLES)}."
            )
        if not isinstance(table, Mapping):
            raise InputError(
                f"A rule by path gives {role} {table!r}; it takes a table, such as {{'*.kernel': '- tensor'}}."
            )
    return {role: ByPath(table) for role, table in roles.items()}
