"""`shardlab sweep`: points measured side by side, the same numbers whatever the split, no round recorded in part."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import jax
import pytest

from experiments import assemble, cli, devices, run_folder, sweep_run
from experiments.commands import sweep as sweep_command
from experiments.config import config_hash, to_json
from experiments.events import read_events
from experiments.feed import global_batch
from experiments.records import Record, RecordError, read
from experiments.run_config import Origin
from experiments.sweep import Point, load
from experiments.sweep_agreement import AGREE, Rounding
from paper_figures import build, scaling
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.partitioner import Manual
from sharding.rules.data import data

ROOT = Path(__file__).resolve().parent.parent
SCALING = ROOT / "configs" / "scaling_quick.py"

TINY = """
from dataclasses import replace
from configs.scaling_quick import config as scaling_quick
from configs.quickstart import config as quickstart
from experiments.config import Devices
from experiments.data.text import Text
from experiments.sweep import Point
from sharding.axes import MeshShape
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
ONE = Point("strong", "data", data(), MeshShape(), 1, 4)
TWO = Point("strong", "fsdp", fsdp(), MeshShape(fsdp=2), 2, 4)
SMALL = Point("weak", "data", data(), MeshShape(), 1, 2)
GROWN = Point("weak", "data", data(), MeshShape(data=2), 2, 4)
def tiny(*points, **change):
    s = scaling_quick()
    model = replace(s.base.model, layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=32, length=16)
    base = replace(s.base, model=model, data=Text(path=TEXT, length=16))
    return replace(s, name="tiny", base=base, points=points, **(dict(rounds=2, steps=3) | change))
