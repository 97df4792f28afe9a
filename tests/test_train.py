"""`shardlab train` whole, on the shrunk quickstart: what it writes, that it can be run again, how it goes on."""

from __future__ import annotations

import contextlib
import json
import lzma
import math
import shutil
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from experiments import run_folder
from experiments.checkpoint_folder import seal, sealed_steps
from experiments.config import load
from experiments.records import read, scan
from sharding.errors import InputError
from tests.small import arrays, losses, only, place, shardlab, start, steps, until

pytestmark = pytest.mark.usefixtures("at_home")


@pytest.fixture(scope="module")
def whole(home: Path) -> tuple[Path, str]:
    """A run of all 8 steps, never stopped, by a process of its own; its folder and what it printed."""
    process = start(home, "train", "small.py", "--runs", "whole", "--json", "out/result.json")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return only(home / "whole"), said


def test_a_run_leaves_valid_records_that_fall(whole: tuple[Path, str]):
    run, _ = whole
    records = read(run / "records.jsonl")
    trained = losses(run)
    assert list(trained) == list(range(1, 9))
    assert trained[8] < trained[1] - 0.5
    header = records[0].header
    assert header.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
    assert header.device["kind"] == "pretend cpu"
    assert header.device["count"] == 8
    assert header.details["data"]["sha256"]
    assert {r.provenance for r in records} == {"measured"}


def test_every_command_of_a_run_is_kept_as_typed(whole: tuple[Path, str]):
    run, _ = whole
    first = "shardlab train small.py --runs whole --json out/result.json\n"
    assert (run / "command.txt").read_text() == first
    mine = _copy(run, "typed", only_step=4)
    assert shardlab("train", "small.py", "--runs", "typed", "--resume=latest", "--log-every", 2) == 0
    second = "shardlab train small.py --runs typed --resume=latest --log-every 2\n"
    assert (mine / "command.txt").read_text() == first + second
    assert "--runs typed --resume=latest" in (mine / "report.html").read_text()


def test_evaluation_stands_beside_unigram_and_xz_of_the_very_bytes_evaluated(whole: tuple[Path, str]):
    run, said = whole
    evals = {r.step: r.values for r in read(run / "records.jsonl") if r.kind == "eval"}
    assert list(evals) == [4, 8]
    for values in evals.values():
        assert values["bits_per_byte"] == pytest.approx(values["loss"] / math.log(2))
    dataset: Any = load("small.py").data.open(Path("cache"))  # 2 batches of 16 rows of 32 bytes are evaluated
    rows = dataset.rows("heldout", 0, 0, 32, 0, 32)
    text = rows["labels"].astype(np.uint8).tobytes()
    train = np.bincount(dataset.files["train"].tokens, minlength=256) + 1
    unigram = -np.mean(np.log2(train / train.sum())[list(text)])
    xz = 8 * len(lzma.compress(text, preset=6)) / len(text)
    header = read(run / "records.jsonl")[0].header.details
    told = header["evaluated"]
    assert evals[8]["tokens"] == told["tokens"] == told["bytes"] == len(text) == 1024
    assert told["unigram_bits_per_byte"] == pytest.approx(unigram)
    assert told["xz_bits_per_byte"] == pytest.approx(xz)
    assert header["data"]["heldout_xz_bits_per_byte"] < xz - 0.5, (
        "a text that xz tells from all that is held out"
    )
    line = next(line for line in said.splitlines() if line.startswith("held out after 8"))
    page = (run / "report.html").read_text()
    assert f"{evals[8]['bits_per_byte']:.3f} bits/byte (byte frequencies {unigram:.3f}, xz {xz:.3f})" in line
    for name, number in (("unigram", unigram), ("xz", xz)):
        assert f"<th>{name} bits per byte of the same text</th><td class=n>{number:.3f}</td>" in page


