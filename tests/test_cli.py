"""The `shardlab` command: commands found by place, one paragraph for bad input, exit codes, nothing heavy imported."""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import experiments.commands
from experiments import cli
from experiments.commands import train
from sharding.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = "configs/quickstart.py"

PROBE = '''"""Shows what it was given.

At length.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments import cli


@dataclass(frozen=True)
class Flags:
    """Its own flags."""

    json: Path | None = None
    """Write the result to this file."""
    resume: bool = False
    """Go on."""


def main(argv: list[str]) -> int:
    if argv == ["bug"]:
        raise RuntimeError("a bug")
    if argv == ["wait"]:
        print("ready", flush=True)
        time.sleep(60)
    if argv == ["talk"]:
        for _ in range(100000):
            print("x" * 80)
        return 0
    experiment, flags, origin = cli.read(argv, Flags)
    print(experiment.steps, experiment.mesh.tensor, flags, origin.overrides, "jax" in sys.modules)
    return 0
'''

START = """
import sys
from pathlib import Path
import experiments.commands
from experiments import cli
cli.COMMANDS = Path(sys.argv[1])
experiments.commands.__path__ = [sys.argv[1]]
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands with one file dropped into it, `probe`, in place of the real ones."""
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    monkeypatch.setattr(cli, "COMMANDS", tmp_path)
    monkeypatch.setattr(experiments.commands, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "experiments.commands.probe", raising=False)
    monkeypatch.chdir(ROOT)
    return tmp_path