"""
ALL = "def config(): return tiny(ONE, TWO, SMALL, GROWN)"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a config file after the tiny parts above; its path. What a sweep caches goes into the test's folder."""
    monkeypatch.setattr(assemble, "CACHE", tmp_path / "cache")
    text = tmp_path / "text"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.txt").write_text(f"{i}: one text of several, so that a file can be held out. " * 40)

    def write(last: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(f"TEXT = {str(text)!r}\n{TINY}\n{last}\n")
        return str(path)

    return write


def swept(tmp_path: Path, *words: str) -> tuple[int, Path, list[Record]]:
    """Exit code, run folder and the sweep's records of `shardlab sweep WORDS`."""
    code = cli.main(["sweep", *words, "--runs", str(tmp_path / "runs")])
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    return code, folder, [r for r in read(folder / "records.jsonl") if r.kind == "sweep"]


def test_a_sweep_measures_records_and_draws(
    config: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = config(ALL)
    code, folder, records = swept(tmp_path, mine, "--json", str(tmp_path / "out" / "result.json"))
    said = capsys.readouterr().out
    assert code == 0
    assert [(r.values["mode"], r.values["devices"], r.values["round"]) for r in records] == [
        (mode, n, at) for at in (1, 2) for mode in ("strong", "weak") for n in (1, 2)
    ]
    for r in records:
        low, high = r.values["step_seconds_range"]
        assert r.provenance == "measured"
        assert r.values["tokens_per_step"] == 16 * r.values["global_batch"]
        assert 0 < low <= r.values["step_seconds"][0] <= high
        assert r.values["steps_timed"] == 3
        assert r.values["cores_busy"] > 0
    compiled = [e for e in read_events(folder / "events.jsonl") if e.name == "compile"]
    assert [e.details["point"] for e in compiled][:2] == [
        "strong data on 1 device",
        "strong fsdp on 2 devices",
    ]
    assert all(e.seconds and e.seconds > 0 for e in compiled)

    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert f"share the same {result['cores']} CPU core" in said
    assert "efficiency" in said
    assert "tokens/s" in said
    assert {r.values["unit"] for r in records} == {p["unit"] for p in result["points"]} == {"tokens"}
    assert (result["rounds"], result["stopped"], len(result["points"])) == (2, "", 4)
    assert result["loss_difference"] == max(r.values["loss_difference"] for r in records) < AGREE
    assert [Path(p).name for p in result["figures"]] == ["scaling.svg", "scaling.png"]
    assert all(Path(p).stat().st_size > 1000 for p in result["figures"])
    assert build.build("scaling", tmp_path / "again", ("svg",), [folder]).files
    in_figure = {
        (s.mode, p.devices): [r / s.base_rate / s.ideal(p) for r in sorted(p.rates)]
        for s in scaling._series(records)
        for p in s.points
    }
    for row in result["points"]:
        slow, fast = in_figure[row["mode"], row["devices"]]
        assert row["efficiency"] == pytest.approx((slow + fast) / 2), "the table says what the figure shows"

    # The losses are those of the same experiment trained in the ordinary way.
    tiny = load(Path(mine))
    experiment = tiny.experiment(tiny.points[0])
    step = assemble.train_step(experiment, jax.devices()[:1])
    dataset, state, losses = experiment.data.open(assemble.CACHE / "data"), step.init(experiment.seed), []
    shardings: Any = step.batch_shardings()
    for at in range(experiment.steps):
        batch = global_batch(dataset, "train", experiment.seed, at, experiment.batch, shardings)
        state, metrics = step.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert len(losses) == 2 * (3 + 1)
    assert [r.values["loss"] for r in records if r.values["global_batch"] == 4] == pytest.approx(
        [losses[3]] * 3 + [losses[7]] * 3, rel=AGREE
    )
    assert len(set(losses)) == len(losses), "each update changes the parameters"


def test_a_split_that_computes_something_else_is_not_recorded(
    config: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compile_side = sweep_run._compile

    def wrong(side: sweep_run.Side, initial: Any) -> None:
        if side.point.split == "fsdp":
            initial = initial | {"params": {k: 1.001 * x for k, x in initial["params"].items()}}
        compile_side(side, jax.tree.map(lambda x: x, initial))

    monkeypatch.setattr(sweep_run, "_compile", wrong)
    code, _, records = swept(tmp_path, config(ALL))
    said = capsys.readouterr().err
    assert code == 1
    assert records == []
    assert "The losses of update 1 on the same 4 rows differ" in said
    assert "(strong fsdp on 2 devices)" in said


@pytest.mark.parametrize("factor", [1.0, 1.5], ids=["right", "wrong"])
def test_losses_in_bfloat16_agree_to_its_rounding_and_no_further(
    factor: float,
    config: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another type's rounding is no other computation (its losses differ by more than float32's may), a fault is."""
    compile_side = sweep_run._compile
    agreed = []

    def planted(side: sweep_run.Side, initial: Any) -> None:
        agreed.append(side.agree(1))
        if side.point.split == "fsdp":
            initial = initial | {
                "params": {k: x * x.dtype.type(factor) for k, x in initial["params"].items()}
            }
        compile_side(side, jax.tree.map(lambda x: x, initial))

    monkeypatch.setattr(sweep_run, "_compile", planted)
    half = 'replace(s, base=replace(s.base, model=replace(s.base.model, dtype="bfloat16")))'
    code, _, records = swept(tmp_path, config(f"def config(): s = tiny(ONE, TWO); return {half}"))
    said = capsys.readouterr().err
    if factor == 1.0:
        assert code == 0, said
        assert AGREE < max(r.values["loss_difference"] for r in records) < agreed[0] == agreed[1]
    else:
        assert code == 1
        assert "rounding of bfloat16, in which the model computes, explains 8e-03" in said


BF16 = Rounding("bfloat16", "in which the model computes", 2.0**-8)
INT8 = Rounding("int8", "in which its products are taken", 1 / 254)
E5M2 = Rounding("float8_e5m2", "in which its products are taken", 2.0**-3)


def compared(rounding: Rounding, *apart: float) -> dict[int, float]:
    """What a sweep makes of two splits whose losses depart by so much of their size, update by update, over 16,384 tokens."""
    both = sweep_run.Side(cast(Any, None), cast(Any, None), None, 16384, "tokens", None, rounding)
    one, two = (
        replace(both, point=Point("strong", s, data(), MeshShape(), 1, 256)) for s in ("data", "fsdp")
    )
    one.losses, two.losses = [2.0 for _ in apart], [2.0 * (1 + x) for x in apart]
    return sweep_run.disagreements([one, two])


@pytest.mark.parametrize(
    ("rounding", "right", "wrong", "update", "said"),
    [
        (
            BF16,
            (4e-4, 6.3e-4, 1e-2),
            (6.3e-4, 0.0),
            1,
            "bfloat16, in which the model computes, explains 5e-04",
        ),
        (BF16, (4e-4, 5e-2), (4e-4, 7e-2), 2, "bfloat16, in which the model computes, explains 6e-02"),
        (INT8, (4e-4, 2e-2), (6e-4, 0.0), 1, "int8, in which its products are taken, explains 5e-04"),
        (INT8, (0.0, 6e-2), (0.0, 7e-2), 2, "int8, in which its products are taken, explains 6e-02"),
        (E5M2, (1e-2, 6e-2), (1e-2, 7e-2), 2, "float8_e5m2, in which its products are taken, explains 6e-02"),
        (Rounding("float32", "", 2.0**-24), (9e-6, 9e-6), (9e-6, 2e-5), 2, "explains 1e-05"),
    ],
)
def test_rounding_is_averaged_while_the_weights_are_the_same_and_common_to_all_tokens_after(
    rounding: Rounding, right: tuple[float, ...], wrong: tuple[float, ...], update: int, said: str
) -> None:
    assert compared(rounding, *right) == {256: pytest.approx(max(right))}
    with pytest.raises(sweep_run.Disagreement, match=f"of update {update} on .*{said}"):
        compared(rounding, *wrong)


@pytest.mark.parametrize(
    ("dtype", "products", "expected"),
    [
        ("float32", "none", Rounding("float32", "in which the model computes", 2.0**-24)),
        ("bfloat16", "none", BF16),
        ("bfloat16", "int8", INT8),
        ("float32", "float8_e4m3fn", Rounding("float8_e4m3fn", "in which its products are taken", 2.0**-4)),
        ("float32", "float8_e5m2", E5M2),
    ],
)
def test_products_in_8_bits_are_what_rounds_most(
    dtype: str, products: Any, expected: Rounding, config: Callable[[str], str]
) -> None:
    whole = load(Path(config("def config(): return tiny(TWO)")))
    base = replace(
        whole.base,
        model=replace(cast(Any, whole.base.model), dtype=dtype),
        partitioner=Manual(products=products),
    )
    ((side,), _) = sweep_run.prepare(replace(whole, base=base), devices.start(base.devices))
    assert side.rounding == expected


def test_a_sweep_over_images_counts_examples(
    config: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = (
        "from configs.digits_mlp import config as digits\n"
        "def config():\n"
        "    s = tiny(ONE, rounds=1, steps=1)\n"
        "    return replace(s, base=replace(digits(), model=replace(digits().model, embed=8, mlp=8)))"
    )
    code, folder, (record,) = swept(tmp_path, config(last), "--json", str(tmp_path / "result.json"))
    said = capsys.readouterr().out
    assert code == 0
    assert "examples/s" in said
    assert "tokens" not in said
    assert (record.values["unit"], record.values["tokens_per_step"]) == ("examples", 4)
    assert json.loads((tmp_path / "result.json").read_text())["points"][0]["unit"] == "examples"
    drawn = (folder / "scaling.svg").read_text()
    assert "examples/s" in drawn
    assert "tokens/s" not in drawn
    axes = scaling.draw([record]).axes[0]
    assert "examples/s" in axes.get_ylabel()
    old = replace(record, values={k: v for k, v in record.values.items() if k != "unit"})
    assert "tokens/s" in scaling.draw([old]).axes[0].get_ylabel(), "a record without the word means tokens"
    with pytest.raises(RecordError, match="count examples and tokens"):
        scaling.draw([record, old])


@pytest.mark.parametrize(("turn", "kept"), [(2, 0), (7, 1)], ids=["first round", "second round"])
def test_a_stop_keeps_finished_rounds_and_says_so(
    turn: int,
    kept: int,
    config: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    turns, take = [], sweep_run._turn

    def interrupted(*given: Any) -> list[tuple[float, float]]:
        turns.append(1)
        if len(turns) == turn:
            os.kill(os.getpid(), signal.SIGINT)
        return take(*given)

    monkeypatch.setattr(sweep_run, "_turn", interrupted)
    code, folder, records = swept(tmp_path, config(ALL))
    said = capsys.readouterr().out
    assert code == 130
    assert len(turns) == turn, "the turn under way is finished, no other begun"
    assert len(records) == 4 * kept
    assert (folder / "scaling.svg").exists() == (kept > 0)
    assert "stopped by SIGINT: " in said
    assert ("the records of 1 of 2 rounds are" if kept else "no round was finished") in said


@pytest.mark.parametrize(
    ("last", "words", "said"),
    [
        (
            "def config(): return tiny(ONE, replace(TWO, devices=16, mesh=MeshShape(fsdp=16), batch=4))",
            [],
            ("strong fsdp on 16 devices", "more devices than the 8 pretend", "devices.count to at least 16"),
        ),
        (
            "def config(): return tiny(replace(ONE, batch=3), replace(TWO, batch=3))",
            [],
            ("The point strong fsdp on 2 devices", "batch of 3 rows does not divide into 2", "multiple of 2"),
        ),
        (
            "def config(): return tiny(ONE, replace(TWO, batch=8))",
            [],
            ("Strong scaling means one global batch", "4 rows for strong data on 1 device, 8 rows"),
        ),
        (
            "def config(): return tiny(SMALL, replace(GROWN, batch=2))",
            [],
            ("Weak scaling means one batch a device", "2 rows for weak data on 2 devices"),
        ),
        ("def config(): return tiny(ONE, ONE)", [], ("strong data on 1 device twice",)),
        ("def config(): return tiny()", [], ("has no points",)),
        ("def config(): return tiny(replace(ONE, mode='both'))", [], ("mode 'both'", '"strong" or "weak"')),
        (
            "def config(): return tiny(replace(TWO, devices=4))",
            [],
            ("The point strong fsdp on 4 devices", "fsdp=2 asks for 2 devices, but there are 4"),
        ),
        (
            "def config(): return tiny(replace(TWO, rules=data()))",
            [],
            ("The point strong fsdp on 2 devices", "Mesh axis fsdp has 2 devices, but no rule"),
        ),
        ("config = quickstart", [], ("type Experiment", "shardlab train")),
        ("config = None", [], ("has no config()", "def config() -> Sweep")),
        (ALL, ["--rounds", "0"], ("sweep.rounds is 0", "at least 1")),
        (ALL, ["--round", "2"], ("--round", "perhaps --rounds?")),
    ],
)  # fmt: skip
def test_bad_input_is_one_paragraph(
    last: str,
    words: list[str],
    said: tuple[str, ...],
    config: Callable[[str], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["sweep", config(last), *words, "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("shardlab: ")
    assert error.count("\n") == 1
    assert all(s in error for s in said), error
    assert not (tmp_path / "runs").exists(), "a run folder was left behind"


def test_a_config_comes_first_and_a_folder_can_be_written(
    config: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sweep"]) == 2
    assert cli.main(["sweep", "--rounds", "2"]) == 2
    assert capsys.readouterr().err.count("shardlab sweep takes a CONFIG first") == 2
    (tmp_path / "file").write_text("")
    assert cli.main(["sweep", config(ALL), "--runs", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_sweep_runs_again_from_its_folder_after_its_original_is_gone(
    config: Callable[[str], str], tmp_path: Path
) -> None:
    away = tmp_path / "away"
    away.mkdir()
    (away / "parts.py").write_text("from deeper.few import ROUNDS\n")
    (away / "deeper").mkdir()
    (away / "deeper" / "few.py").write_text("ROUNDS = 1\n")
    last = "from parts import ROUNDS\ndef config(): return tiny(ONE, TWO, rounds=ROUNDS, steps=1)"
    mine = Path(config(last)).rename(away / "mine.py")
    code, folder, records = swept(tmp_path, str(mine), "--rounds", "2", "--json", str(tmp_path / "out.json"))
    assert code == 0
    assert len(records) == 4
    typed = f"shardlab sweep {mine} --rounds 2 --json {tmp_path / 'out.json'} --runs {tmp_path / 'runs'}\n"
    assert (folder / "command.txt").read_text() == typed
    kept = {str(p.relative_to(folder)) for p in folder.rglob("*.py")}
    assert kept == {"config.py", "source.py", "parts.py", "deeper/few.py"}
    recorded = json.loads((folder / "config.json").read_text())
    shutil.rmtree(away)
    shutil.rmtree(tmp_path / "text")  # nothing is measured again: the value is what must be the same
    for name in ("mine", "parts", "deeper", "deeper.few"):
        sys.modules.pop(name, None)
    moved = folder.rename(tmp_path / "moved")
    again = load(moved / "config.py")
    assert to_json(again) == recorded["sweep"]
    assert (again.rounds, config_hash(cast(Any, again))) == (2, recorded["config_hash"])
    (moved / "deeper" / "few.py").write_text("ROUNDS = 3\n")
    assert load(moved / "config.py").rounds == 2, "the rounds of the command are recorded"
    source = moved / "source.py"
    source.write_text(source.read_text().replace("steps=1", "steps=4"))
    with pytest.raises(InputError, match="steps: recorded 1, now 4"):
        load(moved / "config.py")


def test_two_sweeps_of_one_second_have_two_folders(
    config: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        @staticmethod
        def now(zone: object) -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    mine, flags = Path(config(ALL)), sweep_command.Flags(runs=tmp_path / "runs")
    first, second = (sweep_command._folder(Origin(mine), flags, load(mine), "0123abcd" * 8) for _ in range(2))
    assert first == tmp_path / "runs" / "tiny" / "20260102-030405-0123abcd"
    assert second.name == f"{first.name}-2"
    for folder in (first, second):
        assert {p.name for p in folder.iterdir()} == {"source.py", "config.json", "config.py", "command.txt"}
        assert (folder / "command.txt").read_text() == f"shardlab sweep {mine}\n"


def test_scaling_quick_is_a_sweep_without_jax() -> None:
    quick = load(SCALING)
    assert json.loads(json.dumps(to_json(quick), allow_nan=False)) == to_json(quick)
    lines = {(p.mode, p.split) for p in quick.points}
    assert lines == {(m, s) for m in ("strong", "weak") for s in ("data", "fsdp")} | {("strong", "tensor")}
    for line in lines:
        counts = {p.devices for p in quick.points if (p.mode, p.split) in (line, (line[0], "data"))}
        assert counts == {1, 2, 4, 8}
    program = (
        "import sys; from pathlib import Path; from experiments.sweep import load; import experiments.commands.sweep\n"
        f"load(Path({str(SCALING)!r})); sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
