"""`shardlab doctor`: planted wrong collectives are caught and named; checks that hang, die or raise are findings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from experiments import cli
from experiments.doctor import cases as plan
from experiments.doctor.cases import Case
from experiments.doctor.collectives import COLLECTIVES, examine
from experiments.doctor.examination import Order, mesh_shape, nothing_wanted
from experiments.doctor.verdict import Verdict, compare, could_not_run, not_applicable, worst
from sharding.mesh import device_mesh

ROOT = Path(__file__).resolve().parent.parent
MESH = device_mesh(mesh_shape(8))
SIZES = dict(zip(MESH.axis_names, MESH.devices.shape, strict=True))


def planted(name: str, call: Any) -> dict[str, Any]:
    """The table of collectives with another thing done on the devices under that name."""
    return {**COLLECTIVES, name: replace(COLLECTIVES[name], call=call)}


def ring(g: int, step: int) -> list[tuple[int, int]]:
    return [(i, (i + step) % g) for i in range(g)]


FAULTS = {
    "reduced twice": ("all-reduce", lambda x, axes, g: lax.psum(lax.pcast(lax.psum(x, axes), axes, to="varying"), axes)),
    "not reduced": ("all-reduce", lambda x, axes, g: x),
    "over another axis": ("all-reduce", lambda x, axes, g: lax.psum(x, "tensor")),
    "averaged": ("all-reduce", lambda x, axes, g: (lax.psum(x, axes) // g)),
    "ranks swapped": ("all-gather", lambda x, axes, g: lax.all_gather(lax.ppermute(x, axes, ring(g, 1)), axes, tiled=True)),
    "another chunk": ("reduce-scatter", lambda x, axes, g: lax.psum_scatter(lax.rev(x, (0,)), axes, tiled=True)),
    "twice too large": ("reduce-scatter", lambda x, axes, g: lax.psum_scatter(x + x, axes, tiled=True)),
    "stays at home": ("all-to-all", lambda x, axes, g: x),
    "the other way round": ("permute", lambda x, axes, g: lax.ppermute(x, axes, ring(g, -1))),
    "all of the ring": ("permute first to last", lambda x, axes, g: lax.ppermute(x, axes, ring(g, -1))),
    "zeros": ("all-reduce max", lambda x, axes, g: x * 0),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_wrong_collective_is_caught_on_every_dtype(fault: str) -> None:
    name, call = FAULTS[fault]
    axes = ("data", "fsdp") if "other way" in fault else ("fsdp",)  # a ring of two is its own reverse
    for dtype in ("float32", "bfloat16", "int32"):
        case = Case(name, axes, dtype, plan.SMALL)
        assert examine(case, MESH).outcome == "ok"
        verdict = examine(case, MESH, planted(name, call))
        assert verdict.outcome == "wrong", (dtype, verdict)
        assert "device " in verdict.detail
        assert verdict.error > 0


def test_the_kind_of_error_is_named() -> None:
    case = Case("all-reduce", ("data", "fsdp"), "float32", plan.SMALL)
    twice = planted("all-reduce", lambda x, axes, g: lax.psum(x * g, axes))
    assert "factor of 4" in examine(case, MESH, twice).detail
    moved = Case("permute", ("data",), "float32", plan.SMALL)
    stays = planted("permute", lambda x, axes, g: lax.rev(lax.ppermute(x, axes, ring(g, 1)), (0,)))
    assert "right values in the wrong places" in examine(moved, MESH, stays).detail
    assert "all zero" in examine(moved, MESH, planted("permute", lambda x, axes, g: x * 0)).detail


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_sums_of_rounded_numbers_have_a_bound_that_rounding_meets_and_a_fault_does_not(dtype: str) -> None:
    case = Case("reduce-scatter", ("data", "fsdp", "tensor"), dtype, 1 << 12, "normal")
    verdict = examine(case, MESH)
    assert verdict.outcome == "ok", verdict
    assert verdict.error <= verdict.bound < 1
    assert verdict.bound > 0
    lost = planted(
        "reduce-scatter", lambda x, axes, g: lax.psum_scatter(x, axes, tiled=True) * (1 - 8 * g * EPS[dtype])
    )
    assert examine(case, MESH, lost).outcome == "wrong"


EPS = {d: float(ml_dtypes.finfo(d).eps) for d in ("float32", "bfloat16", "float16", "float64")}


def test_every_collective_of_the_plan_has_a_function_and_every_axis_and_dtype_a_case() -> None:
    made = plan.cases(SIZES)
    assert {c.collective for c in made} == set(COLLECTIVES) == set(plan.COLLECTIVES)
    assert len({c.name for c in made}) == len(made), "names tell checks apart"
    for name in COLLECTIVES:
        mine = [c for c in made if c.collective == name]
        every = {("data",), ("fsdp",), ("tensor",), ("data", "tensor"), ("data", "fsdp", "tensor")}
        assert {c.axes for c in mine} >= every | ({("tensor", "data")} if "permute" not in name else set())
        moves = name not in plan.SUMS and name != "all-reduce max"
        assert {c.dtype for c in mine} >= set(plan.DTYPES) - (set() if moves else {"bool"})
        assert max(c.size for c in mine) >= 1 << 22
    quick = plan.cases(SIZES, quick=True)
    assert set(quick) < set(made)
    assert {c.collective for c in quick} == set(COLLECTIVES)
    assert plan.cases({"data": 1, "tensor": 1}) == []


LAID = {1: [1, 1, 1], 7: [7, 1, 1], 8: [2, 2, 2], 12: [3, 2, 2], 64: [4, 4, 4]}


@pytest.mark.parametrize(("devices", "sizes"), LAID.items())
def test_devices_are_laid_out_evenly(devices: int, sizes: list[int]) -> None:
    shape = mesh_shape(devices)
    assert [shape.data, shape.fsdp, shape.tensor] == sizes


def test_verdicts_compare_bits_bounds_shapes_and_what_is_no_number() -> None:
    x = np.array([1.0, np.nan, 3.0], np.float32)
    assert compare(x, x).outcome == "ok"
    assert compare(np.float32(2), np.float32(2)).outcome == "ok"
    assert compare(x[::-1][::-1], x).outcome == "ok"
    assert compare(np.array([1.0, 2.0, np.nan]), np.ones(3), 1e9).outcome == "wrong"
    assert compare(np.array([1.5]), np.array([1.0]), 0.5).outcome == "ok"
    assert compare(np.array([1.6]), np.array([1.0]), 0.5).outcome == "wrong"
    assert compare(np.zeros(2), np.zeros(3)).outcome == "wrong"
    assert compare(np.zeros(2, np.int32), np.zeros(2)).outcome == "wrong"
    big = np.array([2**62 + 1], np.int64)
    assert compare(big, big - 1).outcome == "wrong"
    assert compare(np.array([True]), np.array([False])).outcome == "wrong"
    every = [not_applicable("x"), Verdict("ok"), could_not_run("y"), Verdict("wrong", "z")]
    assert [worst(every[:n]).outcome for n in (1, 2, 3, 4)] == [
        "not applicable",
        "ok",
        "could not run",
        "wrong",
    ]
    assert worst([]).outcome == "not applicable"
    infinite = compare(np.zeros(2), np.zeros(3))
    assert Verdict.from_json(json.loads(json.dumps(infinite.to_json(), allow_nan=False))) == infinite


PROBE = '''"""A probe of a test.