def shardlab(commands: Path, *words: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, with the commands of that folder."""
    arguments = [sys.executable, "-c", START, str(commands), *words]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_help_lists_every_command_of_the_folder(
    commands: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    (commands / "longer.py").write_text(f'"""{"Long " * 30}end."""\n')
    (commands / "other.py").write_text('"""Does another thing."""\nraise SystemExit("imported")\n')
    (commands / "broken.py").write_text("def (\n")
    (commands / "_helper.py").write_text('"""No command."""\n')
    for words in ([], ["--help"], ["-h"]):
        assert cli.main(words) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 100
        assert "probe   Shows what it was given.\n" in shown
        assert "other   Does another thing.\n" in shown
        assert "broken  (cannot be read:" in shown
        assert "helper" not in shown
        assert "\n          Long " in shown, "a long line goes on under itself"


def test_every_command_has_a_help_line_and_a_main() -> None:
    assert {"figures", "tokenize"} <= set(cli.commands())
    for name, line in cli.commands().items():
        assert len(line) > 10, name
        assert importlib.util.find_spec(f"experiments.commands.{name}") is not None
        assert "\ndef main(argv: list[str]) -> int:" in (cli.COMMANDS / f"{name}.py").read_text(
            encoding="utf-8"
        )


def test_help_and_version_import_nothing_heavy_and_are_quick() -> None:
    program = (
        "import sys; from experiments.cli import main; assert main([sys.argv[1]]) == 0\n"
        "sys.exit(str({'jax', 'tyro', 'numpy', 'rich', 'flax'} & set(sys.modules) or ''))"
    )
    for word, said in (("--help", "tokenize"), ("--version", "shardlab 0.")):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", program, word], cwd=ROOT, capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stderr.strip() == ""
        assert said in done.stdout
        # CPU time, so that what else the machine does is not measured.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_read_gives_experiment_flags_and_overrides(
    commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "probe",
        QUICKSTART,
        "--steps",
        "9",
        "--json",
        "a.json",
        "--mesh.tensor=4",
        "--resume",
        "--seed",
        "1",
    ]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        "9 4 Flags(json=PosixPath('a.json'), resume=True) ('--steps', '9', '--mesh.tensor=4', "
    )
    assert "'--seed', '1')" in shown
    assert cli.main(["probe", QUICKSTART, "--no-resume"]) == 0
    assert "resume=False) () " in capsys.readouterr().out


def test_nested_flags_of_a_command_are_no_overrides() -> None:
    words = ["--steps", "9", "--processes.count", "2", "--processes.index=1", "--mesh.tensor", "4"]
    _, flags, origin = cli.read([QUICKSTART, *words], train.Flags)
    assert (flags.processes.count, flags.processes.index) == (2, 1)
    assert origin.overrides == ("--steps", "9", "--mesh.tensor", "4")


def test_the_command_is_kept_as_typed() -> None:
    words = [
        QUICKSTART,
        "--runs",
        "my runs",
        "--devices",
        "4",
        "--mesh.data=4",
        "--json=a.json",
        "--resume",
        "latest",
    ]
    _, _, origin = cli.read(words, train.Flags)
    assert origin.typed == tuple(words)
    assert "--devices.count" in origin.overrides, "what is applied is spelled out"


def test_an_axis_given_twice_is_refused_for_every_command() -> None:
    with pytest.raises(InputError, match="'data' twice"):
        cli.read([QUICKSTART, "--mesh.data", "2", "--mesh.data=2"], train.Flags)


@dataclass(frozen=True)
class Positional:
    """Of a command without a CONFIG."""

    name: str
    """Which."""
    count: int = 3
    """How many."""


def test_flags_beside_a_positional_keep_their_defaults() -> None:
    assert cli.read_flags(["abc"], Positional) == Positional("abc", 3)
    assert cli.read_flags(["abc", "--count", "4"], Positional) == Positional("abc", 4)
    with pytest.raises(InputError, match="Missing"):
        cli.read_flags([], Positional)


def test_a_command_in_a_process_parses_without_jax(commands: Path) -> None:
    out, err = shardlab(commands, "probe", QUICKSTART, "--steps", "9").communicate(timeout=60)
    assert out == "9 2 Flags(json=None, resume=False) ('--steps', '9') False\n", err


def test_help_of_a_config_shows_every_value_with_its_default(
    commands: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        cli.main(["probe", QUICKSTART, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for part in (
        "shardlab probe", "At length.", "--json", "Write the result to this file.", "--model.layers INT",
        "--optimizer.peak FLOAT", "Learning rate at the end of the warm-up. (default: 0.003)", "--data.tests",
        "--rules RULES|FILE.py", "data() | fsdp() | tensor()", "--partitioner manual|auto", "(default: manual)",
        "--mesh.tensor INT", "--checkpoints.keep INT", "--sample.temperature FLOAT",
    ):  # fmt: skip
        assert part in shown, part
    with pytest.raises(SystemExit):
        cli.main(["probe", "--help"])
    shown = capsys.readouterr().out
    assert "CONFIG comes first" in shown
    assert "--resume" in shown
    assert "--steps" not in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prob"], ("There is no command 'prob'", "Perhaps `shardlab probe`?")),
        (["zzzz"], ("There is no command 'zzzz'", "The commands are probe")),
        (["probe"], ("shardlab probe takes a CONFIG first", "configs/quickstart.py")),
        (["probe", "--steps", "3"], ("takes a CONFIG first", "got '--steps'")),
        (["probe", "configs/quickstrt.py"], ("Perhaps configs/quickstart.py?",)),
        (["probe", QUICKSTART, "--resum"], ("no value --resum", "perhaps --resume?")),
        (["probe", QUICKSTART, "--json"], ("--json cannot be read", "a path or None")),
        (["probe", QUICKSTART, "--mesh.tensr", "4"], ("perhaps --mesh.tensor?", "`shardlab probe configs/")),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    commands: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: tuple[str, ...]
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("shardlab: ")
    assert err.count("\n") == 1
    assert all(part in err for part in said), err


def test_debug_anywhere_shows_the_traceback_too(commands: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--debug", "probe", QUICKSTART, "--stepz"], ["probe", QUICKSTART, "--stepz", "--debug"]):
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert "shardlab: There is no value --stepz: perhaps --steps?" in err


def test_a_damaged_record_is_bad_input(commands: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (commands / "hurt.py").write_text(
        '"""Raises what reading records raises."""\n\nfrom experiments.record_schema import RecordError\n\n\n'
        'def main(argv: list[str]) -> int:\n    raise RecordError("line 3 is cut off")\n'
    )
    assert cli.main(["hurt"]) == 2
    assert capsys.readouterr().err == "shardlab: line 3 is cut off\n"
    del sys.modules["experiments.commands.hurt"]


def test_a_paragraph_is_wrapped_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    lines = cli.paragraph("a word " * 40).splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) <= 40


def test_exit_codes_of_a_process(commands: Path) -> None:
    refused = shardlab(commands, "probe", QUICKSTART, "--steps", "x")
    _, err = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "Traceback" not in err
    assert err.startswith("shardlab: --steps x cannot be read")

    bug = shardlab(commands, "probe", "bug")
    _, err = bug.communicate(timeout=60)
    assert bug.returncode == 1
    assert "RuntimeError: a bug" in err

    waiting = shardlab(commands, "probe", "wait")
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "ready\n"
    time.sleep(0.1)
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, err) == (130, "shardlab: interrupted\n")


@pytest.mark.parametrize("json", [".", "/proc/x/y.json", "/dev/null/y.json"])
def test_a_json_that_cannot_be_written_is_refused_before_any_work(
    json: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for words in (["sweep", "configs/scaling_quick.py"], ["figures", "--out", str(tmp_path / "out")]):
        assert cli.main([*words, "--json", json]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert f"--json {json} cannot be written" in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_checking_a_file_leaves_everything_as_it_was(tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("kept")
    for path in (there, tmp_path / "new.json", tmp_path / "a" / "b" / "new.json", Path("/dev/null")):
        cli.check_file(path, "--json")
    assert [*tmp_path.iterdir()] == [there]
    assert there.read_text() == "kept"


@pytest.mark.parametrize("out", ["/dev/null", "/proc/x"])
def test_figures_into_a_place_that_is_no_folder(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["figures", "scaling", "--out", out]) == 2
    err = capsys.readouterr().err
    assert f"--out {out} cannot be written" in err
    assert err.count("\n") == 1


def test_a_figure_file_with_a_syntax_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text('"""Mine."""\ndef draw(:\n')
    assert cli.main(["figures", str(tmp_path / "mine.py"), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "mine.py cannot be read: line 2" in err
    assert err.count("\n") == 1


def test_a_reader_that_leaves_is_not_complained_about(commands: Path) -> None:
    talking = shardlab(commands, "probe", "talk")
    assert talking.stdout is not None
    assert talking.stderr is not None
    talking.stdout.readline()
    os.close(os.dup(talking.stdout.fileno()))
    talking.stdout.close()
    assert talking.wait(timeout=60) == 141
    assert talking.stderr.read() == ""
    talking.stderr.close()


UNREADABLE: dict[str, tuple[str, str]] = {
    "a full standard output": (
        "explain configs/digits_mlp.py > /dev/full",
        "standard output or a file of the run cannot be written",
    ),
    "a path part too long": (f"explain {'x' * 300}.py", "File name too long"),
    "a run folder too long": (
        f"train configs/digits_mlp.py --steps 1 --runs {'x' * 300}",
        "File name too long",
    ),
    "a cache that cannot be made": (
        "unset JAX_COMPILATION_CACHE_DIR; cd /proc && train ROOT/configs/digits_mlp.py --runs RUNS",
        "No such file",
    ),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full and /proc")
@pytest.mark.parametrize("what", UNREADABLE)
def test_what_the_system_refuses_is_one_paragraph(what: str, tmp_path: Path) -> None:
    words, said = UNREADABLE[what]
    place, _, command = words.rpartition("&& ")
    command = command.replace("ROOT", str(ROOT)).replace("RUNS", str(tmp_path))
    done = _shell(f"{place + '&& ' if place else ''}{sys.executable} -m experiments.cli {command}")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.startswith("shardlab: ")
    assert done.stderr.count("\n") == 1


def test_a_closed_standard_output_and_a_terminal_without_unicode_take_what_is_said() -> None:
    for words in ("explain configs/digits_mlp.py >&-", "explain configs/quickstart.py"):
        done = _shell(f"PYTHONIOENCODING=ascii {sys.executable} -m experiments.cli {words}")
        assert (done.returncode, done.stderr) == (0, ""), words


def _shell(line: str) -> subprocess.CompletedProcess[str]:
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-c", line], cwd=ROOT, env=here, capture_output=True, text=True, check=False)
