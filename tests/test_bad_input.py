"""Every bad input ends in one paragraph that says what to change, exit code 2, and no folder left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from experiments import devices
from experiments.data.text import Text
from models.mlp_config import MLPConfig
from models.transformer_config import TransformerConfig
from sharding.errors import InputError
from tests.small import ROOT, place, shardlab, start

pytestmark = pytest.mark.usefixtures("at_home")

RULES = """
from sharding.rule import Rule, Rules, rule
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.tensor import tensor


@rule
def extra() -> Rule:
    return Rule(ARGUMENTS)


def rules() -> Rules:
    return data() | fsdp() | tensor() | extra()
"""


def refused(
    capsys: pytest.CaptureFixture[str], command: str, *words: object, config: str = "small.py"
) -> str:
    """The paragraph with which a command refuses; asserts all that is promised of it."""
    runs = ("--runs", "runs") if command == "train" and "--runs" not in words else ()
    assert shardlab(command, config, *runs, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("shardlab: ")
    assert said.count("\n") == 1
    assert "Traceback" not in said
    assert not Path("runs").exists(), "a run folder was left behind"
    return said


OVERRIDES = {
    "unknown axis": (("--mesh.dta", 2), "--mesh.data"),
    "axis given twice": (("--mesh.data", 2, "--mesh.data", 2), "'data' twice"),
    "axis given twice, written otherwise": (("--mesh.data=2", "--mesh.data", 4), "sizes 2 and 4"),
    "product of axes": (("--mesh.data", 4), "asks for 16 devices, but there are 8"),
    "two axes to fill": (("--mesh.data", -1, "--mesh.fsdp", -1), "Only one mesh axis may be -1"),
    "an axis that cannot be filled": (("--mesh.data", -1, "--mesh.fsdp", 3), "cannot be filled"),
    "a dim that does not divide": (
        ("--mesh.data", 1, "--mesh.tensor", 4),
        "splits kv_heads = 2 into 4 parts",
    ),
    "a batch that does not divide": (("--batch", 18), "multiple of 4"),
    "micro-batches that do not divide": (("--accumulate", 8), "micro-batches"),
    "an axis that no rule uses": (("--rules", "data | fsdp"), "Mesh axis tensor has 2 devices"),
    "heads that do not fit": (("--model.kv-heads", 3), "must divide heads"),
    "no heads": (("--model.kv-heads", 0), "kv_heads=0, but every size must be at least 1"),
    "an axis given twice, first as no number": (
        ("--mesh.tensor", "x", "--mesh.tensor", 2),
        "--mesh.tensor x cannot be read",
    ),
    "json into a folder": (("--json", "corpus"), "--json corpus cannot be written"),
    "json where nothing can be made": (
        ("--json", "/proc/x/y.json"),
        "--json /proc/x/y.json cannot be written",
    ),
}


@pytest.mark.parametrize("command", ["explain", "train"])
@pytest.mark.parametrize("what", OVERRIDES)
def test_overrides(what: str, command: str, capsys: pytest.CaptureFixture[str]):
    words, says = OVERRIDES[what]
    assert says in refused(capsys, command, *words)


RULE_FAULTS = {
    "two rules for one dim": ('compute={"mlp": "data"}', "two rules for the dim mlp"),
    "one axis used twice": ('compute={"embed": "tensor"}', "axis 'tensor', which rule tensor()"),
    "an axis that does not exist": ('param={"embed": "tenosr"}', "(nearest: 'tensor')"),
    "a rule that no array uses": ('param={"expert": "expert"}', "is used by no array"),
    "a rule whose name no array has": (
        'param={"embd": "data"}',
        "extra()",
    ),
}


@pytest.mark.parametrize("command", ["explain", "train"])
@pytest.mark.parametrize("what", RULE_FAULTS)
def test_rules(what: str, command: str, capsys: pytest.CaptureFixture[str]):
    arguments, says = RULE_FAULTS[what]
    Path("rules.py").write_text(RULES.replace("ARGUMENTS", arguments))
    said = refused(capsys, command, "--rules", "rules.py")
    assert says in said
    assert "rules.py:8" in said, "the rule's file and line"


@pytest.mark.parametrize("command", ["explain", "train"])
def test_a_logical_name_that_no_rule_knows(command: str, capsys: pytest.CaptureFixture[str]):
    Path("named.py").write_text(
        Path("small.py").read_text()
        + """

@dataclasses.dataclass(frozen=True)
class Misnamed:
    inner: object
    vocab: int = 256

    def build(self):
        from sharding.params import normal, param

        model = self.inner.build()
        model.odd = param("embde mlp", (32, 64), normal(1.0))
        return model


