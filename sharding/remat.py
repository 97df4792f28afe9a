"""What a layer's forward pass leaves for its backward pass, as a text in a config; no jax here, so that it parses at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sharding.errors import InputError

WHOLE = ("none", "dots", "full")
"""The policies that speak of no result by name."""
PARTS = ("save", "offload")
FORMS = "none, dots, full, or by name: 'save:attention', 'save:attention,mlp offload:project'"


@dataclass(frozen=True)
class Remat:
    """A remat policy, read.

    "none" keeps everything that the backward pass needs, "dots" products of parameters and activations only, "full" each
    layer's input only. By name, "save:WORD,WORD" keeps the results of named ops that a word names, "offload:WORD,WORD"
    keeps them in host memory, both may stand together, and everything else is computed again. A word is an op (attention,
    einsum, project, rms_norm ...: every result of it) or the name of a dim (mlp: every result that has the dim). A result
    that both parts name goes by the part that comes first.
    """

    text: str
    parts: tuple[tuple[Literal["save", "offload"], frozenset[str]], ...]
    """Of a policy by name: what becomes of results that have one of these words, first part first; else empty."""

    @property
    def words(self) -> frozenset[str]:
        """Every word of a policy by name."""
        return frozenset().union(*(words for _, words in self.parts))

    @property
    def offloads(self) -> bool:
        """Whether it puts something in host memory."""
        return any(how == "offload" for how, _ in self.parts)

    def of(self, mark: str) -> Literal["save", "offload", "drop"]:
        """What becomes of the result that bears `mark`, "OP:NAME NAME", under a policy by name."""
        op, _, names = mark.partition(":")
        own = frozenset((op, *names.split()))
        for how, words in self.parts:
            if own & words:
                return how
        return "drop"


def parse_remat(text: str) -> Remat:
    """The policy that a text means. Raises InputError for one that means none."""
    if text in WHOLE:
        return Remat(text, ())
    parts: list[tuple[Literal["save", "offload"], frozenset[str]]] = []
    for part in text.split() if isinstance(text, str) else ():
        how, colon, words = part.partition(":")
        named = words.split(",")
        if how not in PARTS or not colon or not all(w.isidentifier() for w in named):
            parts.clear()
            break
        parts.append((how, frozenset(named)))
    if not parts:
        raise InputError(f"The remat policy {text!r} does not exist. The policies are {FORMS}. Change remat.")
    for how in PARTS:
        if sum(own == how for own, _ in parts) > 1:
            raise InputError(
                f"The remat policy {text!r} has {how}: twice. Join its words by commas, without spaces."
            )
    if len(parts) == 2 and parts[0][1] & parts[1][1]:
        twice = ", ".join(sorted(parts[0][1] & parts[1][1]))
        raise InputError(
            f"The remat policy {text!r} both saves and offloads {twice}. Take it from one of the two."
        )
    return Remat(text, tuple(parts))
