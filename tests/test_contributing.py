"""The worked files of CONTRIBUTING.md, copied into a folder elsewhere and used there; what pages show and link to is there."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.data import contract
from experiments.records import MissingRecords, read
from paper_figures import build, style
from sharding.axes import MeshShape
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.tensor import tensor
from sharding.rules.zero1 import zero1
from tests import small
from tests.support import ROOT, assert_same, batches, initial_params, make_step, oracle, train
from tests.test_parity import BOUND, MODELS

PAGE = ROOT / "CONTRIBUTING.md"
BLOCK = re.compile(r"`(\w+\.py)`:\n\n```python\n(.*?)```", re.DOTALL)
EXAMPLES: dict[str, str] = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder outside the repository with every worked file, on the path as a config's folder is."""
    where = tmp_path_factory.mktemp("mine")
    for name, code in EXAMPLES.items():
        (where / name).write_text(code, encoding="utf-8")
    assert not where.is_relative_to(ROOT)
    names = [Path(name).stem for name in EXAMPLES]
    sys.path.append(str(where))
    yield where
    sys.path.remove(str(where))
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def mine(folder: Path) -> Any:
    """The module of a worked file by its name."""
    importlib.invalidate_caches()

    def module(name: str) -> Any:
        made = importlib.import_module(name)
        assert Path(str(made.__file__)).parent == folder, "another file of that name was imported"
        return made

    return module


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The run folder that the worked experiment leaves, trained by the command in its docstring."""
    command = re.search(r"Command: +shardlab (.*)", EXAMPLES["tumours_mlp.py"])
    assert command is not None
    shardlab(folder, *command[1].split(), "--log-every", "1")
    return small.only(folder / "runs")


def test_every_python_block_is_a_worked_file_and_every_kind_has_one() -> None:
    assert PAGE.read_text(encoding="utf-8").count("```python") == len(EXAMPLES)
    assert set(EXAMPLES) == {
        "width.py", "split.py", "bigram.py", "tumours.py", "tumours_mlp.py", "gradient_norms.py",
    }  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_worked_file_passes_the_checks_that_the_page_asks_for(name: str) -> None:
    for arguments in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--stdin-filename", name, "-"]
        ran = subprocess.run(
            command, cwd=ROOT, input=EXAMPLES[name], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_readme_shows_a_config_and_a_rule_as_they_are() -> None:
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    there = ("configs/quickstart.py", "sharding/rules/fsdp.py")
    for code, path in zip(shown, there, strict=True):
        assert (ROOT / path).read_text(encoding="utf-8").endswith(code), f"README.md shows another {path}"


def test_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", PAGE, ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    links = [(p, to) for p in pages for to in re.findall(r"\]\(([^)#]+)", p.read_text(encoding="utf-8"))]
    assert len(links) > 20
    missing = [
        f"{p.relative_to(ROOT)}: {to}" for p, to in links if "://" not in to and not (p.parent / to).exists()
    ]
    assert not missing


def test_the_rule_keeps_the_contract_of_a_rule_file(mine: Any) -> None:
    made = mine("width").width()
    assert repr(made) == "width()"
    file, _, line = made.chain[0].source.rpartition(":")
    assert Path(file).read_text().splitlines()[int(line) - 1] == "@rule"
    assert len(EXAMPLES["width.py"].splitlines()) <= 15
    assert re.search(r"arXiv:\d{4}\.\d{5}", EXAMPLES["width.py"])


@pytest.mark.parametrize("partitioner", [Manual(), Auto()], ids=["manual", "auto"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_trained_under_the_rule_has_the_numbers_of_one_device(
    mine: Any, model: str, partitioner: Partitioner
) -> None:
    rules = data() | mine("width").width()
    assert mine("split").rules() == rules
    check(MODELS[model], rules, MeshShape(data=2, tensor=4), partitioner)


def test_the_rule_is_explained_from_where_it_lies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = re.findall(r"^shardlab (explain .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    monkeypatch.chdir(folder)
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in command.split()]
    assert small.shardlab(*words) == 0
    out = capsys.readouterr().out
    assert "width()" in out
    assert "embed/tensor" in out


CHAINS: dict[str, tuple[Rules, MeshShape]] = {
    "split three ways": (data() | fsdp() | tensor(), MeshShape(data=2, fsdp=2, tensor=2)),
    "zero1 tensor": (zero1() | tensor(), MeshShape(data=4, tensor=2)),
}


@pytest.mark.parametrize("partitioner", [Manual(), Auto()], ids=["manual", "auto"])
@pytest.mark.parametrize("chain", CHAINS)
def test_the_model_has_the_numbers_of_one_device_under_rules_it_does_not_know(
    mine: Any, chain: str, partitioner: Partitioner
) -> None:
    config = mine("bigram").BigramConfig(vocab=32, embed=16, length=8)
    check(config, *CHAINS[chain], partitioner)


def test_the_dataset_keeps_the_contract(mine: Any, tmp_path: Path) -> None:
    dataset = mine("tumours").Tumours().open(tmp_path)
    contract.check(dataset)
    rows = dataset.gather("train", np.arange(dataset.train_rows))
    np.testing.assert_allclose(rows["features"].std(0), 1, atol=1e-5)
    assert 0.5 < rows["labels"].mean() < 0.75
    assert not list(tmp_path.iterdir())


def test_the_experiment_trains_to_what_its_docstring_says(run: Path) -> None:
    claimed = re.search(r"held-out loss under ([\d.]+) nats", EXAMPLES["tumours_mlp.py"])
    assert claimed is not None
    held_out = [r for r in read([run / "records.jsonl"]) if r.kind == "eval"]
    assert 0 < held_out[-1].values["loss"] < float(claimed[1])
    assert len(small.losses(run)) == 40


def test_a_run_can_be_made_again_after_its_files_are_gone(run: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(run, kept)
    assert "width()" in shardlab(tmp_path, "explain", kept / "config.py")


def test_the_figure_draws_the_experiments_records_the_same_each_time(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    mine, records = str(folder / "gradient_norms.py"), [run / "records.jsonl"]
    source = build.load(mine)
    assert source.sections["Reproduce"].splitlines()[0].startswith("shardlab train tumours_mlp.py")
    with pytest.raises(MissingRecords):
        source.draw([])
    once, again = (build.build(mine, tmp_path / n, paths=records).files for n in ("once", "again"))
    assert [p.read_bytes() for p in once] == [p.read_bytes() for p in again]
    assert len(once) == 3
    svg = once[0].read_text()
    assert "tumours-mlp" in svg
    assert float(svg.split('width="')[1].split("pt")[0]) / 72 in (style.COLUMN, style.PAGE)


def shardlab(folder: Path, *words: object) -> str:
    """What this clone's command prints in a folder; `-P` as for the installed script, which does not see the folder."""
    command = [sys.executable, "-P", "-m", "experiments.cli", *map(str, words)]
    ran = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def check(config: Any, rules: Rules, mesh: MeshShape, partitioner: Partitioner) -> None:
    """Three updates on the mesh have the loss, gradients and parameters of one device."""
    assert dataclasses.is_dataclass(config)
    step = make_step(config, rules, mesh, partitioner)
    found = train(step, initial_params(config), batches(config, 3))
    assert_same(found, oracle(config, 3), BOUND)