small = config


def config():
    return replace(small(), model=Misnamed(small().model))
"""
    )
    said = refused(capsys, command, config="named.py")
    assert "'embde', a logical name that no rule knows (nearest: 'embed')" in said


CONFIGS = {
    "no config()": ("x = 1\n", "no config()"),
    "config() returns nothing": ("def config():\n    pass\n", "must return an Experiment"),
    "config() raises": ("def config():\n    return 1 / 0\n", "division by zero"),
    "a syntax error": ("def config(:\n", "bad.py"),
}


@pytest.mark.parametrize("command", ["explain", "train"])
@pytest.mark.parametrize("what", CONFIGS)
def test_configs(what: str, command: str, capsys: pytest.CaptureFixture[str]):
    text, says = CONFIGS[what]
    Path("bad.py").write_text(text)
    assert says in refused(capsys, command, config="bad.py")


def test_a_missing_config(capsys: pytest.CaptureFixture[str]):
    assert "nowhere.py" in refused(capsys, "train", config="nowhere.py")


def test_a_missing_corpus(capsys: pytest.CaptureFixture[str]):
    assert "'gone'" in refused(capsys, "train", "--data.path", "gone")


def test_an_empty_corpus(capsys: pytest.CaptureFixture[str]):
    Path("void").mkdir(exist_ok=True)
    (Path("void") / "empty.txt").touch()
    assert "corpus is empty" in refused(capsys, "train", "--data.path", "void")


def test_a_corpus_shorter_than_one_row(capsys: pytest.CaptureFixture[str]):
    Path("short").mkdir(exist_ok=True)
    (Path("short") / "a.txt").write_text("a few bytes")
    (Path("short") / "b.txt").write_text("a few more")
    refused(capsys, "train", "--data.path", "short")


def test_a_corrupt_token_file(capsys: pytest.CaptureFixture[str]):
    """Bytes of the written tokens are lost after they were written: found when they are opened the next time."""
    shutil.copytree("corpus", "spoiled", dirs_exist_ok=True)
    Text(path="spoiled", length=32).open(Path(".cache/data"))
    (folder,) = (f for f in Path(".cache/data").glob("*spoiled*") if f.is_dir())
    file = max((f for f in folder.iterdir() if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    assert str(file.name) in refused(capsys, "train", "--data.path", "spoiled")


def test_model_and_data_of_other_sizes(capsys: pytest.CaptureFixture[str]):
    assert "model.length and data.length" in refused(capsys, "train", "--data.length", 64)
    assert "model.vocab" in refused(capsys, "train", "--model.vocab", 128)


@pytest.mark.parametrize("place_", ["small.py", "small.py/below", "/proc/shardlab"])
def test_a_run_folder_that_cannot_be_written(place_: str, capsys: pytest.CaptureFixture[str]):
    said = refused(capsys, "train", "--runs", place_)
    assert "cannot be written" in said
    assert "--runs" in said


@pytest.mark.parametrize(
    ("words", "says", "left"),
    [
        (("train", "small.py", "--data.path", "nowhere"), "nowhere", set()),
        (("verify", "small.py", "--data.path", "nowhere"), "nowhere", set()),
        # Refused after the corpus was made into token files: these serve the next command.
        (("train", "small.py", "--rules", "data"), "no rule", {"data"}),
    ],
    ids=["train", "verify", "rules"],
)
def test_a_first_command_that_is_refused_leaves_nothing(
    words: tuple[str, ...], says: str, left: set[str], tmp_path: Path
):
    place(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    process = start(tmp_path, *words, JAX_COMPILATION_CACHE_DIR="")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert says in said
    assert {p.name for p in tmp_path.iterdir()} - before == ({".cache"} if left else set())
    assert {p.name for p in tmp_path.glob(".cache/*")} == left


def test_compiled_programs_are_kept_from_the_first_on(tmp_path: Path):
    program = (
        "import os, jax; from experiments import devices\n"
        "devices.cache_compilations('a/jax')\n"
        "assert not os.path.exists('a')\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: x * 2)(1.0)\n"
        "assert any(name.startswith('jit') for name in os.listdir('a/jax'))\n"
    )
    given = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=given, check=True)


def test_a_file_where_the_compiled_programs_belong(tmp_path: Path):
    place(tmp_path)
    (tmp_path / ".cache").touch()
    process = start(tmp_path, "train", "small.py", JAX_COMPILATION_CACHE_DIR="")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert ".cache/jax" in said
    assert "cannot be written" in said


@pytest.mark.parametrize("chosen", [False, True], ids=["programs", "data"])
def test_a_working_folder_in_which_nothing_can_be_made(chosen: bool, tmp_path: Path):
    """/proc takes no file, not even of root: where programs are cached elsewhere, it is the data that find no place."""
    place(tmp_path)
    chooses = str(tmp_path / "programs") if chosen else ""
    words = ("train", str(tmp_path / "small.py"), "--data.path", str(tmp_path / "corpus"))
    process = start(
        Path("/proc"), *words, "--runs", str(tmp_path / "runs"), JAX_COMPILATION_CACHE_DIR=chooses
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert f".cache/{'data' if chosen else 'jax'}" in said
    assert "Work in a folder that is writable" in said
    assert "JAX_COMPILATION_CACHE_DIR" not in said, "another folder for programs would not do"
    assert not (tmp_path / "runs").exists()


def test_a_file_where_the_runs_of_a_name_belong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "small").touch()
    assert "cannot be written" in refused(capsys, "train", "--runs", tmp_path)
    assert (tmp_path / "small").is_file()


def test_more_devices_than_present(capsys: pytest.CaptureFixture[str]):
    words = ("--devices.kind", "present", "--devices.count", 9, "--mesh.data", 9)
    said = refused(capsys, "train", *words)
    assert "asks for 9 devices, but 8 are present" in said


def test_more_pretend_devices_than_one_process_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("a backend was started"))
    said = refused(capsys, "train", "--devices.count", 100_000, "--mesh.data", -1)
    assert "at most 2048" in said
    assert "explain" in said


def test_the_most_pretend_devices_run_a_program(tmp_path: Path):
    program = (
        "import jax, jax.numpy as jnp; from experiments import devices; from experiments.config import Devices\n"
        "found = devices.start(Devices(count=devices.MOST_PRETEND))\n"
        "mesh = jax.sharding.Mesh(found, 'd')\n"
        "place = jax.NamedSharding(mesh, jax.P('d'))\n"
        "print(int(jax.jit(lambda x: x * 2, out_shardings=place)(jnp.ones(len(found), int)).sum()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(2 * devices.MOST_PRETEND), done.stderr[-500:]


def test_a_platform_that_cannot_start_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def raising() -> None:
        raise AssertionError

    monkeypatch.setattr(jax, "devices", raising)
    said = refused(capsys, "train", "--devices.kind", "present", "--devices.count", 8)
    assert "cannot start the devices" in said
    assert "JAX_PLATFORMS" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--processes.count", 2), "processes.coordinator"),
        (("--processes.coordinator", "127.0.0.1:1", "--processes.count", 3), "split evenly over 3 processes"),
        (("--processes.coordinator", "auto"), "--processes.count"),
        (("--processes.coordinator", "here", "--processes.count", 2), "host:port"),
        (
            ("--processes.coordinator", "127.0.0.1:1", "--processes.count", 2, "--processes.index", 2),
            "from 0 to 1",
        ),
    ],
)
def test_processes(
    words: tuple[object, ...], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "_connect", lambda *_: pytest.fail("it tried to connect"))
    assert says in refused(capsys, "train", *words)


@pytest.mark.parametrize(
    "name", ["vocab", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "length"]
)
@pytest.mark.parametrize("size", [0, -8])
def test_transformer_sizes_below_one(name: str, size: int):
    with pytest.raises(InputError, match=f"{name}={size}, .* Set model.{name} to 1"):
        replace(TransformerConfig(), **{name: size})


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_base_of_rotary_frequencies_that_is_not_positive_and_finite(theta: float):
    with pytest.raises(InputError, match="theta="):
        TransformerConfig(theta=theta)


@pytest.mark.parametrize("name", ["features", "embed", "mlp", "layers", "classes"])
def test_mlp_sizes_below_one(name: str):
    assert getattr(MLPConfig(**{name: 1}), name) == 1
    with pytest.raises(InputError, match=f"{name}=0, .* Set model.{name} to 1"):
        MLPConfig(**{name: 0})


def test_explain_into_a_reader_that_leaves(home: Path):
    process = start(home, "explain", "small.py")
    assert process.stdout is not None
    process.stdout.close()  # before anything is printed: the process is still importing
    assert process.wait(timeout=60) == 141


def test_the_command_itself_shows_no_traceback(home: Path):
    process = start(home, "train", "small.py", "--runs", "runs", "--mesh.data", 4)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.count("\n") == 1
    assert not (home / "runs").exists()
    process = start(home, "explain", "small.py", "--mesh.data", 4, "--debug")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" in said
