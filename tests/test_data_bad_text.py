"""Each bad corpus, cache or token folder is an error that names it, with its numbers, and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.data.jargon import JargonFile
from experiments.data.text import Text
from experiments.data.tokens import Tokens
from sharding.errors import InputError


def broken_gzip(folder: Path) -> Text:
    (folder / "a.gz").write_bytes(gzip.compress(b"text " * 999)[:-20])
    return Text(path=str(folder / "a.gz"))


def bad_byte(folder: Path) -> Text:
    (folder / "a.txt").write_bytes(b"good\n" * 300_000 + b"caf\xe9\n")
    return Text(path=str(folder))


def with_file(raw: bytes, **arguments: object) -> Callable[[Path], Text]:
    def make(folder: Path) -> Text:
        (folder / "a.txt").write_bytes(raw)
        return Text(**{"path": str(folder / "a.txt"), **arguments})  # type: ignore[arg-type]

    return make


BAD = [
    ("a missing path", lambda folder: Text(path=str(folder / "nowhere")), "no text at .*nowhere"),
    ("a missing folder in a pattern", lambda folder: Text(path=str(folder / "no/*.txt")), "does not exist"),
    ("an empty folder", lambda folder: Text(path=str(folder)), "the corpus is empty"),
    ("a pattern that matches nothing", lambda folder: Text(path=str(folder / "*.md")), "the corpus is empty"),
    ("an empty file", with_file(b""), "the corpus is empty"),
    ("one byte", with_file(b"x"), "is empty on its (train|heldout) side: 1 files, 1 bytes"),
    ("a byte that is not UTF-8", bad_byte, r"a.txt is not utf-8 text: byte e9 at offset 1500003"),
    ("a character cut short", with_file("é".encode()[:1]), "is not utf-8 text: byte c3 at offset 0"),
    ("NUL", with_file(b"ab\0c"), "a.txt holds a NUL byte at offset 2"),
    ("an unknown encoding", with_file(b"abc", encoding="klingon"), "no text encoding 'klingon'"),
    ("an encoding of bytes", with_file(b"YWJj", encoding="base64"), "no text encoding 'base64'"),
    ("an encoding of text as text", with_file(b"abc", encoding="rot13"), "no text encoding 'rot13'"),
    ("an encoding with NUL", with_file(b"abc", encoding="a\0b"), "no text encoding"),
    ("an empty path", lambda folder: Text(path=""), "path of the text is empty"),
    ("a damaged archive", broken_gzip, "a.gz is damaged"),
    ("text too short for a window", with_file(b"word " * 50), "one window of length 256 needs 257"),
    ("a length of zero", with_file(b"word " * 500, length=0), "length must be at least 1"),
    ("a missing tokenizer", with_file(b"abc", tokenizer="none.json"), "no tokenizer at none.json"),
    ("a Debian package", lambda folder: JargonFile(root=str(folder)), "apt-get install dict-jargon"),
    ("a token folder of no name", lambda folder: Tokens(folder=""), "folder of token files is empty text"),
    ("a missing token folder", lambda folder: Tokens(folder=str(folder)), "has no facts.json"),
]


@pytest.mark.parametrize(("name", "make", "message"), BAD, ids=[case[0] for case in BAD])
def test_bad_input(name: str, make: Callable[[Path], Text | Tokens], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    with pytest.raises(InputError, match=message):
        make(folder).open(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(".*building*"))
    assert not list((tmp_path / "cache").glob("*/facts.json")) or "window" in message or "length" in message


FACTS: list[tuple[str, Callable[[dict], object], str]] = [
    ("no JSON", lambda facts: None, "is not readable JSON"),
    ("a missing fact", lambda facts: {k: v for k, v in facts.items() if k != "vocab"}, "lacks vocab"),
    (
        "facts of an older form",
        lambda facts: {k: v for k, v in facts.items() if k != "train_byte_counts"},
        "lacks train_byte_counts. Build the folder again",
    ),
    (
        "other facts",
        lambda facts: {**facts, "train_payload_sha256": "0" * 64},
        "does not belong to the facts",
    ),
    (
        "bytes that are text",
        lambda facts: {**facts, "heldout_bytes": "abc"},
        "of abc. Build the folder again",
    ),
    ("bytes that are null", lambda facts: {**facts, "heldout_bytes": None}, "of None. Build"),
    ("no bytes", lambda facts: {**facts, "heldout_bytes": 0}, "of 0. Build the folder again"),
    ("a list", list, "holds a JSON list"),
    (
        "changed bytes below 0",
        lambda facts: {**facts, "heldout_changed_bytes": -1},
        "heldout_changed_bytes in .* is -1",
    ),
    ("a figure that is text", lambda facts: {**facts, "heldout_xz_bits_per_byte": "abc"}, "is 'abc', but"),
    (
        "counts that are no numbers",
        lambda facts: {**facts, "train_byte_counts": ["a"] * 256},
        "train_byte_counts in .*facts.json are not 256 whole numbers",
    ),
    (
        "counts of another text",
        lambda facts: {**facts, "train_byte_counts": [1] * 256},
        "add up to train_bytes",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), FACTS, ids=[case[0] for case in FACTS])
def test_damaged_facts(name: str, change: Callable[[dict], object], message: str, tmp_path: Path) -> None:
    source = Tokens.example(tmp_path)
    path = Path(source.folder) / "facts.json"
    changed = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(changed) if changed else "{half", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        source.open(tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Cannot write to the cache folder"):
        Text.example(tmp_path).open(tmp_path / "file" / "cache")
