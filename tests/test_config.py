"""The experiment as a value: config files, overrides, hash, and a run's config that runs again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.config import Experiment, config_hash, load, to_json
from experiments.optimizers import AdamW
from experiments.overrides import _leaves, apply
from experiments.run_config import Origin, write_run_config
from models.transformer_config import TransformerConfig
from sharding.errors import InputError
from sharding.partitioner import Auto, Manual
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.py"
RULES = ", ".join(sorted(p.stem for p in (ROOT / "sharding" / "rules").glob("[!_]*.py")))
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if p.name != "__init__.py")

BASE = "from dataclasses import replace\nfrom configs.quickstart import config as quickstart\n"
"""How a test's config file begins: a real config, changed."""

OWN_RULE = """
from sharding.rule import Rule, rule
@rule
def own(axis: str = 'data') -> Rule:
    return Rule(activation={"batch": axis})
"""


@pytest.fixture(scope="module")
def quickstart() -> Experiment:
    return load(QUICKSTART)


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def refused(*said: str) -> pytest.RaisesExc[InputError]:
    """One paragraph that says all of `said`."""
    return pytest.RaisesExc(InputError, check=lambda e: "\n" not in str(e) and all(s in str(e) for s in said))


# Config files.


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_says_what_it_is_and_can_be_recorded(path: Path) -> None:
    module_doc = path.read_text(encoding="utf-8").split('"""')[1]
    for part in ("Claim:", "Command:", "Cost:", "Result:", f"configs/{path.name}"):
        assert part in module_doc
    if any(kind in path.read_text(encoding="utf-8") for kind in ("-> Sweep", "-> PlanSweep")):
        return  # a sweep returns several experiments, and its own test loads it
    experiment = load(path)
    assert json.loads(json.dumps(to_json(experiment), allow_nan=False)) == to_json(experiment)
    assert apply(experiment, []) == experiment


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n", ("has no config()", "def config() -> Experiment")),
        ("def confg(): ...\n", ("has no config()", "it has confg()")),
        ("def config(): ...\n", ("returns nothing (None)", "must return an Experiment")),
        ("def config(): return 3\n", ("type int", "must return an Experiment")),
        ("def config():\n    return {}['a']\n", ("mine.py, line 2: `return {}['a']`", "KeyError: 'a'")),
        ("from .base import X\n", ("mine.py, line 1: `from .base", "`from base import X`", "`from package.base import X`")),
        ("import nothing_of_this_name\n", ("mine.py, line 1", "No module named 'nothing_of_this_name'")),
        ("def config(:\n", ("line 1: `def config(:`", "is not Python")),
        ("def config(a): ...\n", ("config() missing 1 required positional argument",)),
        (BASE + "def config(): return replace(quickstart(), batch=0)\n", ("line 3", "batch is 0", "at least 1")),
        (BASE + "def config(): return replace(quickstart(), stepz=1)\n", ("line 3", "'stepz'")),
        (
            "from experiments.config import Devices\ndef config(): return Devices(cound=3)\n",
            ("line 2", "'cound'", "count"),
        ),
        ("from pathlib import Path\nfrom experiments.config import load\n"
         "def config(): return load(Path(__file__))\n", ("mine.py", "without end")),
    ],
)  # fmt: skip
def test_a_bad_config_file_is_one_paragraph_with_its_line(
    tmp_path: Path, text: str, said: tuple[str, ...]
) -> None:
    with refused("mine.py", *said):
        load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\xff\xfe", ("is not Python", "can't decode byte 0xff in position 0")),
        (b"x = 'caf\xe9'\n", ("is not Python", "can't decode byte 0xe9")),
        (b"x = 1\0\n", ("is not Python", "null bytes")),
    ],
)
@pytest.mark.parametrize("helper", ["", "helper"])
def test_a_file_that_is_no_text_is_one_paragraph(
    raw: bytes, said: tuple[str, ...], helper: str, tmp_path: Path
) -> None:
    path = write(tmp_path, "import helper\n")
    (tmp_path / f"{helper or 'mine'}.py").write_bytes(raw)
    with refused(str(tmp_path), *said):
        load(path)