Reported: example/repo#{number}
Unsafe:   everything
Do:       nothing
"""

from __future__ import annotations

import os, signal, time
from pathlib import Path

import jax
from experiments.doctor.verdict import Verdict, not_applicable

NEEDS = {needs}


def probe(devices):
    Path(os.environ["SEEN"]).joinpath(f"{number}-" + str(jax.process_index())).write_text(str(os.getpid()))
    {body}
'''


def write(folder: Path, name: str, body: str, needs: str = "{}", number: int = 1) -> Path:
    path = folder / f"{name}.py"
    path.write_text(PROBE.format(body=body, needs=needs, number=number))
    return path


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where a test's probes leave their process numbers."""
    folder = tmp_path / "seen"
    folder.mkdir()
    monkeypatch.setenv("SEEN", str(folder))
    return folder


def doctor(*words: Any) -> int:
    return cli.main(["doctor", *map(str, words)])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_probes_that_hang_die_raise_or_lie_are_findings_and_the_rest_goes_on(
    tmp_path: Path, seen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies = {
        "zz_hangs": "time.sleep(600)",
        "zz_dies": "os.kill(os.getpid(), signal.SIGKILL)",
        "zz_raises": "raise RuntimeError('no such luck')",
        "zz_lies": "return True",
        "zz_wrong": "return Verdict('wrong', '3 of 4 elements', 1.0, 0.5)",
        "zz_elsewhere": "return not_applicable('no such chip')",
        "zz_well": "return Verdict('ok')",
    }
    files = [write(tmp_path, name, body, number=n) for n, (name, body) in enumerate(bodies.items())]
    out = tmp_path / "out.json"
    flags = [
        "--devices",
        2,
        "--processes",
        1,
        "--only",
        "zz_",
        "--limit",
        6,
        "--json",
        out,
        "--accept",
        "zz_raises",
    ]
    assert doctor(*flags, "--probe", *files) == 1
    told = json.loads(out.read_text())
    got = {c["name"]: c for c in told["checks"]}
    assert {n: c["outcome"] for n, c in got.items()} == {
        "start-up": "ok",
        "zz_hangs": "could not run",
        "zz_dies": "could not run",
        "zz_raises": "could not run",
        "zz_lies": "could not run",
        "zz_wrong": "wrong",
        "zz_elsewhere": "not applicable",
        "zz_well": "ok",
    }
    assert "stuck" in got["zz_hangs"]["detail"]
    assert "SIGKILL" in got["zz_dies"]["detail"]
    assert "RuntimeError: no such luck" in got["zz_raises"]["detail"]
    assert got["zz_raises"]["accepted"] is True
    assert "bool" in got["zz_lies"]["detail"]
    assert got["zz_wrong"]["error"] == 1.0
    assert told["well"] is False
    assert told["counts"] == {"ok": 2, "wrong": 1, "could not run": 4, "not applicable": 1}
    assert told["versions"]["jax"] == jax.__version__
    assert told["versions"]["devices"] == 2
    shown = capsys.readouterr().out
    for name in bodies:
        assert name in shown
    assert shown.count("do      nothing") == 4, "a paragraph for each that is not well and not accepted"
    assert "example/repo#0" in shown
    assert not any(alive(int(p.read_text())) for p in seen.iterdir())


def test_a_process_among_several_that_dies_or_hangs_is_named(tmp_path: Path, seen: Path) -> None:
    needs = '{"devices": 2, "processes": 2, "gloo": True, "seconds": 4.0}'
    late = "if jax.process_index() == 1: {}\n    return Verdict('ok')"
    dies = write(tmp_path, "zz_one_dies", late.format("os._exit(7)"), needs, 1)
    hangs = write(tmp_path, "zz_one_hangs", late.format("time.sleep(600)"), needs, 2)
    out = tmp_path / "out.json"
    words = ["--devices", 2, "--only", "zz_", "--limit", 4, "--json", out, "--probe", dies, hangs]
    assert doctor(*words) == 1
    got = {c["name"]: c for c in json.loads(out.read_text())["checks"]}
    assert "process 1 ended with exit code 7" in got["zz_one_dies"]["detail"]
    assert "stuck: process 1" in got["zz_one_hangs"]["detail"]
    assert len(list(seen.iterdir())) >= 3  # the first may be ended before the other began
    assert not any(alive(int(p.read_text())) for p in seen.iterdir())


def test_all_is_well_without_a_failure_and_collectives_run_in_several_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out.json"
    words = [
        "--devices",
        4,
        "--quick",
        "--only",
        "all-gather bfloat16",
        "reduce-scatter float32 over data,",
        "--json",
        out,
    ]
    assert doctor(*words) == 0
    told = json.loads(out.read_text())
    assert told["well"] is True
    made = [c for c in told["checks"] if c["kind"] == "collective"]
    assert {c["processes"] for c in made} == {1, 2}
    assert {c["outcome"] for c in made} == {"ok"}
    rounded = [c for c in made if c["case"]["values"] == "normal"]
    assert rounded
    assert all(c["error"] <= c["bound"] < 1 for c in rounded)
    assert all(
        set(c) >= {"name", "outcome", "detail", "error", "bound", "seconds", "case", "processes"}
        for c in made
    )
    shown = capsys.readouterr().out
    assert "in 2 processes, gloo (data 2 fsdp 2)" in shown
    assert f"jax {jax.__version__}" in shown


PLANT = """
import sys
if "experiments.doctor.worker" in getattr(sys, "orig_argv", ()):
    import jax
    right = jax.lax.all_gather
    jax.lax.all_gather = lambda x, axes, **k: right(jax.lax.rev(x, (0,)), axes, **k)
"""


def test_a_machine_whose_all_gather_is_wrong_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert (
        doctor(
            "--devices", 2, "--processes", 1, "--quick", "--only", "all-gather float32", "permute bfloat16"
        )
        == 1
    )
    shown = capsys.readouterr().out
    assert "wrong           all-gather float32 over data, 64 B" in shown
    assert "unsafe  all-gather over data of float32, in one process" in shown
    assert "wrong           permute" not in shown


def test_processes_that_do_not_start_are_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        'import sys\nif "experiments.doctor.worker" in sys.orig_argv:\n    sys.exit("no jax for you")\n'
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out.json"
    assert doctor("--devices", 2, "--only", "shift_in_place", "--json", out) == 1
    told = json.loads(out.read_text())
    assert told["versions"] == {}
    assert told["counts"]["could not run"] == len(told["checks"]) == 2
    assert "no jax for you" in told["checks"][0]["detail"]
    assert "could not run" in capsys.readouterr().out


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_at_once_and_no_process_behind(
    tmp_path: Path, seen: Path, how: signal.Signals
) -> None:
    path = write(tmp_path, "zz_hangs", "time.sleep(600)", '{"seconds": 600.0}')
    words = ["doctor", "--devices", "2", "--only", "zz_hangs", "--probe", str(path)]
    running = subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        mark = seen / "1-0"
        wait_until(lambda: mark.exists() and mark.read_text() != "", 60)
        running.send_signal(how)
        _, said = running.communicate(timeout=10)
    finally:
        running.kill()
    assert running.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), said
    wait_until(lambda: not alive(int(mark.read_text())), 10)


