"""`shardlab verify` as a user meets it: the page's rule and model, exit codes, the JSON document, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from experiments import assemble
from experiments.cli import main
from tests.support import ROOT

PAGE = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
RULE, MODEL = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder elsewhere with the page's two files."""
    monkeypatch.setattr(assemble, "CACHE", ROOT / ".cache" / "tests")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "context.py").write_text(RULE)
    (tmp_path / "learned.py").write_text(MODEL)
    return tmp_path


def test_the_pages_rule_departs_under_the_pages_model_as_the_page_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--rules", "context.py", "--devices", "2", "--json", "out/verified.json"]
    assert main(["verify", "learned.py", *words]) == 1
    said = capsys.readouterr().out
    quoted = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert quoted is not None
    for line in quoted[1].splitlines():
        *_, what = line.split("  ")
        for word in re.findall(r"[A-Za-z_/=.]{4,}", what):
            assert word in said, (word, said)
    told: dict[str, Any] = json.loads(Path("out/verified.json").read_text())
    assert told["provenance"] == "measured"
    verdicts = {(tuple(c["mesh"].items()), c["partitioner"]): c["verdict"] for c in told["cases"]}
    assert verdicts[(("context", 2),), "manual"] == "departs"
    assert verdicts[(("context", 2),), "auto"] == verdicts[(("data", 2),), "manual"] == "agrees"
    (departed,) = [c for c in told["cases"] if c["verdict"] == "departs"]
    assert departed["departure"]["phase"] == "forward"
    assert departed["worst"]["gradient"]["share_of_budget"] > 1000


def test_the_model_mended_as_the_page_says_agrees(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mended = MODEL.replace("jnp.arange(x.shape[1])", 'positions(x, "batch length embed")')
    mended = mended.replace("embed, rms_norm", "embed, positions, rms_norm").replace(
        "import jax.numpy as jnp\n", ""
    )
    (folder / "learned.py").write_text(mended)
    meshes = ["--meshes", "data=2,context=2", "context=4"]
    assert (
        main(
            [
                "verify",
                "learned.py",
                "--rules",
                "context.py",
                *meshes,
                "--partitioners",
                "manual",
                "--steps",
                "2",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "All 2 agree with one device" in said
    assert "2 updates of" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--meshes", "data=x"], "cannot be read at 'data=x'"),
        (["--meshes", "dta=2"], "'dta', which does not exist \\(nearest: 'data'\\)"),
        (["--meshes", "data=1"], "--meshes data=1 is one device, which verify compares"),
        (["--meshes", "data=3"], "None of the 2 meshes can be laid out.*does not divide"),
        (["--meshes", "data=2", "--devices", "1"], "asks for 2 devices"),
        (
            ["--batch", "12"],
            "own split \\(data=8, manual\\) is refused. A batch of 12 rows does not divide into 8",
        ),
        (["--partitioners", "none"], "--partitioners none cannot be read"),
        (["--rules", "nothing.py"], "nothing.py"),
    ],
)
def test_bad_input_is_one_paragraph(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "learned.py", *words]) == 2
    told = capsys.readouterr().err
    assert re.search(says, told), told
    assert told.count("\n") == 1


def test_a_model_that_computes_something_else_in_double_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = (
        "x = x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape).astype(x.dtype)\n        x = rms_norm("
    )
    (folder / "learned.py").write_text("import jax\n" + MODEL.replace("x = rms_norm(", noise))
    assert main(["verify", "learned.py", "--meshes", "data=2"]) == 2
    assert "computes something else in double" in capsys.readouterr().err


def test_a_sum_that_is_not_reduced_is_a_departure_with_its_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = MODEL.replace('einsum("batch length ->", nats * weights)', "jnp.sum(nats * weights)")
    assert wrong != MODEL
    (folder / "learned.py").write_text(wrong)
    line = 1 + next(i for i, text in enumerate(wrong.splitlines()) if "jnp.sum(" in text)
    assert main(["verify", "learned.py", "--meshes", "data=2", "data=4", "--json", "said.json"]) == 1
    said = capsys.readouterr().out
    assert "departs at trace time" in said
    assert f"learned.py:{line}" in said
    assert said.count("a missing reduction over data") == 1  # both meshes say the same
    told: dict[str, Any] = json.loads(Path("said.json").read_text())
    verdicts = {(c["mesh"]["data"], c["partitioner"]): c["verdict"] for c in told["cases"]}
    assert verdicts == {
        (n, by): "departs" if by == "manual" else "agrees" for n in (2, 4) for by in ("manual", "auto")
    }
    assert told["cases"][0]["departure"]["phase"] == "trace"


def test_an_error_of_the_types_inside_the_model_has_its_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = "at = jax.lax.scan(lambda c, row: (c + row[0], None), jnp.zeros(x.shape[2]), x)[0]\n        at = "
    wrong = "import jax\n" + MODEL.replace("at = ", scan, 1)
    (folder / "learned.py").write_text(wrong)
    line = 1 + next(i for i, text in enumerate(wrong.splitlines()) if "lax.scan(" in text)
    assert main(["verify", "learned.py", "--meshes", "data=2"]) == 1
    said = capsys.readouterr().out
    assert "departs at trace time" in said
    assert re.search(rf"first +the model's line .*learned.py:{line}", said), said
    assert "looks as an error that one device does not have" in said