def test_a_file_may_name_its_encoding(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    own = BASE + "def config(): return replace(quickstart(), name='caf\xe9')\n"
    path.write_bytes(b"# -*- coding: latin-1 -*-\n" + own.encode("latin-1"))
    assert load(path).name == "caf\xe9"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (ROOT / "configs" / "quickstrt.py", ("There is no file", "Perhaps", "configs/quickstart.py")),
        (ROOT / "configs", ("is a folder", "quickstart.py")),
        (ROOT / "LICENSE", ("is no Python file",)),
        (Path("/nowhere/zzzzzz.py"), ("There is no file /nowhere/zzzzzz.py", "configs/quickstart.py")),
    ],
)
def test_a_path_that_is_no_config_says_what_there_is(path: Path, said: tuple[str, ...]) -> None:
    with refused(*said):
        load(path)


def test_a_rule_kept_beside_the_config_is_imported_and_its_errors_are_placed(tmp_path: Path) -> None:
    helper = OWN_RULE.replace("def own(axis: str = 'data')", "def mine()").replace("axis}", "'data'}")
    config = BASE + "from my_rule import mine\ndef config(): return replace(quickstart(), rules=mine())\n"
    write(tmp_path / "a", helper, "my_rule.py")
    assert repr(load(write(tmp_path / "a", config)).rules) == "mine()"

    write(tmp_path / "b", helper.replace("def mine()", "def mine(x: int = 1)"), "my_rule.py")
    config = config.replace("mine())", "mine(x=2))")
    assert "2" in repr(load(write(tmp_path / "b", config)).rules), "each config has the helper beside it"

    write(tmp_path / "c", "def mine():\n    return 1 / 0\n", "my_rule.py")
    with refused("my_rule.py, line 2: `return 1 / 0`", "ZeroDivisionError"):
        load(write(tmp_path / "c", BASE + "from my_rule import mine\ndef config(): return mine()\n"))


def test_a_helper_that_something_installed_hides_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "A = 1\n", "calendar.py")
    with refused("imports 'calendar'", "Rename the file"):
        load(write(tmp_path, "import calendar\n"))


@pytest.mark.parametrize(
    ("helper", "text"),
    [
        ("models/own.py", "from models.own import OWN\n"),
        ("models/own.py", "import models.own\n"),
        ("models/own.py", "from models import own\n"),
        ("models/own.py", "def config():\n    from models.own import OWN\n"),
        ("models/own/__init__.py", "from models.own import OWN\n"),
        ("models/transformer.py", "from models.transformer import OWN\n"),
        ("models/__init__.py", "from models import OWN\n"),
        ("models.py", "from models import OWN\n"),
        ("experiments/data/own.py", "from experiments.data.own import OWN\n"),
        ("models/own.py", "import hlp\n"),
    ],
)
def test_a_helper_that_a_package_of_shardlab_hides_is_refused(helper: str, text: str, tmp_path: Path) -> None:
    write((tmp_path / helper).parent, "OWN = 1\n", Path(helper).name)
    write(tmp_path, "def late():\n    from models.own import OWN\n", "hlp.py")
    package = helper.partition("/")[0].removesuffix(".py")
    with refused(str(tmp_path / package), f"shardlab's own package {package}", str(ROOT / package), "Rename"):
        load(write(tmp_path, text))


def test_what_bears_the_name_of_a_package_of_shardlab_may_lie_beside_a_config(tmp_path: Path) -> None:
    write(tmp_path / "models", "OWN = 1\n", "__init__.py")
    for folder, name in (
        ("models", "own"),
        ("models", "mlp_config"),
        ("experiments", "config"),
        ("tests", "a"),
    ):
        write(tmp_path / folder, "OWN = 1\n", f"{name}.py")
    text = (
        "import experiments.config\nimport models\nfrom models.mlp_config import *\n"
        "from models.transformer_config import TransformerConfig\ndef config(): return quickstart()\n"
    )
    origin = Origin(write(tmp_path, BASE + text))
    (tmp_path / "run").mkdir()
    write_run_config(tmp_path / "run", origin, origin.experiment())
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"source.py", "config.json", "config.py"}


