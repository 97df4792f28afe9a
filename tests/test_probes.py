"""Every probe of the catalogue, found by its place: it says what it must, runs, and compares arrays that could differ."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import cli
from experiments.doctor import catalogue
from experiments.doctor.catalogue import Probe
from experiments.doctor.verdict import Verdict, compare
from sharding.errors import InputError

PROBES = catalogue.catalogue()
ALONE = [p for p in PROBES if not p.needs.gloo]
"""Those that run on the devices of this process."""


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.name)
def test_a_probe_says_what_bug_where_reported_what_is_unsafe_and_what_to_do(probe: Probe) -> None:
    assert re.search(r"[\w-]+/[\w-]+#\d+|[Ff]ound", probe.reported), "an issue, or that it was found here"
    assert re.search(r"\d", probe.reported), "which versions or issue"
    for text in (probe.title, probe.unsafe, probe.do):
        assert len(text) > 30
        assert text.endswith((".", "axis's size")) or text == probe.title
    assert probe.needs.seconds <= 120
    assert probe.needs.processes == 1 or probe.needs.gloo


@pytest.mark.parametrize("probe", ALONE, ids=lambda p: p.name)
def test_a_probe_runs_and_says_wrong_when_the_devices_give_other_numbers(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = catalogue.load(probe.path)
    compared: list[np.ndarray] = []

    def spy(found: Any, expected: Any, bound: Any = 0.0, what: str = "") -> Verdict:
        compared.append(np.asarray(expected))
        return compare(found, expected, bound, what)

    def spoilt(found: Any, expected: Any, bound: Any = 0.0, what: str = "") -> Verdict:
        other = np.array(found)
        other.flat[-1] = other.flat[-1] + 1 if other.dtype != bool else ~other.flat[-1]
        return compare(other, expected, bound, what)

    module = sys.modules[run.__module__]
    monkeypatch.setattr(module, "compare", spy)
    verdict = run(jax.devices())
    assert verdict.outcome in ("ok", "wrong"), verdict
    if not compared:  # refused by jax: nothing can be wrong
        assert "refused" in verdict.detail
        return
    assert any(np.any(x) for x in compared), "only zeros were expected"
    monkeypatch.setattr(module, "compare", spoilt)
    assert run(jax.devices()).outcome == "wrong"


@pytest.mark.parametrize("probe", [p for p in PROBES if p.needs.gloo and p.needs.quick], ids=lambda p: p.name)
def test_a_probe_with_processes_of_its_own_runs(probe: Probe, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code = cli.main(
        ["doctor", "--devices", "1", "--processes", "1", "--only", probe.name, "--json", str(out)]
    )
    (found,) = [c for c in json.loads(out.read_text())["checks"] if c["name"] == probe.name]
    assert found["outcome"] in ("ok", "wrong"), found
    assert code == (0 if found["outcome"] == "ok" else 1)


@pytest.mark.slow
def test_the_patience_of_gloo_is_told() -> None:
    code = cli.main(["doctor", "--devices", "1", "--processes", "1", "--only", "gloo_patience"])
    assert code in (0, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('"""Title."""\n', "Reported"),
        ('"""T.\n\nReported: a\nUnsafe: b\nDo: c\n"""\n', "a function probe"),
        ('"""T.\n\nReported: a\nUnsafe: b\nDo: c\n"""\nNEEDS = {"device": 2}\ndef probe(d): ...\n', "NEEDS"),
        (
            '"""T.\n\nReported: a\nUnsafe: b\nDo: c\n"""\nNEEDS = {"devices": "2"}\ndef probe(d): ...\n',
            "NEEDS",
        ),
        (
            '"""T.\n\nReported: a\nUnsafe: b\nDo: c\n"""\nNEEDS = dict(devices=2)\ndef probe(d): ...\n',
            "NEEDS",
        ),
        ("def (", "cannot be read"),
    ],
)
def test_a_file_that_is_no_probe_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        catalogue.read(path)


def test_a_probe_outside_the_house_is_read_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        '"""T.\n\nReported: a\n  b\nUnsafe: c\nDo: d\n"""\nNEEDS = {"seconds": 3}\nraise SystemExit\ndef probe(d): ...\n'
    )
    mine = catalogue.catalogue([path])[-1]
    assert (mine.name, mine.reported, mine.unsafe, mine.do, mine.needs.seconds) == (
        "mine",
        "a b",
        "c",
        "d",
        3,
    )
    with pytest.raises(InputError, match="named 'mine'"):
        catalogue.catalogue([path, path])


def test_the_probe_of_the_document_is_one_and_runs(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "doctor.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "of_the_document.py"
    path.write_text(block)
    assert catalogue.read(path).needs.devices == 2
    assert catalogue.load(path)(jax.devices()).outcome == "ok"
