"""Text to windows: pieces, passages, the held-out split, windows and the cache."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from experiments.data.store import pieces, prepare, remembered, windows
from experiments.data.store.pieces import passages
from experiments.data.store.split import heldout_files, place
from experiments.data.store.statistics import TextStatistics, cross_entropy_bits, entropy_bits
from experiments.data.store.tokenizer import ByteTokenizer, train_bpe
from experiments.data.store.windows import WindowDataset
from experiments.data.text import Text
from experiments.data.tokens import Tokens
from sharding.errors import InputError

REPO = Path(__file__).parents[1]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """30 short files in nested folders, one hidden, one empty."""
    folder = tmp_path / "notes"
    for number in range(30):
        path = folder / f"part{number % 3}" / f"note{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"This is note {number}, naïve and short.\n" * (5 + number), encoding="utf-8")
    (folder / ".hidden.txt").write_text("secret", encoding="utf-8")
    (folder / "empty.txt").touch()
    return folder


def text_of(dataset: WindowDataset, split: str) -> bytes:
    return dataset.files[split].tokens.tobytes()


def test_each_file_lies_whole_on_one_side(notes: Path, tmp_path: Path) -> None:
    dataset = Text(path=str(notes), length=16).open(tmp_path / "cache")
    names = [f"part{n % 3}/note{n:02}.txt" for n in range(30)]
    heldout = heldout_files(names)
    for split in ("train", "heldout"):
        mine = sorted(name for name in names if (name in heldout) == (split == "heldout"))
        expected = b"".join((notes / name).read_bytes() + b"\0" for name in mine)
        assert text_of(dataset, split) == expected
        assert dataset.facts[f"{split}_files"] == len(mine) > 0
        assert dataset.facts[f"{split}_bytes"] == len(expected)
    assert dataset.bytes_per_token_heldout == 1.0


@given(length=st.integers(1, 300), seed=st.integers(0, 50))
def test_windows_cover_the_tokens(length: int, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "shared-tokens"
    if not folder.exists():
        small = tmp_path_factory.mktemp("small")
        os.rename(Tokens.example(small).folder, folder)
    dataset = WindowDataset(folder, length)
    tokens = dataset.files["train"].tokens
    assert dataset.train_rows == (len(tokens) - 1) // length
    natural = dataset.gather("train", np.arange(dataset.train_rows))
    covered = dataset.train_rows * length
    assert np.array_equal(natural["tokens"].reshape(-1), tokens[:covered])
    assert np.array_equal(natural["labels"].reshape(-1), tokens[1 : covered + 1])
    assert (natural["weights"] == 1).all()
    epoch = dataset.rows("train", seed, 0, dataset.train_rows, 0, dataset.train_rows)
    assert np.array_equal(
        np.sort(epoch["tokens"] @ np.arange(1, length + 1)),
        np.sort(natural["tokens"] @ np.arange(1, length + 1)),
    )


@example(text="\U00010000é\u2713" * 9, target=1)
@example(text="\U00010000é\u2713" * 9, target=4)
@given(
    text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), target=st.integers(1, 40)
)
def test_passages_are_the_text_and_valid_utf8(text: str, target: int) -> None:
    raw = (text * 3).encode()
    cut = list(passages([text.encode(), (text * 2).encode()], target))
    assert b"".join(cut) == raw
    assert "".join(passage.decode() for passage in cut) == text * 3
    assert all(target <= len(passage) <= 2 * target + 3 for passage in cut[:-1])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_small_reads_give_the_same_text(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "é line one\nline twö\n\nno newline at the end: " + "ü" * 50
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 7)
    assert b"".join(pieces.read_pieces(path, encoding)) == text.encode()


def test_a_single_file_is_split_by_passage(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Paragraph {i} of the book.\n\n" for i in range(2000)), encoding="utf-8")
    dataset = Text(path=str(path), length=16).open(tmp_path / "cache")
    joined = b"".join(text_of(dataset, split).replace(b"\0", b"") for split in ("train", "heldout"))
    assert sorted(joined.split(b"\n\n")) == sorted(path.read_bytes().split(b"\n\n"))
    share = dataset.facts["heldout_bytes"] / path.stat().st_size
    assert 0.03 < share < 0.12
    assert dataset.facts["split_by"].startswith("passage")


@given(names=st.sets(st.text("abcdef/.", min_size=1), min_size=2, max_size=40))
def test_the_split_has_two_sides_and_is_stable(names: set[str]) -> None:
    heldout = heldout_files(sorted(names))
    assert 0 < len(heldout) < len(names)
    assert heldout == heldout_files(sorted(names, reverse=True))
    for name in heldout_files([*names, "one more", "and another"]) & names:
        assert name in heldout or place(name) > min(map(place, names))


def test_about_seven_percent_of_files_are_held_out() -> None:
    assert 0.06 < len(heldout_files([f"dir/{i}.py" for i in range(5000)])) / 5000 < 0.083


def test_statistics_against_their_definitions(notes: Path, tmp_path: Path) -> None:
    dataset = Text(path=str(notes), length=16).open(tmp_path / "cache")
    train, heldout = (text_of(dataset, split) for split in ("train", "heldout"))
    q = {b: (train.count(b) + 1) / (len(train) + 256) for b in set(heldout)}
    assert dataset.facts["heldout_unigram_bits_per_byte"] == pytest.approx(
        -np.mean([np.log2(q[b]) for b in heldout])
    )
    p = {b: heldout.count(b) / len(heldout) for b in set(heldout)}
    own = -np.mean([np.log2(p[b]) for b in heldout])
    assert dataset.facts["heldout_entropy_bits_per_byte"] == pytest.approx(own)
    packed = len(lzma.compress(heldout, preset=6))
    assert dataset.facts["heldout_xz_bits_per_byte"] == pytest.approx(8 * packed / len(heldout))


def test_what_is_told_of_the_first_heldout_rows_is_of_their_labels_alone(notes: Path, tmp_path: Path) -> None:
    dataset = Text(path=str(notes), length=16).open(tmp_path / "cache")
    train = text_of(dataset, "train")
    assert dataset.heldout_rows > 5
    for rows in (1, 5, dataset.heldout_rows):
        got = dataset.heldout_facts(rows)
        text = bytes(dataset.gather("heldout", np.arange(rows))["labels"].ravel().tolist())
        q = {b: (train.count(b) + 1) / (len(train) + 256) for b in set(text)}
        assert got["tokens"] == got["bytes"] == got["xz_bytes"] == 16 * rows
        assert got["unigram_bits_per_byte"] == pytest.approx(-np.mean([np.log2(q[b]) for b in text]))
        assert got["xz_bits_per_byte"] == pytest.approx(8 * len(lzma.compress(text, preset=6)) / len(text))
    assert dataset.heldout_facts(10**9) == got, "rows past the end are not evaluated"


def test_of_more_text_than_xz_reads_in_seconds_no_xz_is_told(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Text(path=str(notes), length=16).open(tmp_path / "cache")
    monkeypatch.setattr(windows, "XZ_BYTES", 32)
    assert "xz_bits_per_byte" in dataset.heldout_facts(2)
    assert not {"xz_bits_per_byte", "xz_bytes"} & set(dataset.heldout_facts(3))


def test_what_is_told_of_heldout_rows_is_measured_once_a_text(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    class Counted(TextStatistics):
        def __init__(self, compress: str = "none"):
            measured.append(compress)
            super().__init__(compress)

    def told(rows: int) -> dict[str, float]:
        """As a process that has just started."""
        return Text(path=str(notes), length=16).open(tmp_path / "cache").heldout_facts(rows)

    monkeypatch.setattr(windows, "TextStatistics", Counted)
    first = told(5)
    assert [told(5), told(5)] == [first, first]
    assert measured == ["xz"]
    assert told(2)["xz_bits_per_byte"] != first["xz_bits_per_byte"]
    assert measured == ["xz"] * 2
    (kept,) = [p for p in (tmp_path / "cache").rglob("measured-*.json") if '"bytes": 80,' in p.read_text()]
    whole = kept.read_text()
    for damaged in (
        "",
        "[]",
        "{",
        whole.replace('"xz_bytes": 80', '"xz_bytes": 81'),
        whole.replace("80", "null"),
        '{"sha256": "0", "figures": null}',
        '{"sha256": "0", "figures": [1]}',
        "[1]",
        '"text"',
        whole.replace("80", "8" + 400 * "0"),
        whole.replace("80", "8" + 5000 * "0"),
        200_000 * "[",
        '{"sha256": "0", "figures": ' + 900 * "[" + 900 * "]" + "}",
    ):
        assert damaged != whole
        kept.write_text(damaged)
        assert told(5) == first
        assert kept.read_text() == whole
    assert measured == ["xz"] * 15
    (notes / "part0" / "note00.txt").write_text("Another text of this name.\n" * 40, encoding="utf-8")
    other = told(5)
    assert len(measured) == 16
    assert other["unigram_bits_per_byte"] != first["unigram_bits_per_byte"]


def test_figures_measured_by_another_format_are_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert remembered.remembered(tmp_path, ["text"], lambda: {"bytes": 1}) == {"bytes": 1}
    assert remembered.remembered(tmp_path, ["text"], lambda: {"bytes": 2}) == {"bytes": 1}
    monkeypatch.setattr(remembered, "FORMAT", remembered.FORMAT + 1)
    assert remembered.remembered(tmp_path, ["text"], lambda: {"bytes": 2}) == {"bytes": 2}


def test_a_folder_that_cannot_be_written_tells_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Tokens.example(tmp_path).open(tmp_path)
    there = sorted(tmp_path.rglob("*"))

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", refuse)  # a user with root's rights may write into any folder
        refused = dataset.heldout_facts(3)
    assert sorted(tmp_path.rglob("*")) == there
    assert refused == dataset.heldout_facts(3)
    assert len(list(tmp_path.rglob("measured-*.json"))) == 1


def test_uniform_bytes_take_eight_bits() -> None:
    assert entropy_bits(np.full(256, 9)) == pytest.approx(8)
    assert cross_entropy_bits(np.full(256, 9), np.full(256, 3)) == pytest.approx(8)
    unseen = cross_entropy_bits(np.eye(256, dtype=np.int64)[0], np.eye(256, dtype=np.int64)[1] * 1000)
    assert unseen == pytest.approx(np.log2(1256))


def test_decode_inverts_encode_and_shows_separators(notes: Path, tmp_path: Path) -> None:
    dataset = Text(path=str(notes), length=16).open(tmp_path / "cache")
    assert dataset.decode(dataset.encode("naïve ✓")) == "naïve ✓"
    assert dataset.decode([65, dataset.separator, 66]) == "A\u2404B"
    with pytest.raises(InputError, match="id 256 is outside"):
        dataset.decode([256])
    with pytest.raises(InputError, match="NUL"):
        dataset.encode("a\0b")


def test_the_cache_is_reused_and_renewed_when_a_file_changes(notes: Path, tmp_path: Path) -> None:
    source, cache = Text(path=str(notes), length=16), tmp_path / "cache"
    first = source.open(cache)
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*.tokens")}
    source.open(cache)
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.tokens")} == before
    (notes / "part0" / "note00.txt").write_text("Now this note says something else.\n", encoding="utf-8")
    assert source.open(cache).facts["sha256"] != first.facts["sha256"]


def test_processes_that_build_one_cache_at_once_agree(notes: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from experiments.data.text import Text\n"
        f"d = Text(path={str(notes)!r}, length=16).open(Path({str(tmp_path / 'cache')!r}))\n"
        "d.verify(); print(d.facts['sha256'])"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    out = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(set(out)) == 1
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_without_locks_the_first_build_stays(notes: Path, tmp_path: Path) -> None:
    """Two builders of one folder, the second finishing after the first: what a file system without locks does."""
    corpus, folder = Text(path=str(notes)).corpus(), tmp_path / "built"
    facts = prepare.prepare(corpus, ByteTokenizer(), folder)
    stamp = (folder / "facts.json").stat().st_mtime_ns
    assert prepare.prepare(corpus, ByteTokenizer(), folder) == facts
    assert (folder / "facts.json").stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir() if "building" in p.name] == []


def test_a_killed_build_is_cleared_away(notes: Path, tmp_path: Path) -> None:
    source, cache = Text(path=str(notes), length=16), tmp_path / "cache"
    key = source.corpus().key("bytes")
    stale = cache / f".{source.corpus().name}-{key}.building-dead"
    stale.mkdir(parents=True)
    (stale / "train.tokens").write_bytes(b"half")
    source.open(cache)
    assert not stale.exists()


CHANGING: dict[str, dict[str, Any]] = {
    "lower case": {"normalizer": {"type": "Lowercase"}},
    "words": {
        "model": {
            "type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"<|endoftext|>": 0, "<unk>": 1, "This": 2, "is": 3, "note": 4, "na\u00efve": 5, "short": 6},
        },
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    },
    "bytes as letters": {"decoder": None},
}  # fmt: skip
"""Parts of a tokenizer's file with which it does not give its text back."""