def test_the_working_folder_first_on_the_path_hides_no_copy_of_a_helper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `python -m` puts the working folder first; a run folder has copies of the helpers beside its config.
    here, run = tmp_path / "here", tmp_path / "run"
    config = BASE + "import hlp, pkg\ndef config(): return replace(quickstart(), batch=hlp.A * pkg.B)\n"
    for folder in (here, run):
        write(folder, "A = 4\n", "hlp.py")
        write(folder / "pkg", "B = 16\n", "__init__.py")
    monkeypatch.setattr(sys, "path", [str(here), *sys.path])
    for name in ("hlp", "pkg"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert load(write(here, config)).batch == 64
    assert load(write(run, config)).batch == 64
    write(run / "pkg", "C = 1\n", "more.py")
    with refused("imports 'pkg'", "Rename the file"):
        load(write(run, config))
    (run / "pkg" / "more.py").unlink()
    write(run, "A = 8\n", "hlp.py")
    with refused("imports 'hlp'", "Rename the file"):
        load(write(run, config))


def test_an_edit_within_the_same_second_is_seen(tmp_path: Path) -> None:
    for batch in (16, 32, 64):
        path = write(tmp_path, BASE + f"def config(): return replace(quickstart(), batch={batch})\n")
        os.utime(path, (1e9, 1e9))
        assert load(path).batch == batch


# Values.


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": 0}, ("steps is 0", "at least 1")),
        ({"steps": "60"}, ("steps is '60'", "whole number")),
        ({"steps": True}, ("steps is True", "whole number")),
        ({"batch": 16, "accumulate": 3}, ("16 rows", "3 micro-batches", "remainder is 1")),
        ({"seed": -1}, ("seed is -1",)),
        ({"seed": 2**32}, ("seed is 4294967296", "at most 4294967295", "32 bits")),
        ({"steps": 2**31 - 1}, ("steps is 2147483647", "at most 2147483646", "32 bits")),
        ({"log_every": 0}, ("log_every is 0",)),
        ({"name": "a/b"}, ("name is 'a/b'", "folder")),
        ({"name": ""}, ("name is ''",)),
        ({"name": "NaN"}, ("name is 'NaN'", "in records NaN, Infinity", "other letters")),
        ({"name": "caf\udce9"}, ("name is 'caf\\udce9'", "other letters")),
        ({"rules": data}, ("rules is", "function", "has a Rules")),
        ({"model": 3}, ("model is", "int", "ModelConfig")),
        ({"partitioner": "manual"}, ("partitioner is", "str", "Manual or Auto")),
    ],
)
def test_a_value_that_cannot_be_is_refused(
    quickstart: Experiment, changed: dict[str, object], said: tuple[str, ...]
) -> None:
    with refused(*said):
        dataclasses.replace(quickstart, **changed)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("field", "value"),
    [("peak", 0.0), ("warmup", -1), ("warmup", 2.5), ("warmup", 2**31), ("floor", 2.0), ("b1", 1.0), ("b2", -0.1), ("eps", 0.0),
     ("weight_decay", -1.0), ("clip", 0.0), ("peak", math.nan), ("clip", math.nan)],
)  # fmt: skip
def test_adamw_refuses_numbers_out_of_range(field: str, value: Any) -> None:
    with refused(f"optimizer.{field} is {value!r}"):
        AdamW(**{field: value})


