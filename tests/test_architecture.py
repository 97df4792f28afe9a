"""The house keeps its order: who imports whom, what stays free of jax, and no check that could not fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import architecture

ROOT = Path(__file__).resolve().parent.parent

# A small tree without a fault; each case below adds one file to it.
SOUND = {
    "pyproject.toml": '[project]\ndependencies = ["orbax-checkpoint>=1"]\n[project.optional-dependencies]\ndev = []\n',
    ".gitignore": ".venv*/\n/runs/\n",
    "runs/bad.py": "from /wo" + "rk/x import y",
    ".venv/bad.py": "from /wo" + "rk/x import y",  # ignored, so never read
    "sharding/__init__.py": '"""Doc."""\n',
    "sharding/axes.py": '"""Doc."""\nAXES = ("data", "fsdp", "expert", "tensor")\nNAMES = {"expert": "E"}\n',
    "sharding/mesh.py": '"""Doc."""\nimport jax\nimport numpy as np\nfrom sharding.axes import AXES\n',
    "models/__init__.py": '"""Doc."""\n',
    "models/mlp.py": '"""Takes data."""\nfrom sharding.axes import NAMES\nX = ("expert", "data loader", "batch")\n',
    "experiments/__init__.py": '"""Doc."""\n',
    "experiments/records.py": '"""Doc."""\nimport json, pathlib, experiments.record_schema\n',
    "experiments/loop.py": '"""Doc."""\nimport time, orbax.checkpoint, models.mlp, sharding.mesh\nprint(open)\n',
    "configs/__init__.py": '"""Doc."""\n',
    "configs/a.py": '"""Doc."""\nfrom experiments.loop import x\nfrom models.mlp import X\n',
    "paper_figures/__init__.py": '"""Doc."""\n',
    "paper_figures/a.py": '"""Doc."""\nimport matplotlib, numpy\nfrom experiments.records import read\n',
    "README.md": "See https://example.org/work/x, ~/tmp/a and docs/tmp/a.\n",
}

FAULTS = {
    "sharding/a.py": [
        ("import models.mlp", "may not know models"),
        ("def f():\n    from experiments import records", "may not know experiments"),
        ("import tensorstore", "does without tensorstore"),
        ("from os import path", "is pure, os is not"),
        ("import importlib\nimportlib.import_module('time')", "is pure, time is not"),
        ("from ..models import mlp", "may not know models"),
        ("x = open('f')", "uses open"),
        ("import jax\njax.debug.print('x')", "uses print"),
    ],
    "models/a.py": [
        ("import experiments.loop", "may not know experiments"),
        ("from jax.sharding import PartitionSpec", "does not decide where arrays lie"),
        ("from sharding.rules.data import data", "does not decide where arrays lie"),
        ("x = 'tensor'", "'tensor' is a mesh axis"),
        ("x = 'data, fsdp'", "'data, fsdp' is a mesh axis"),
        ("print(1)", "uses print"),
    ],
    "experiments/a.py": [
        ("import configs.a", "may not know configs"),
        ("import paper_figures.a", "may not know paper_figures"),
        ("import requests", "does not declare"),
        ("x = 1\n" * 300, "more than 300"),
    ],
    "experiments/record_schema.py": [
        ("import numpy", "does without numpy"),
        ("from experiments.loop import x", "may not know experiments"),
    ],
    "configs/b.py": [
        ("import jax", "does without jax"),
        ("import paper_figures", "may not know paper_figures"),
    ],
    "paper_figures/b.py": [
        ("import jax", "does without jax"),
        ("from experiments import loop", "may not know experiments"),
        ("from sharding.axes import AXES", "may not know sharding"),
    ],
    "sharding/rules/data.py": [("x = 1", "its folder has no __init__.py")],
    "models/__init__.py": [("from models.mlp import X", "holds more than a docstring")],
    "tests/test_a.py": [
        ("# /ho" + "me/me/x", "a path of one machine"),
        ("x = '/tm" + "p/x'", "a path of one machine"),
    ],
    "requirements/a.txt": [("--index-url https://py" + "pi.org/x", "a package registry's host")],
}
PLANTED = [(path, text, what) for path, cases in FAULTS.items() for text, what in cases]


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_house_has_no_faults() -> None:
    assert len(architecture.files(ROOT)) > 10
    found = architecture.faults(ROOT)
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_a_sound_tree_has_no_faults(tmp_path: Path) -> None:
    assert architecture.faults(_tree(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("path", "text", "what"), PLANTED, ids=[f"{p}-{w}" for p, _, w in PLANTED])
def test_a_planted_fault_is_found(tmp_path: Path, path: str, text: str, what: str) -> None:
    found = architecture.faults(_tree(tmp_path, SOUND | {path: f'"""Doc."""\n{text}\n'}))
    assert found
    assert all(path in line and what in line for line in found), found


def test_a_module_without_a_docstring_is_found(tmp_path: Path) -> None:
    assert architecture.faults(_tree(tmp_path, SOUND | {"tests/a.py": "x = 1\n"})) == [
        "tests/a.py:1: has no docstring"
    ]


def test_git_and_the_walk_list_the_same_files(tmp_path: Path) -> None:
    walked = architecture.files(
        _tree(tmp_path, SOUND | {"docs/runs/a.md": "only the root's runs are ignored"})
    )
    assert Path("docs/runs/a.md") in walked
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert walked == architecture.files(tmp_path)
    assert Path(".gitignore") in walked
    assert Path("runs/bad.py") not in walked


PLACES = """
import importlib, json
found = {}
for name in %r:
    try:
        found[name] = importlib.import_module(name).__file__
    except ModuleNotFoundError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def test_an_installed_package_hides_none_of_ours(tmp_path: Path) -> None:
    # Isolated and elsewhere: what is found then is what the `shardlab` command finds.
    modules = [architecture.module_name(p) for p in architecture.files(ROOT) if p.name == "__init__.py"]
    ours = [m for m in modules if m.split(".")[0] in architecture.HOUSE]
    command = [sys.executable, "-I", "-c", PLACES % ours]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    elsewhere = {m: place for m, place in json.loads(out).items() if not place.startswith(f"{ROOT}/")}
    assert len(ours) >= len(architecture.HOUSE)
    assert not elsewhere, f"not this clone's (is it installed? `make setup`): {elsewhere}"