class TestBPE:
    @pytest.fixture
    def bpe(self, notes: Path, tmp_path: Path) -> WindowDataset:
        source = Text(path=str(notes), length=8)
        tokenizer = train_bpe((p for d in source.corpus().documents() for p in d.pieces()), 300)
        (tmp_path / "bpe.json").write_text(tokenizer.json, encoding="utf-8")
        return Text(path=str(notes), length=8, tokenizer=str(tmp_path / "bpe.json")).open(tmp_path / "cache")

    def test_tokens_stand_for_the_same_text(self, bpe: WindowDataset, notes: Path, tmp_path: Path) -> None:
        plain = Text(path=str(notes), length=8).open(tmp_path / "cache")
        for split in ("train", "heldout"):
            text = text_of(plain, split).decode().replace("\0", "\u2404")
            assert bpe.decode(np.asarray(bpe.files[split].tokens)) == text
        assert bpe.facts["sha256"] == plain.facts["sha256"]
        assert bpe.facts["heldout_unigram_bits_per_byte"] == plain.facts["heldout_unigram_bits_per_byte"]
        assert (
            bpe.bytes_per_token_heldout == plain.facts["heldout_tokens"] / bpe.facts["heldout_tokens"] > 1.5
        )
        assert bpe.files["train"].tokens.dtype == np.uint16

    def test_what_is_told_of_heldout_rows_counts_the_bytes_of_their_tokens(
        self, bpe: WindowDataset, notes: Path, tmp_path: Path
    ) -> None:
        plain = Text(path=str(notes), length=8).open(tmp_path / "cache")
        whole, train_text = text_of(plain, "heldout"), text_of(plain, "train")
        train = np.bincount(list(train_text), minlength=256)
        before = len(bpe.tokenizer.text(bpe.files["heldout"].tokens[:1]))
        for rows in (1, 7, bpe.heldout_rows):
            got, labels = bpe.heldout_facts(rows), bpe.gather("heldout", np.arange(rows))["labels"]
            text = whole[before : before + int(got["bytes"])]
            assert bpe.decode(labels.ravel()) == text.decode().replace("\0", "\u2404")
            assert got["tokens"] == labels.size
            assert got["bytes_per_token"] == len(text) / labels.size
            assert got["xz_bits_per_byte"] == 8 * len(lzma.compress(text, preset=6)) / len(text)
            counts = np.bincount(list(text), minlength=256)
            assert got["unigram_bits_per_byte"] == cross_entropy_bits(counts, train)
        assert bpe.tokenizer.text(bpe.files["train"].tokens) == train_text
        assert train_text.count(b"\0") > 1

    @pytest.mark.parametrize("kind", ["lower case", "words", "bytes as letters"])
    def test_where_a_tokenizer_changes_its_text_no_bytes_are_told(
        self, kind: str, bpe: WindowDataset, notes: Path, tmp_path: Path
    ) -> None:
        """Lower case has as many bytes as what it was made from, and yet is another text."""
        told = TestBPE.changed_by(CHANGING[kind], notes, tmp_path)
        facts, got = told.facts, told.heldout_facts(3)
        assert got["tokens"] == 24
        assert set(got) == {"tokens", "no_bits_per_byte"}
        assert (
            f"{facts['heldout_changed_bytes']:,} of {facts['heldout_bytes']:,} held-out bytes"
            in got["no_bits_per_byte"]
        )
        assert facts["heldout_bytes"] == bpe.facts["heldout_bytes"]
        assert told.bytes_per_token_heldout == facts["heldout_bytes"] / facts["heldout_tokens"], (
            "of the real text"
        )
        assert not list(tmp_path.rglob("measured-*.json"))

    def test_a_normalizer_that_leaves_this_text_as_it_is_does_no_harm(
        self, bpe: WindowDataset, notes: Path, tmp_path: Path
    ) -> None:
        nfc = TestBPE.changed_by({"normalizer": {"type": "NFC"}}, notes, tmp_path)
        assert nfc.facts["heldout_changed_bytes"] == 0
        assert nfc.heldout_facts(7) == bpe.heldout_facts(7)

    def test_token_files_that_do_not_say_so_tell_no_bytes(self, bpe: WindowDataset) -> None:
        path = bpe.folder / "facts.json"
        facts = json.loads(path.read_text())
        assert facts.pop("heldout_changed_bytes") == 0
        path.write_text(json.dumps(facts))
        assert (
            "remove it and write it again"
            in WindowDataset(bpe.folder, 8).heldout_facts(2)["no_bits_per_byte"]
        )

    @staticmethod
    def changed_by(change: dict[str, Any], notes: Path, tmp_path: Path) -> WindowDataset:
        """The notes in the tokens of the fixture's BPE with parts of its file changed."""
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(json.loads((tmp_path / "bpe.json").read_text()) | change))
        return Text(path=str(notes), length=8, tokenizer=str(path)).open(tmp_path / "cache")

    @pytest.mark.parametrize("kind", ["truncation", "padding"])
    def test_a_tokenizer_made_for_inputs_of_one_length_loses_and_adds_nothing(
        self, kind: str, bpe: WindowDataset, notes: Path, tmp_path: Path
    ) -> None:
        made = tokenizers.Tokenizer.from_str((tmp_path / "bpe.json").read_text())
        if kind == "truncation":
            made.enable_truncation(max_length=16)
        else:
            made.enable_padding(length=5000, pad_id=0, pad_token="<|endoftext|>")
        text = (notes / "part0" / "note27.txt").read_text(encoding="utf-8")
        assert len(made.encode(text).ids) in (16, 5000)
        path = tmp_path / "made.json"
        made.save(str(path))
        told = Text(path=str(notes), length=8, tokenizer=str(path)).open(tmp_path / "cache")
        assert f'"{kind}":null' not in path.read_text().replace(" ", "")
        for split in ("train", "heldout"):
            assert np.array_equal(told.files[split].tokens, bpe.files[split].tokens)
        assert told.encode(text) == bpe.encode(text)
        assert told.facts["heldout_changed_bytes"] == 0

    def test_text_cannot_forge_a_document_boundary(self, bpe: WindowDataset) -> None:
        ids = bpe.encode("a<|endoftext|>b")
        assert bpe.separator not in ids
        assert bpe.decode(ids) == "a<|endoftext|>b"

    def test_another_tokenizer_beside_the_tokens(self, bpe: WindowDataset) -> None:
        folder = bpe.files["train"].path.parent
        (folder / "tokenizer.json").write_text(train_bpe([b"abc abc"], 258).json, encoding="utf-8")
        with pytest.raises(InputError, match="it is another tokenizer"):
            WindowDataset(folder, 8)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_one_small_file_in_any_encoding_has_a_held_out_side(encoding: str, tmp_path: Path) -> None:
    for number in range(6):
        file = tmp_path / f"{number}.txt"
        file.write_bytes("".join(f"line {n} of some words\n" for n in range(300)).encode(encoding))
        dataset = Text(path=str(file), length=16, encoding=encoding).open(tmp_path / "cache")
        assert text_of(dataset, "heldout")