def test_the_schedule_is_linear_then_cosine_and_the_clip_is_of_the_global_norm() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    adamw = AdamW(peak=2e-3, warmup=4, floor=0.25)
    rate = adamw.schedule(20)(jnp.arange(21)).tolist()
    assert rate[:5] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3], rel=1e-6)
    assert rate[20] == pytest.approx(5e-4, rel=1e-5)
    cosine = optax.cosine_decay_schedule(2e-3, 16, alpha=0.25)
    assert rate[4:] == pytest.approx(np.asarray(cosine(jnp.arange(17.0))).tolist(), rel=1e-5)
    assert float(adamw.schedule(2)(1)) == pytest.approx(1e-3), "a run shorter than its warm-up"

    decaying = AdamW(peak=0.1, warmup=0, floor=1.0, weight_decay=0.5)
    params: Any = {"matrix": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    with jax.numpy_dtype_promotion("standard"):  # as the train step does: optax raises b1 to an integer count
        optimizer = decaying.build(9, {"matrix": True, "scale": False})
        still = jax.tree.map(jnp.zeros_like, params)
        updates: Any = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(still, params)
    np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)  # rate x decay, and no gradient
    np.testing.assert_array_equal(updates["scale"], 0.0)


def test_an_optimizer_says_where_it_clips(quickstart: Experiment) -> None:
    @dataclasses.dataclass(frozen=True)
    class Plain:
        def schedule(self, steps: int) -> Any: ...

        def build(self, steps: int, matrices: Any = None) -> Any: ...

    with refused("optimizer is a value of type Plain", "it lacks largest_norm"):
        dataclasses.replace(quickstart, optimizer=Plain())  # pyright: ignore[reportArgumentType]
    with refused("optimizer is a value of type int, but an experiment has a Optimizer there. Change"):
        dataclasses.replace(quickstart, optimizer=3)  # pyright: ignore[reportArgumentType]


# Overrides.


NUMBERS = [flag for flag, leaf in _leaves(load(QUICKSTART)) if leaf.type is float]


@pytest.mark.parametrize("flag", NUMBERS)
@pytest.mark.parametrize("written", ["--{} nan", "--{}=NaN", "--{} inf", "--{} 1e999"])
def test_a_number_that_is_not_finite_is_refused_by_its_flag(
    quickstart: Experiment, flag: str, written: str
) -> None:
    words = written.format(flag).split()
    clips = flag == "optimizer.clip"
    if clips and written in ("--{} inf", "--{} 1e999"):
        assert apply(quickstart, words).optimizer.largest_norm() == math.inf
        return
    with refused(f"--{flag} ", f"give a finite number{', or inf (no clipping)' if clips else ''}."):
        apply(quickstart, words)


def test_the_numbers_that_must_be_finite_are_there() -> None:
    assert {"optimizer.peak", "optimizer.clip", "model.theta", "sample.temperature"} <= set(NUMBERS)


def test_overrides_are_typed_from_the_value(quickstart: Experiment) -> None:
    words = (
        "--mesh.tensor 4 --steps 20 --model.layers=2 --optimizer.peak 1e-3 --data.tests include --log-every 7"
    )
    made = apply(quickstart, [*words.split(), "--optimizer.clip", "inf", "--sample.prompt", "class A:"])
    model = quickstart.model
    assert isinstance(model, TransformerConfig)
    assert isinstance(quickstart.optimizer, AdamW)
    expected = dataclasses.replace(
        quickstart,
        mesh=dataclasses.replace(quickstart.mesh, tensor=4),
        steps=20,
        log_every=7,
        model=dataclasses.replace(model, layers=2),
        optimizer=dataclasses.replace(quickstart.optimizer, peak=1e-3, clip=math.inf),
        data=dataclasses.replace(quickstart.data, tests="include"),  # pyright: ignore[reportArgumentType]
        sample=dataclasses.replace(quickstart.sample, prompt="class A:"),
    )
    assert made == expected