def wait_until(true: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


BAD = {
    "no devices": (["--devices", "0"], "at least 1"),
    "uneven": (["--devices", "5", "--processes", "2"], "cannot be split evenly over 2"),
    "too many": (["--devices", "100000"], "at most 2048"),
    "no processes": (["--processes", "0"], "at least 1"),
    "no time": (["--limit", "0"], "more than 0"),
    "a typo": (["--quik"], "quick"),
    "no file": (["--probe", "gone.py"], "gone.py cannot be read"),
    "no probe": (["--probe", "setup.py"], "is no probe: it lacks"),
    "unknown": (["--accept", "shift_in_plase"], "shift_in_place"),
    "no folder": (["--json", "setup.py/out.json"], "cannot be written"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_paragraph_and_exit_code_2(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.py").write_text('"""Nothing."""\n')
    words, said = BAD[what]
    assert doctor(*words) == cli.BAD_INPUT
    told = capsys.readouterr().err.strip()
    assert said in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("more", [(), ("--quick",), ("--devices", 1, "--processes", 1)])
def test_only_that_leaves_nothing_is_bad_input_before_any_process_starts(
    more: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(*more, "--only", "zebra") == cli.BAD_INPUT
    said = capsys.readouterr()
    assert "leaves no check to run" in said.err
    assert said.out == ""


def test_a_check_that_some_number_of_devices_has_is_not_refused_before_they_are_counted() -> None:
    for n in (2, 4, 6, 8, 16):
        for case in plan.cases(mesh_shape(n).sizes(), quick=True):
            assert not nothing_wanted(Order(only=(case.name,), quick=True), []), (n, case.name)
    assert nothing_wanted(Order(devices=2, only=("over tensor",)), [])
    assert not nothing_wanted(Order(only=("over tensor",)), [])
