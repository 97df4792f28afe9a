"""A dataset of windows over a pair of token files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.contract import Dataset, RowSpec, Split
from experiments.data.store.remembered import remembered
from experiments.data.store.statistics import XZ_BYTES, TextStatistics
from experiments.data.store.token_file import TokenFile, open_token_file
from experiments.data.store.tokenizer import load_tokenizer
from sharding.errors import InputError


class WindowDataset(Dataset):
    """Window i of a token file is tokens i*L .. i*L + L + 1 (one more than L, shared with the next window):
    `tokens` its first L, `labels` its last L, `weights` 1. A rest too short for a window is not used.
    """

    def __init__(self, folder: Path, length: int):
        """Open `folder` as written by `prepare`, with windows of `length` tokens. InputError for a bad folder."""
        if length < 1:
            raise InputError(f"Asked for windows of {length} tokens; the length must be at least 1.")
        self.folder = folder = Path(folder)
        facts = _read_facts(folder)
        self.files = {split: _open_side(folder, split, facts) for split in ("train", "heldout")}
        bpe = facts["tokenizer"] != "bytes"
        self.tokenizer = load_tokenizer(folder / "tokenizer.json" if bpe else "bytes")
        if self.tokenizer.vocab != facts["vocab"]:
            raise InputError(
                f"{folder}/tokenizer.json has {self.tokenizer.vocab} tokens but the token files were written with "
                f"{facts['vocab']}: it is another tokenizer. Build the folder again."
            )
        self.length = length
        self.separator = self.tokenizer.separator
        self.train_rows, self.heldout_rows = (self._count(split) for split in ("train", "heldout"))
        self.inputs = {
            "tokens": RowSpec((length,), "int32"),
            "labels": RowSpec((length,), "int32"),
            "weights": RowSpec((length,), "float32"),
        }
        self._train_byte_counts = np.array(facts.pop("train_byte_counts"), np.int64)
        self.facts = facts
        self.bytes_per_token_heldout = facts["heldout_bytes"] / facts["heldout_tokens"]

    def gather(self, split: Split, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Windows `indices` of a split: tokens and labels int32 [n, length], weights float32 [n, length]."""
        starts = np.asarray(indices, np.int64)[:, None] * self.length
        windows = self.files[split].tokens[starts + np.arange(self.length + 1)].astype(np.int32)
        weights = np.ones((len(windows), self.length), np.float32)
        return {"tokens": windows[:, :-1].copy(), "labels": windows[:, 1:].copy(), "weights": weights}

    def heldout_facts(self, rows: int) -> dict[str, Any]:
        """What the labels of the first `rows` held-out windows stand for: `tokens`, `bytes`, `bytes_per_token`, and what
        simple models make of these very bytes, as `TextStatistics.facts` says it; xz of up to XZ_BYTES only. Measured
        once, then read from the folder.

        `tokens` alone and `no_bits_per_byte`, the reason, where the tokenizer does not give back the text that it was
        given: how many bytes these tokens were made from is not known then.
        """
        runs = self.heldout_labels(min(rows, self.heldout_rows))
        if why := self._changes_text():
            return {"tokens": sum(map(len, runs)), "no_bits_per_byte": why}
        labels = hashlib.sha256(
            b"".join(hashlib.sha256(np.ascontiguousarray(run).data).digest() for run in runs)
        )
        of = [
            "heldout_facts",
            labels.hexdigest(),
            self._train_byte_counts.tolist(),
            self.tokenizer.fingerprint,
            XZ_BYTES,
        ]
        return remembered(self.folder, of, lambda: self._measured(runs))

    def _measured(self, runs: list[np.ndarray]) -> dict[str, float]:
        tokens, text = sum(map(len, runs)), b"".join(map(self.tokenizer.text, runs))
        statistics = TextStatistics("xz" if len(text) <= XZ_BYTES else "none")
        statistics.add(text)
        sizes = {"tokens": tokens, "bytes": len(text), "bytes_per_token": len(text) / tokens}
        return sizes | statistics.facts(self._train_byte_counts)

    def _changes_text(self) -> str:
        """Why the bytes that held-out tokens were made from are not known; an empty string if they are."""
        changed, whole = self.facts.get("heldout_changed_bytes"), self.facts["heldout_bytes"]
        if self.facts["tokenizer"] == "bytes" or changed == 0:
            return ""
        if changed is None:
            return f"{self.folder} does not say whether its tokenizer gives its text back: remove it and write it again"
        return (
            f"the tokenizer does not give its text back ({changed:,} of {whole:,} held-out bytes lie in pieces that come "
            "back changed), so how many bytes a token stands for is not known"
        )

    def heldout_labels(self, rows: int) -> list[np.ndarray]:
        """The labels of the first `rows` held-out rows in stretches of running text, each (n,)."""
        return [self.files["heldout"].tokens[1 : rows * self.length + 1]]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without a separator. InputError for text with NUL."""
        if "\0" in text:
            raise InputError("Text may not contain NUL characters: they separate documents.")
        return [int(i) for i in self.tokenizer.encode(text.encode("utf-8"))]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; separators read as U+2404, broken UTF-8 as U+FFFD."""
        return self.tokenizer.decode(ids)

    def verify(self) -> None:
        """Hash both token files whole, whatever their size; InputError when one is corrupt."""
        for file in self.files.values():
            file.verify()

    def _count(self, split: str) -> int:
        tokens = self.files[split].header.tokens
        if (windows := (tokens - 1) // self.length) < 1:
            raise InputError(
                f"The {split} side of {self.files[split].path.parent} has {tokens} tokens; one window of length "
                f"{self.length} needs {self.length + 1}. Use a shorter length or more text."
            )
        return windows


def _open_side(folder: Path, split: str, facts: dict[str, Any]) -> TokenFile:
    """One token file, checked against the facts beside it."""
    opened = open_token_file(folder / f"{split}.tokens")
    head = opened.header
    found = (head.payload_sha256, head.tokens, head.vocab, head.text_bytes)
    expected = tuple(
        facts[k] for k in (f"{split}_payload_sha256", f"{split}_tokens", "vocab", f"{split}_bytes")
    )
    if found != expected:
        raise InputError(
            f"{opened.path} does not belong to the facts.json beside it: it has {found[1]} tokens (sha256 "
            f"{found[0][:16]}..., vocab {found[2]}) of {found[3]} bytes, facts.json says {expected[1]} "
            f"({str(expected[0])[:16]}..., vocab {expected[2]}) of {expected[3]}. Build the folder again."
        )
    return opened


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / "facts.json"
    if not path.is_file():
        raise InputError(
            f"{folder} is no folder of token files: it has no facts.json. "
            "Write one with `shardlab tokenize SOURCE --out DIR`."
        )
    needed = {"tokenizer", "vocab", "train_byte_counts"} | {
        f"{split}_{what}" for split in ("train", "heldout") for what in ("payload_sha256", "tokens", "bytes")
    }
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        missing = sorted(needed - set(facts))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}). Build the folder again.") from error
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}. Build the folder again.")
    _check_figures(path, facts)
    return facts


def _check_figures(path: Path, facts: Any) -> None:
    """Refuse, with InputError, figures that a run would fail with later; the token files' own are compared with them."""
    if not isinstance(facts, dict):
        raise InputError(
            f"{path} holds a JSON {type(facts).__name__}, not an object. Build the folder again."
        )
    counts = facts["train_byte_counts"]
    whole = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
    if not whole or len(counts) != 256 or sum(counts) != facts["train_bytes"]:
        raise InputError(
            f"train_byte_counts in {path} are not 256 whole numbers of at least 0 that add up to train_bytes = "
            f"{facts['train_bytes']!r}. Build the folder again."
        )
    changed = facts.get("heldout_changed_bytes", 0)
    if type(changed) is not int or changed < 0:
        raise InputError(
            f"heldout_changed_bytes in {path} is {changed!r}, but it is a whole number of at least 0. Build the folder "
            "again."
        )
    for name, value in facts.items():
        if name.endswith("_bits_per_byte") and (type(value) not in (int, float) or not 0 <= value < math.inf):
            raise InputError(
                f"{name} in {path} is {value!r}, but it is a number of at least 0. Build the folder again."
            )