def test_rules_and_partitioner_are_expressions(quickstart: Experiment, tmp_path: Path) -> None:
    assert apply(quickstart, ["--rules", "data | fsdp(axis='data')"]).rules == data() | fsdp(axis="data")
    assert apply(quickstart, ["--rules", repr(quickstart.rules)]).rules == quickstart.rules
    assert apply(quickstart, ["--partitioner", "auto"]).partitioner == Auto()
    kept = apply(quickstart, ["--partitioner", "manual(gathered='keep')"])
    assert kept.partitioner == Manual(gathered="keep")
    assert apply(kept, ["--steps", "5"]).partitioner == Manual(gathered="keep")

    write(tmp_path, "from sharding.rules.data import data\ndef rules(): return data()\n", "own.py")
    assert apply(quickstart, ["--rules", "own.py"], base=tmp_path).rules == data()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mesh.tensr", "4"], ("no value --mesh.tensr", "perhaps --mesh.tensor?")),
        (["--tensor", "4"], ("perhaps --mesh.tensor?",)),
        (["--warmpu=4"], ("no value --warmpu", "perhaps --optimizer.warmup?")),
        (["--qqqqq"], ("no value --qqqqq", "--help")),
        (["--steps", "abc"], ("--steps abc", "a whole number", " now", "invalid literal")),
        (["--steps", "1.5"], ("--steps 1.5", "a whole number")),
        (["--steps"], ("--steps cannot be read", "a whole number")),
        (["--steps", "2", "3"], ("3",)),
        (["20"], ("'20' belongs to no flag",)),
        (["--model.dtype", "int8"], ("one of float32, bfloat16",)),
        (["--optimizer.peak", "high"], ("--optimizer.peak high", "a number")),
        (["--optimizer.floor", "3"], ("optimizer.floor is 3.0", "from 0 to 1")),
        (["--batch", "16", "--accumulate", "3"], ("16 rows", "3 micro-batches")),
        (["--devices.count", "-1"], ("devices.count is -1", '"present"')),
        (["--partitioner", "manul"], ("'manul'", "nearest: 'manual'")),
        (["--partitioner", "manual(keep=1)"], ("manual takes", "'keep'")),
        (["--rules", "data | fsd"], ("'fsd'", "nearest: 'fsdp'", f"The rules are {RULES}")),
        (["--rules", "data | fsdp(axes='data')"], ("fsdp takes", "'axes'")),
        (["--rules", "data & fsdp"], ("`data & fsdp`", "joined by |")),
        (["--rules", "data | fsdp(axis=open('x'))"], ("`open('x')`", "literal arguments")),
        (["--rules", "data |"], ("cannot be read",)),
        (["--rules", "missing.py"], ("There is no file missing.py",)),
    ],
)
def test_a_bad_override_is_one_paragraph(
    quickstart: Experiment, words: list[str], said: tuple[str, ...]
) -> None:
    with refused(*said):
        apply(quickstart, words)


def test_a_rule_file_is_held_to_its_contract(quickstart: Experiment, tmp_path: Path) -> None:
    write(tmp_path, "def rule(): ...\n", "a.py")
    with refused("has no rules()", "it has rule()", "def rules() -> Rules"):
        apply(quickstart, ["--rules", "a.py"], base=tmp_path)
    write(tmp_path, "def rules(): return 'data'\n", "b.py")
    with refused("returns a str", "must return Rules"):
        apply(quickstart, ["--rules", "b.py"], base=tmp_path)


# JSON and hash.


@pytest.mark.parametrize("word", ["--steps 61", "--rules data|fsdp", "--mesh.slices 2", "--optimizer.eps 1e-7",
                                  "--partitioner auto", "--model.dtype bfloat16", "--data.length 128"])  # fmt: skip
def test_every_value_counts_in_the_hash(quickstart: Experiment, word: str) -> None:
    changed = apply(quickstart, word.split())
    assert config_hash(changed) != config_hash(quickstart)