def test_of_tokens_that_do_not_give_their_text_back_no_bits_per_byte_are_told(
    capsys: pytest.CaptureFixture[str],
):
    """Most of this text becomes one token for whatever the vocabulary lacks: in bytes of what comes back, nonsense."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"<|endoftext|>": 0, "<unk>": 1, "def": 2, "self": 3}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.save("words.json")
    words = ("--data.tokenizer", "words.json", "--steps", 2, "--sample.tokens", 0, "--runs", "words")
    assert shardlab("train", "small.py", *words) == 0
    run, said = only(Path("words")), capsys.readouterr().out
    assert "no bits per byte: the tokenizer does not give its text back" in said
    assert "bits/byte" not in said
    (held,) = [r for r in read(run / "records.jsonl") if r.kind == "eval"]
    assert "bits_per_byte" not in held.values
    assert held.values["tokens"] == held.header.details["evaluated"]["tokens"] == 1024
    assert json.loads((run / "result.json").read_text())["heldout_bits_per_byte"] is None
    assert "n/a: the tokenizer does not give its text back" in (run / "report.html").read_text()


def test_a_run_prints_one_line_a_step_and_where_arrays_lie(whole: tuple[Path, str]):
    _, said = whole
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert len(lines) == 8
    for part in ("loss ", "tok/s", "ms/step", "mfu n/a", "rss ", "eta "):
        assert part in lines[1]
    assert "tok/s" not in lines[0], "the first step compiles: it has no honest time"
    assert "sharding/rules/tensor.py:" in said
    assert "layers embed/fsdp² kv_heads/tensor³ head_dim" in said
    assert "\x1b" not in said, "escape codes in a pipe"


def test_sample_report_and_pictures_stand(whole: tuple[Path, str], home: Path):
    run, said = whole
    text = (run / "sample.txt").read_text()
    assert text.startswith("def ")
    assert len(text) > len("def ")
    assert text.splitlines()[0] in said
    assert 'src="loss.svg"' in (run / "report.html").read_text()
    assert (run / "loss.svg").read_text().lstrip().startswith("<?xml")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((home / "out" / "result.json").read_text())
    assert result["step"] == 8
    assert result["stopped"] == ""
    assert result["loss"] == losses(run)[8]


def test_the_runs_own_config_gives_the_same_losses(
    whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]
):
    run, _ = whole
    assert shardlab("train", run / "config.py", "--runs", "again") == 0
    assert losses(only(Path("again"))) == losses(run)
    assert "run folder again/small/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        (signal.SIGKILL, -9),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    whole: tuple[Path, str], home: Path, number: signal.Signals, code: int
):
    run, _ = whole
    runs = f"stopped-{number.name}"
    process = start(home, "train", "small.py", "--runs", runs, SLOW=0.4)
    until(process, "step 6/8" if number is signal.SIGKILL else "step 2/8")
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    mine = only(home / runs)
    saved = max(sealed_steps(mine / "checkpoints"))
    assert saved == 4 if number is signal.SIGKILL else 2 <= saved < 8
    if number is not signal.SIGKILL:
        assert f"stopped by {number.name} after step {saved}" in said
        assert f"shardlab train {runs}/small/{mine.name}/config.py --resume" in said
    assert shardlab("train", mine / "config.py", "--resume", mine) == 0
    assert losses(mine) == losses(run), "records of both parts together are the uninterrupted run's"
    uninterrupted, resumed = arrays(run, 8), arrays(mine, 8)
    assert list(resumed) == list(uninterrupted)
    for name, array in uninterrupted.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)


def _copy(run: Path, name: str, only_step: int | None = None) -> Path:
    folder = Path(name) / "small" / run.name
    shutil.copytree(run, folder)
    if only_step is not None:
        for step in sealed_steps(folder / "checkpoints"):
            if step != only_step:
                shutil.rmtree(folder / "checkpoints" / str(step))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        ("--mesh.data", 8, "--mesh.fsdp", 1, "--mesh.tensor", 1, "--rules", "data"),
        ("--mesh.data", 1, "--mesh.fsdp", 4, "--rules", "data | fsdp | tensor | sequence"),
    ],
    ids=["data", "sequence"],
)
def test_a_run_goes_on_on_another_mesh(
    whole: tuple[Path, str], change: tuple[object, ...], request: pytest.FixtureRequest
):
    run, _ = whole
    mine = _copy(run, f"other-{request.node.callspec.id}", only_step=4)
    assert shardlab("train", "small.py", "--runs", mine.parent.parent, "--resume", "latest", *change) == 0
    here, there = losses(mine), losses(run)
    assert list(here) == list(there)
    np.testing.assert_allclose([here[s] for s in range(5, 9)], [there[s] for s in range(5, 9)], rtol=2e-5)
    assert steps(mine)[8].header.mesh != {}
    assert steps(mine)[8].header.resumed_step == 4


def test_latest_is_the_newest_run_that_has_a_checkpoint(whole: tuple[Path, str]):
    run, _ = whole
    old = _copy(run, "several", only_step=4)
    newest = old.with_name("99991231-000000-00000000")
    (newest / "checkpoints").mkdir(parents=True)
    assert shardlab("train", "small.py", "--runs", "several", "--resume", "latest") == 0
    assert max(sealed_steps(old / "checkpoints")) == 8
    assert not any((newest / "checkpoints").iterdir())


def test_latest_takes_no_copy_and_no_name_of_ones_own(whole: tuple[Path, str]):
    run, _ = whole
    first = _copy(run, "kept", only_step=4).rename("kept/small/20260102-030405-0123abcd")
    for end in ("-2", "-9", "-10", "-backup", "-10-old"):
        shutil.copytree(first, first.with_name(first.name + end))
    for name in ("old-try", "zz-20260102-030405-0123abcd", "99990102-old"):
        shutil.copytree(first, first.with_name(name))
    found = run_folder.to_resume(load("small.py"), "latest", Path("kept"))
    assert found == first.with_name(f"{first.name}-10")


def test_a_run_under_another_name_is_still_that_run(whole: tuple[Path, str]):
    run, _ = whole
    mine = _copy(run, "renamed", only_step=4).rename("renamed/ren")
    assert shardlab("train", "small.py", "--resume", mine) == 0
    found = scan(mine / "records.jsonl")
    assert [(h.run, h.resumed_step) for h in found.headers] == [(run.name, None), (run.name, 4)]
    assert [r.step for r in read(mine / "records.jsonl") if r.kind == "step"] == list(range(1, 9))
    assert losses(mine) == losses(run)


def test_a_run_reached_by_another_path_is_its_folder(
    whole: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
):
    run, _ = whole
    mine, small = _copy(run, "reached").absolute(), load("small.py")
    link = mine.with_name("newest")
    link.symlink_to(mine.name)
    assert run_folder.to_resume(small, str(link), Path("reached")) == mine
    monkeypatch.chdir(mine / "checkpoints")
    assert run_folder.to_resume(small, "..", Path("reached")) == mine
    (mine / "records.jsonl").unlink()
    assert run_folder.run_id(mine) == mine.name, "a run without records goes by its folder"


def test_names_that_are_not_utf8(capsys: pytest.CaptureFixture[str]):
    """A name in Latin-1, as a shell gives it to Python: with a lone surrogate for the byte that is not UTF-8."""
    shutil.copyfile("small.py", "caf\udce9.py")
    shutil.copytree("corpus", "n\udce9")
    words = ("--data.path", "n\udce9", "--steps", 1, "--sample.tokens", 0)
    assert shardlab("train", "caf\udce9.py", "--runs", "odd", *words) == 0, capsys.readouterr().err
    run = only(Path("odd"))
    command = (run / "command.txt").read_bytes()
    assert b"caf\xe9.py" in command
    assert b"--data.path 'n\xe9'" in command
    assert "caf\ufffd.py" in (run / "report.html").read_text(encoding="utf-8")
    assert shardlab("explain", run / "config.py") == 0, capsys.readouterr().err
    assert shardlab("train", "small.py", "--runs", "none", "--sample.prompt", "\udce9") == 2
    assert "sample.prompt is '\\udce9', but text is UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((), "is finished: 8 of 8"),
        (("--seed", 1), "seed: recorded 0, now 1"),
        (("--model.embed", 64), "model.embed: recorded 32, now 64"),
        (("--steps", 12), "steps: recorded 8, now 12"),
        (("--data.path", "changed"), "data.path: recorded"),
    ],
    ids=["finished", "seed", "model", "steps", "data"],
)
def test_what_cannot_be_resumed_is_said_and_nothing_is_lost(
    whole: tuple[Path, str], change: tuple[object, ...], says: str, capsys: pytest.CaptureFixture[str]
):
    run, _ = whole
    if not Path("changed").exists():
        shutil.copytree("corpus", "changed")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert shardlab("train", "small.py", "--resume", run, *change) == 2
    assert says in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_changed_corpus_is_found_by_its_checksum(
    whole: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    run, _ = whole
    place(tmp_path)
    with open(tmp_path / "corpus" / "decoder.py", "a") as file:
        file.write("# one more line\n")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "run")
    for step in (8,):
        shutil.rmtree(f"run/checkpoints/{step}")
    assert shardlab("train", "small.py", "--resume", "run") == 2
    assert "corpus with checksum" in capsys.readouterr().err
    assert sealed_steps("run/checkpoints") == [4]


def _tokenizer(vocab: int, text: Path, path: Path) -> None:
    from experiments.data.store.tokenizer import train_bpe

    path.write_text(train_bpe([text.read_bytes()], vocab).json, encoding="utf-8")


def test_the_same_text_in_other_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The config names the same tokenizer.json and the text has its checksum: only the tokens say that it is another."""
    place(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ("--data.tokenizer", "bpe.json", "--model.vocab", 300, "--data.documents", "packed",
             "--model.documents", "packed", "--checkpoints.every", 4)  # fmt: skip
    _tokenizer(300, Path("corpus/decoder.py"), Path("bpe.json"))
    assert shardlab("train", "small.py", *words) == 0, capsys.readouterr().err
    mine = _copy(only(Path("runs")), "stopped", only_step=4)
    _tokenizer(280, Path("corpus/encoder.py"), Path("bpe.json"))
    assert shardlab("train", "small.py", *words, "--resume", mine) == 2
    said = capsys.readouterr().err.strip()
    assert "other tokens of the same text" in said
    for fact in run_folder.IDENTITY:  # every one of them is another
        assert f"{fact} recorded " in said
    assert "\n" not in said
    assert sealed_steps(mine / "checkpoints") == [4]
    _tokenizer(300, Path("corpus/decoder.py"), Path("bpe.json"))
    assert shardlab("train", "small.py", *words, "--resume", mine) == 0, capsys.readouterr().err


def test_a_checkpoint_is_held_to_what_it_says_of_its_data():
    facts = {name: f"{n}0ab" for n, name in enumerate(run_folder.IDENTITY)}
    now = {"experiment": {}, "corpus": "9c", "data": facts}
    run_folder.check_same(Path("run"), now, now)
    run_folder.check_same(Path("run"), {"experiment": {}, "corpus": "9c"}, now)  # from before they were kept
    for name in facts:
        was = now | {"data": {name: facts[name]}}
        run_folder.check_same(Path("run"), was, now)
        for other in (facts | {name: "77"}, {k: v for k, v in facts.items() if k != name}):
            with pytest.raises(
                InputError, match=f"{name} recorded {facts[name]}, now {other.get(name, 'none')}"
            ):
                run_folder.check_same(Path("run"), was, now | {"data": other})


def test_a_mesh_for_another_number_of_devices_is_refused_before_they_are_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Even 100000 pretend devices would be started first, for minutes."""
    from experiments import devices

    monkeypatch.setattr(devices, "start", lambda *_, **__: pytest.fail("the devices were started"))
    assert shardlab("train", "small.py", "--devices", 100000) == 2
    assert "asks for 8 devices, but there are 100000" in capsys.readouterr().err


def test_another_models_checkpoint_without_its_config_is_refused(
    whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]
):
    """Even where nothing says which config made it: the arrays themselves do."""
    run, _ = whole
    mine = _copy(run, "foreign", only_step=4)
    meta = mine / "checkpoints" / "4" / "meta" / "metadata"
    told = json.loads(meta.read_text())
    told["experiment"]["model"]["mlp"] = 128
    changed = json.dumps(told)
    meta.write_text(changed)
    seal(mine / "checkpoints" / "4", 4)
    assert shardlab("train", "small.py", "--resume", mine, "--model.mlp", 128) == 2
    assert "is of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "says"),
    [("nowhere", "not there"), ("small.py", "a file"), ("corpus", "no complete checkpoint")],
)
def test_a_folder_without_a_run_is_said(where: str, says: str, capsys: pytest.CaptureFixture[str]):
    there = Path(where).exists()
    assert shardlab("train", "small.py", "--resume", where) == 2
    assert says in capsys.readouterr().err
    assert Path(where).exists() == there
    assert not (Path(where) / "checkpoints").exists()


def test_latest_without_any_run_is_said(capsys: pytest.CaptureFixture[str]):
    assert shardlab("train", "small.py", "--runs", "none-yet", "--resume", "latest") == 2
    assert "no run with a checkpoint" in capsys.readouterr().err
    assert not Path("none-yet").exists()


def test_a_second_ctrl_c_leaves_at_once(home: Path):
    process = start(home, "train", "small.py", "--runs", "impatient", SLOW=2)
    until(process, "first step after")  # the next waits for its data now
    process.send_signal(signal.SIGINT)
    until(process, "Ctrl-C again")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert sealed_steps(only(home / "impatient") / "checkpoints") == []


def test_a_run_left_before_its_first_step_leaves_no_folder(home: Path, capsys: pytest.CaptureFixture[str]):
    process = start(home, "train", "small.py", "--runs", "unbegun", SLOW=30)
    until(process, "run folder")  # everything is written, and the first batch does not come
    assert (only(home / "unbegun") / "config.py").exists()
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    if process.poll() is None:  # the loop had begun, and answered that Ctrl-C again leaves at once
        process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "interrupted" in said
    assert not (home / "unbegun").exists()


def test_a_run_killed_before_its_first_step_is_passed_over(
    whole: tuple[Path, str], home: Path, capsys: pytest.CaptureFixture[str]
):
    process = start(home, "train", "small.py", "--runs", "killed", SLOW=30)
    until(process, "run folder")
    process.kill()
    process.communicate(timeout=15)
    killed = only(home / "killed")
    for which in ("latest", killed):
        assert shardlab("train", "small.py", "--runs", "killed", "--resume", which) == 2
        assert "checkpoint" in capsys.readouterr().err
    older = killed.with_name("20000101-000000-00000000")
    shutil.copytree(whole[0], older)
    shutil.rmtree(older / "checkpoints" / "8")
    assert shardlab("train", "small.py", "--runs", "killed", "--resume", "latest") == 0
    assert max(sealed_steps(older / "checkpoints")) == 8
    assert sealed_steps(killed / "checkpoints") == []


def test_a_loss_that_is_not_finite_is_shown_and_recorded(capsys: pytest.CaptureFixture[str]):
    words = ("--optimizer.peak", "1e30", "--optimizer.warmup", 0, "--steps", 3, "--sample.tokens", 0)
    assert shardlab("train", "small.py", "--runs", "nan", *words, "--json", "nan.json") == 0
    for path in (Path("nan.json"), only(Path("nan")) / "result.json"):
        found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert found["loss"] == "NaN"
    recorded = losses(only(Path("nan")))
    assert math.isfinite(recorded[1])
    assert not math.isfinite(recorded[3])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 3/3")]
    assert "NOT FINITE" in lines[0]


def test_two_runs_of_one_second_have_two_folders(monkeypatch: pytest.MonkeyPatch):
    class Clock:
        @staticmethod
        def now(zone: object) -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    small = load("small.py")
    with run_folder.new(small, Path("twins"), makes=True) as first:
        with run_folder.new(small, Path("twins"), makes=True) as second:
            assert first.is_dir()
            assert second.name == f"{first.name}-2"
        with pytest.raises(KeyError), run_folder.new(small, Path("twins"), makes=True) as third:
            raise KeyError
    assert sorted(first.parent.iterdir()) == [first, second]
    assert third.name == f"{first.name}-3", "what came to nothing is gone"
