"""`shardlab tokenize`: what it writes trains, and what it cannot do it says."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.commands.tokenize import main
from experiments.data.contract import check
from experiments.data.tokens import Tokens
from sharding.errors import InputError


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"Note {number}: words, words, words.\n" * 60, encoding="utf-8")
    return folder


def test_bytes(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, result = tmp_path / "out", tmp_path / "result.json"
    assert main([str(notes), "--out", str(out), "--licence", "CC0-1.0", "--json", str(result)]) == 0
    dataset = Tokens(folder=str(out), length=16).open(tmp_path)
    check(dataset)
    counts = np.bincount(dataset.files["train"].tokens, minlength=256).tolist()
    whole = {**dataset.facts, "train_byte_counts": counts, "folder": str(out)}
    assert json.loads(result.read_text(encoding="utf-8")) == whole
    assert dataset.facts["licence"] == "CC0-1.0"
    shown = capsys.readouterr()
    assert f"{dataset.facts['train_tokens']:,} tokens" in shown.out
    assert "\x1b" not in shown.out + shown.err  # plain when piped


def test_the_folders_of_the_result_are_made(notes: Path, tmp_path: Path) -> None:
    result = tmp_path / "a" / "b" / "result.json"
    assert main([str(notes), "--out", str(tmp_path / "out"), "--json", str(result)]) == 0
    assert json.loads(result.read_text(encoding="utf-8"))["folder"] == str(tmp_path / "out")


def test_in_a_terminal_its_bar_ends_with_the_reader_as_everything_else_does(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich alone would leave with code 1 where the other end of the terminal is gone."""

    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(BrokenPipeError):
        main([str(notes), "--out", str(tmp_path / "out")])


def test_a_trained_bpe_and_its_reuse(notes: Path, tmp_path: Path) -> None:
    assert main([str(notes), "--out", str(tmp_path / "a"), "--train-bpe", "280"]) == 0
    first = Tokens(folder=str(tmp_path / "a"), length=8).open(tmp_path)
    check(first)
    assert first.facts["vocab"] <= 280
    tokenizer = str(tmp_path / "a" / "tokenizer.json")
    assert main([str(notes / "*.txt"), "--out", str(tmp_path / "b"), "--tokenizer", tokenizer]) == 0
    second = Tokens(folder=str(tmp_path / "b"), length=8).open(tmp_path)
    assert second.facts["train_payload_sha256"] == first.facts["train_payload_sha256"]


def test_the_bpe_is_trained_on_the_training_side_only(notes: Path, tmp_path: Path) -> None:
    """A word that only held-out files hold must not get a token of its own."""
    from experiments.data.store.split import heldout_files

    (held,) = list(heldout_files([f"{n}.txt" for n in range(12)]))[:1]
    (notes / held).write_text("zyxzyx " * 2000, encoding="utf-8")
    main([str(notes), "--out", str(tmp_path / "a"), "--train-bpe", "300"])
    assert "zyx" not in (tmp_path / "a" / "tokenizer.json").read_text(encoding="utf-8")


def test_a_source_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.data.jargon import JargonFile

    example = JargonFile.example(tmp_path)
    monkeypatch.setattr(JargonFile, "corpus", lambda self, real=JargonFile.corpus: real(example))
    assert main(["jargon", "--out", str(tmp_path / "out")]) == 0
    assert Tokens(folder=str(tmp_path / "out"), length=16).open(tmp_path).facts["name"] == "jargon"


def test_verify(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main([str(notes), "--out", str(out)])
    assert main([str(out), "--verify"]) == 0
    assert "both token files are whole" in capsys.readouterr().out
    raw = bytearray((out / "heldout.tokens").read_bytes())
    raw[300] ^= 1
    (out / "heldout.tokens").write_bytes(raw)
    with pytest.raises(InputError, match=r"heldout.tokens is corrupt"):
        main([str(out), "--verify"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuchname", "--out", "{out}"], "no text source of that name: gcide, jargon"),
        (["{notes}", "--out", "{notes}"], "exists already"),
        (["{notes}", "--out", "{out}", "--train-bpe", "100"], "at least 257 tokens"),
        (["{notes}", "--out", "{out}", "--tokenizer", "{notes}/1.txt"], "is not a tokenizer file"),
        (["{notes}", "--out", "{out}", "--tokenizer", "{bare}"], "no end-of-text token"),
        (["{notes}", "--out", "{notes}/1.txt/out"], "Cannot write the token files"),
        (["{notes}", "--out", "{out}", "--json", "{notes}/1.txt/x.json"], "--json .* cannot be written"),
        (["{notes}", "--out", "{out}", "--json", "{notes}"], "--json .* cannot be written"),
        (["{notes}", "--out", "{out}", "--encoding", "base64"], "no text encoding 'base64'"),
        (["{notes}", "--out", "{out}", "--encoding", "rot13"], "no text encoding 'rot13'"),
        (["{notes}", "--out", "{out}", "--tokenizer", "{latin}"], "latin.json cannot be read as UTF-8 text"),
        (["", "--out", "{out}"], "SOURCE is empty"),
        (["", "--verify"], "SOURCE is empty"),
        (["{fifo}", "--out", "{out}"], "fifo is neither a file nor a folder"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, notes: Path, tmp_path: Path) -> None:
    import tokenizers

    bare = tmp_path / "bare.json"
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(bare))
    latin, fifo = tmp_path / "latin.json", tmp_path / "fifo"
    latin.write_bytes(b'{"caf\xe9": 1}')
    os.mkfifo(fifo)
    places = {"notes": notes, "out": tmp_path / "out", "bare": bare, "latin": latin, "fifo": fifo}
    with pytest.raises(InputError, match=message):
        main([argument.format(**places) for argument in arguments])
    assert not (tmp_path / "out").exists(), "it is found before the work, not after it"


def test_out_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["somewhere"])
    assert caught.value.code == 2
    assert "--out DIR is needed" in capsys.readouterr().err