def test_the_hash_is_the_same_in_every_process_and_loading_imports_no_jax(quickstart: Experiment) -> None:
    program = (
        "import sys; from experiments.config import load, config_hash; from experiments.overrides import apply\n"
        "e = apply(load('configs/quickstart.py'), ['--steps', '7', '--rules', 'data', '--partitioner', 'auto'])\n"
        "print(config_hash(e), 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = apply(quickstart, ["--steps", "7", "--rules", "data", "--partitioner", "auto"])
    assert done.stdout.strip() == f"{config_hash(here)} False"


def test_json_names_classes_and_a_class_of_the_config_file_has_no_place(tmp_path: Path) -> None:
    text = (
        BASE
        + "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Mine:\n    a: float = 1e-5\n"
        "    b: tuple[int, ...] = (1, 2)\n    c: float = float('inf')\n    def build(self): ...\n"
        "def config(): return replace(quickstart(), model=Mine())\n"
    )
    one, two = load(write(tmp_path / "a", text)), load(write(tmp_path / "b", text, "other.py"))
    document = to_json(one)
    assert document["model"] == {"class": "Mine", "a": 1e-5, "b": [1, 2], "c": "inf"}
    assert document["optimizer"]["class"] == "experiments.optimizers.AdamW"
    assert document["rules"] == "data() | fsdp() | tensor()"
    assert config_hash(one) == config_hash(two)
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    assert config_hash(one) == hashlib.sha256(canonical.encode()).hexdigest()
    assert to_json(apply(one, ["--model.a", "2"]))["model"]["a"] == 2.0


def test_a_value_that_cannot_be_recorded_is_named(tmp_path: Path) -> None:
    text = (
        BASE
        + "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Mine:\n    a: object = print\n"
        "    def build(self): ...\ndef config(): return replace(quickstart(), model=Mine())\n"
    )
    with refused("at model.a", "cannot be recorded"):
        config_hash(load(write(tmp_path, text)))


# A run's config runs again.


def test_a_run_config_gives_the_same_value_after_everything_it_came_from_is_gone(tmp_path: Path) -> None:
    away, run, again = tmp_path / "away", tmp_path / "run", tmp_path / "again"
    write(away, OWN_RULE, "own_rule.py")
    write(away, "from own_rule import own\ndef rules(): return own() | own(axis='fsdp')\n", "chain.py")
    text = (
        BASE + "from own_rule import own\ndef config(): return replace(quickstart(), rules=own(), seed=5)\n"
    )
    origin = Origin(
        write(away, text), ("--steps", "9", "--rules", str(away / "chain.py"), "--mesh.data", "-1")
    )
    experiment = origin.experiment()
    assert repr(experiment.rules).count("own(") == 2
    run.mkdir()
    write_run_config(run, origin, experiment)
    shutil.rmtree(away)
    del sys.modules["own_rule"]
    moved = tmp_path / "moved"
    run.rename(moved)
    assert to_json(load(moved / "config.py")) == to_json(experiment)
    assert json.loads((moved / "config.json").read_text())["config_hash"] == config_hash(experiment)

    second = Origin(moved / "config.py", ("--steps", "11"))
    longer = second.experiment()
    assert to_json(longer) == to_json(dataclasses.replace(experiment, steps=11))
    again.mkdir()
    write_run_config(again, second, longer)
    shutil.rmtree(moved)
    assert to_json(load(again / "config.py")) == to_json(longer)


def test_a_run_keeps_what_is_imported_of_a_folder_without_init(tmp_path: Path) -> None:
    away, run = tmp_path / "away", tmp_path / "run"
    write(away / "lib", "from .more import SEED\nfrom spaced.deep import whole\n", "util.py")
    write(away / "lib", "SEED = 5\n", "more.py")
    write(away / "lib", "1 / 0\n", "unused.py")
    write(away / "spaced" / "deep" / "whole", "from .part import STEPS\n", "__init__.py")
    write(away / "spaced" / "deep" / "whole", "STEPS = 9\n", "part.py")
    write(away / "numpy", "", "not_numpys.py")
    text = (
        BASE + "import numpy\nfrom lib import util\n"
        "def config(): return replace(quickstart(), seed=util.SEED, steps=util.whole.STEPS)\n"
    )
    origin = Origin(write(away, text))
    experiment = origin.experiment()
    assert (experiment.seed, experiment.steps) == (5, 9)
    run.mkdir()
    write_run_config(run, origin, experiment)
    kept = {str(p.relative_to(run)) for p in run.rglob("*.py")} - {"config.py", "source.py"}
    assert kept == {f"lib/{n}.py" for n in ("util", "more")} | {
        f"spaced/deep/whole/{n}.py" for n in ("__init__", "part")
    }
    assert Path(sys.modules["lib.util"].__file__ or "").is_relative_to(away), "what trains is what was loaded"
    shutil.rmtree(away)
    assert to_json(load(run / "config.py")) == to_json(experiment)

    other = tmp_path / "other"
    write(other / "lib", "SEED = 7\n", "util.py")
    text = BASE + "from lib import util\ndef config(): return replace(quickstart(), seed=util.SEED)\n"
    assert load(write(other, text)).seed == 7, "each config has the folder beside it"


def test_a_run_is_checked_without_what_lies_beside_the_original(tmp_path: Path) -> None:
    write(tmp_path / "lib", "SEED = 5\n", "hidden_from_source.py")
    text = (
        BASE + "import importlib\nseed = importlib.import_module('lib.hidden_from_source').SEED\n"
        "def config(): return replace(quickstart(), seed=seed)\n"
    )
    origin = Origin(write(tmp_path, text))
    experiment, path, modules = origin.experiment(), list(sys.path), set(sys.modules)
    (tmp_path / "run").mkdir()
    with refused("that import statements name", "does not run again", "No module named 'lib'"):
        write_run_config(tmp_path / "run", origin, experiment)
    assert sys.path == path
    assert modules <= set(sys.modules)
    assert load(origin.path).seed == 5


def test_a_folder_without_init_that_something_installed_hides_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "calendar", "A = 1\n", "mine.py")
    with refused("imports 'calendar.mine'", "calendar.py already", "Rename"):
        load(write(tmp_path, "from calendar.mine import A\n"))


