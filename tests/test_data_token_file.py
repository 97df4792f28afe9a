"""Token files: what is written is read back, and each kind of damage is an error that says what to do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.store import token_file
from experiments.data.store.token_file import HEADER_BYTES, open_token_file, token_dtype
from experiments.data.store.token_writer import TokenWriter
from sharding.errors import InputError


def write(path: Path, documents: list[list[int]], vocab: int) -> Path:
    with TokenWriter(path, vocab) as writer:
        for document in documents:
            writer.add(np.array(document, np.int64), b"x" * len(document))
            writer.end_document(0)
    return path


@settings(max_examples=40)
@given(
    documents=st.lists(st.lists(st.integers(0, 255), max_size=20), min_size=1, max_size=6),
    vocab=st.sampled_from([256, 257, 65536, 65537]),
)
def test_round_trip(documents: list[list[int]], vocab: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    documents[0].append(vocab - 1)
    folder = tmp_path_factory.mktemp("tokens")
    opened = open_token_file(write(folder / "a.tokens", documents, vocab))
    opened.verify()
    assert opened.tokens.dtype == token_dtype(vocab)
    flat = [i for document in documents for i in [*document, 0]]
    assert opened.tokens.tolist() == flat
    for number, document in enumerate(documents):
        assert opened.tokens[opened.offsets[number] : opened.offsets[number + 1]].tolist() == [*document, 0]
    text = b"".join(b"x" * len(document) + b"\0" for document in documents)
    assert opened.header.text_sha256 == hashlib.sha256(text).hexdigest()
    assert opened.header.text_bytes == len(text)
    payload = opened.tokens.astype(token_dtype(vocab)).tobytes()
    assert opened.header.payload_sha256 == hashlib.sha256(payload).hexdigest()
    assert [path.name for path in folder.iterdir()] == ["a.tokens"]  # no temporary file is left


def test_the_layout_on_disk_is_little_endian(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.tokens", [[1, 0x0102]], 1000).read_bytes()
    assert raw[:8] == b"SHRDTOKS"
    assert raw[8:20] == bytes([1, 0, 0, 0, 2, 0, 0, 0, 0xE8, 3, 0, 0])
    assert raw[HEADER_BYTES:] == bytes([1, 0, 2, 1, 0, 0, 0, 0]) + bytes(8) + bytes([3]) + bytes(7)


@pytest.mark.parametrize(("vocab", "dtype"), [(256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")])
def test_the_narrowest_dtype_is_chosen(vocab: int, dtype: str) -> None:
    assert token_dtype(vocab) == np.dtype(f"<{dtype}")


@pytest.mark.parametrize("vocab", [0, -3, 2**31 + 1])
def test_an_impossible_vocabulary(vocab: int) -> None:
    with pytest.raises(InputError, match=f"vocabulary of {vocab}"):
        token_dtype(vocab)


def test_an_id_beyond_the_vocabulary_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"id 300 does not fit the vocabulary of 256"):
        write(tmp_path / "a.tokens", [[1], [300]], 256)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty"):
        write(tmp_path / "a.tokens", [], 256)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens", [[1, 2, 3]], 256)
    before = path.read_bytes()
    with pytest.raises(InputError), TokenWriter(path, 256) as writer:
        writer.add(np.array([7, 256]), b"xx")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def flip(at: int) -> Callable[[bytes], bytes]:
    def damaged(raw: bytes) -> bytes:
        out = bytearray(raw)
        out[at] ^= 4
        return bytes(out)

    return damaged


DAMAGE: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("an empty file", lambda raw: b"", "is not a token file"),
    ("a foreign file", lambda raw: b"\x80\x04pickle me" + raw, "is not a token file"),
    ("half a header", lambda raw: raw[:100], "truncated: 100 bytes"),
    ("a newer version", lambda raw: raw[:8] + b"\2" + raw[9:], "format version 2"),
    ("a flipped bit in the vocabulary", flip(16), "header of token file .* is corrupt"),
    ("a flipped bit in the count", flip(24), "header of token file .* is corrupt"),
    ("a flipped bit in the seal", flip(HEADER_BYTES - 1), "header of token file .* is corrupt"),
    ("one byte short", lambda raw: raw[:-1], "truncated: 1287 bytes on disk, .* make 1288"),
    ("one byte long", lambda raw: raw + b"x", "too long: 1289 bytes on disk, .* make 1288"),
    ("a flipped bit in a token", flip(HEADER_BYTES + 500), "its tokens hash to"),
    ("a flipped bit in an offset", flip(-8), "its document offsets hash to"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE, ids=[case[0] for case in DAMAGE])
def test_damage_is_found_at_open(
    name: str, damage: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.tokens", [list(range(200)) * 5, [3] * 5], 256)
    assert path.stat().st_size == 256 + 1007 + 1 + 3 * 8
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        open_token_file(path)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no token file at .*shardlab tokenize"):
        open_token_file(tmp_path / "a.tokens")


def test_a_large_payload_is_hashed_on_verify_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "CHEAP_BYTES", 10)
    path = write(tmp_path / "a.tokens", [list(range(100))], 256)
    path.write_bytes(flip(HEADER_BYTES + 50)(path.read_bytes()))
    opened = open_token_file(path)
    with pytest.raises(InputError, match="its tokens hash to"):
        opened.verify()