JAX_FREE = """
import importlib, json, runpy, sys
class Refuse:
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib"):
            self.asked.append(name)
            raise ImportError(name + " is not to be had here")
sys.meta_path.insert(0, Refuse())
guilty = []
for what in json.loads(sys.argv[1]):
    try:
        if what.startswith("configs/"):
            runpy.run_path(what)["config"]()
        else:
            importlib.import_module(what)
    except ImportError:
        if not Refuse.asked:
            raise
    if Refuse.asked:
        guilty.append(what)
    Refuse.asked.clear()
print(json.dumps(guilty))
"""


def _jax_free(root: Path, files: list[Path]) -> list[str]:
    """What must load without jax: values (configs, rules, dataclasses), the command line and figures."""

    def asked(p: Path) -> bool:
        place = p.as_posix()
        return (
            place.startswith(
                ("sharding/rules/", "sharding/schedules/", "paper_figures/", "experiments/data/")
            )
            or (
                p.parts[0] == "experiments"
                and len(p.parts) == 2
                and p.stem.startswith(("record", "config", "cli"))
            )
            or place in ("sharding/axes.py", "sharding/errors.py", "sharding/partitioner.py")
            or (p.parts[0] == "models" and p.stem.endswith("_config"))
        )

    python = [p for p in files if p.suffix == ".py" and p.name != "__init__.py"]
    what = [p.as_posix() for p in python if p.parts[0] == "configs"]
    what += [architecture.module_name(p) for p in python if asked(p)]
    command = [sys.executable, "-W", "error", "-c", JAX_FREE, json.dumps(what)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_configs_and_values_load_without_jax() -> None:
    guilty = _jax_free(ROOT, architecture.files(ROOT))
    assert not guilty, (
        f"these import jax when they load; import it inside the function that needs it: {guilty}"
    )


def test_a_config_that_brings_jax_is_found(tmp_path: Path) -> None:
    extra = {
        "configs/a.py": '"""Doc."""\nimport json\n\ndef config():\n    return 1\n',
        "configs/b.py": '"""Doc."""\ndef config():\n    import jax.version\n    return jax\n',
        "paper_figures/a.py": '"""Doc."""\nimport jax.version\n',
        "experiments/records.py": '"""Doc."""\nimport json\n',
    }
    root = _tree(tmp_path, SOUND | extra)
    assert _jax_free(root, architecture.files(root)) == ["configs/b.py", "paper_figures.a"]