def test_a_run_config_whose_values_changed_names_them(tmp_path: Path, quickstart: Experiment) -> None:
    path = write(tmp_path / "c", BASE + "def config(): return replace(quickstart(), seed=3)\n")
    run = tmp_path / "run"
    run.mkdir()
    origin = Origin(path, ("--steps", "9"))
    write_run_config(run, origin, origin.experiment())
    copy = run / "source.py"
    copy.write_text(copy.read_text().replace("seed=3", "seed=4, batch=8"))
    with refused("seed: recorded 3, now 4", "batch: recorded 16, now 8", "--steps 9"):
        load(run / "config.py")
    (run / "config.json").write_text("{")
    with refused("config.json beside it cannot be read"):
        load(run / "config.py")


def test_a_config_that_depends_on_the_clock_is_refused_when_the_run_begins(tmp_path: Path) -> None:
    text = (
        BASE
        + "import time\ndef config(): return replace(quickstart(), seed=time.perf_counter_ns() % 2**32)\n"
    )
    origin = Origin(write(tmp_path, text))
    (tmp_path / "run").mkdir()
    with refused("seed: recorded", "depends on time"):
        write_run_config(tmp_path / "run", origin, origin.experiment())


def test_a_run_folder_that_cannot_be_written_and_a_reserved_name_are_refused(tmp_path: Path) -> None:
    origin = Origin(QUICKSTART)
    (tmp_path / "file").write_text("")
    with refused("cannot be written", "Not a directory"):
        write_run_config(tmp_path / "file", origin, origin.experiment())

    write(tmp_path, "SEED = 3\n", "source.py")
    text = BASE + "from source import SEED\ndef config(): return replace(quickstart(), seed=SEED)\n"
    origin = Origin(write(tmp_path, text))
    (tmp_path / "run").mkdir()
    with refused("has its own source.py", "another name"):
        write_run_config(tmp_path / "run", origin, origin.experiment())
