"""The real compilers, asked without their devices: what they emit is what was traced, or each departure has its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.compilers import ask as compilers
from experiments.compilers import versions as compiler_versions
from experiments.compilers.ask import compile_for
from experiments.compilers.child import refusal
from experiments.compilers.gpus import GPUS, target_config
from experiments.compilers.step import Compiled
from experiments.compilers.versions import fits, missing
from sharding.errors import InputError
from sharding.ledger import Collective, per_axis, sent_bytes
from sharding.module.compiled import Emitted
from sharding.module.differences import NAMES, UNPREDICTED, differences, unpredicted
from sharding.price.machines import MACHINES
from sharding.price.target import parse_target
from sharding.scope import Scope
from tests.compiler_cases import CASES, scaled

ROOT = Path(__file__).resolve().parent.parent


def need(target: str) -> None:
    """Leave the test out where the compiler is not installed, and say so; SHARDLAB_COMPILERS=required fails instead."""
    lacking = missing(parse_target(target))
    if lacking and os.environ.get("SHARDLAB_COMPILERS") == "required":
        pytest.fail(lacking)
    if lacking:
        pytest.skip(lacking)


def compiled(
    folder: Path, name: str, target: str, dtype: str = "float32", by: Any = "", **more: Any
) -> Compiled:
    """What the target's compiler makes of a case."""
    devices = parse_target(target).devices
    path = folder / "case.py"
    path.write_text(
        f"from tests.compiler_cases import case\ndef config():\n    return case({name!r}, {devices}, {dtype!r})\n"
    )
    return compile_for(path, (), parse_target(target), by, **more)


def accounted(found: Compiled) -> dict[str, int]:
    """Name -> bytes predicted under it; asserts that all has a name and that both ledgers then agree to the byte."""
    departures = found.differences()
    assert {d.name for d in departures} <= set(NAMES), departures
    total: dict[tuple[str, ...], int] = {}
    for c in found.collectives:
        total[c.axes] = total.get(c.axes, 0) + c.bytes
    for c in found.traced:
        total[c.axes] = total.get(c.axes, 0) - c.bytes
    for d in departures:
        total[d.axes] = total.get(d.axes, 0) + d.predicted[1] - d.compiled[1]
    assert not any(total.values()), total
    return {d.name: d.predicted[1] for d in departures}


@pytest.mark.parametrize(
    "name",
    ["hsdp", "pipeline", *(pytest.param(c, marks=pytest.mark.slow) for c in ("zero bubble", "interleaved"))],
)
def test_the_cpu_compiler_emits_what_was_traced(name: str, tmp_path: Path) -> None:
    said: list[str] = []
    found = compiled(tmp_path, name, "cpu:8", tell=said.append)
    assert found.traced
    assert per_axis(list(found.collectives)) == per_axis(list(found.traced))
    assert found.differences() == []
    assert found.refused is None
    assert found.memory is not None
    assert found.memory.arguments > found.memory.aliased > 0
    assert found.memory.temporaries > 0
    assert found.versions["jax"]
    assert [s.split()[0] for s in said] == ["starting", "tracing", "compiling"]


def test_under_xlas_partitioner_every_collective_is_unpredicted_and_has_its_line(tmp_path: Path) -> None:
    found = compiled(tmp_path, "perceptron", "cpu:8", by="auto")
    assert found.traced == ()
    told = found.differences()
    assert {d.name for d in told} == {UNPREDICTED}
    assert sum(d.compiled[1] for d in told) == sum(c.bytes for c in found.collectives) > 0
    assert any("models/mlp.py:" in d.source for d in told)


# Cases that are quick enough for every run where the compilers are; all of them run with the slow tests.
GPU = [("fsdp", "gpu:h100:8"), ("local", "gpu:h100:8"), ("perceptron", "gpu:h100:4x8")]
TPU = [("perceptron", "tpu:v5e:2x4")]
ALL = [
    *((c, "gpu:h100:8") for c in CASES),
    *((c, "gpu:h100:4x8") for c in CASES),
    *((c, "tpu:v5e:2x4") for c in CASES),
    *((c, "tpu:v5p:2x2x2") for c in CASES),
]


@pytest.mark.parametrize(
    ("name", "target"),
    [*GPU, *TPU, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL if c not in GPU + TPU)],
)
def test_what_a_compiler_emits_is_predicted_or_named(name: str, target: str, tmp_path: Path) -> None:
    need(target)
    accounted(
        compiled(tmp_path, name, target, "bfloat16" if "v5p" in target or "4x8" in target else "float32")
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu:v5e:2x4", "gpu:h100:8"])
def test_hsdp_by_hand_moves_no_more_than_xlas_partitioner(target: str, tmp_path: Path) -> None:
    """Over no axes more, and over the slow one a part: XLA reduces whole gradients over all devices."""
    need(target)
    hand, xla = (compiled(tmp_path, "scanned hsdp", target, "bfloat16", by) for by in ("manual", "auto"))
    crossing = [sum(c.bytes for c in x.collectives if "replica" in c.axes) for x in (hand, xla)]
    assert crossing[0] < crossing[1] / 3
    assert sum(c.bytes for c in hand.collectives) < sum(c.bytes for c in xla.collectives)


@pytest.mark.parametrize(
    "said",
    [
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 55.80G of 31.25G hbm. Exceeded hbm "
        "capacity by 24.55G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (55.80G) exceeds available HBM (31.25G).",
    ],
)
def test_a_step_that_does_not_fit_is_refused_with_the_numbers(said: str) -> None:
    told = refusal(f"RESOURCE_EXHAUSTED: {said}", "tpu:v6e:4x4")
    assert (told["used"], told["capacity"]) == (int(55.8 * 2**30), int(31.25 * 2**30))
    assert refusal("RESOURCE_EXHAUSTED: no words", "tpu:v6e:4x4")["used"] is None


def test_what_is_no_verdict_on_memory_is_bad_input() -> None:
    with pytest.raises(InputError, match="cannot compile this step for tpu:v6e:4x4: INTERNAL"):
        refusal("INTERNAL: Mosaic failed", "tpu:v6e:4x4")


@pytest.mark.slow
def test_the_tpu_compilers_own_verdict_is_told(tmp_path: Path) -> None:
    need("tpu:v5e:2x2")
    path = tmp_path / "big.py"
    path.write_text(
        "import dataclasses\nfrom tests.compiler_cases import case\n"
        "def config():\n    e = case('data', 4)\n"
        "    return dataclasses.replace(e, model=dataclasses.replace(e.model, vocab=2**20, embed=2048))\n"
    )
    found = compile_for(path, (), parse_target("tpu:v5e:2x2"))
    assert found.memory is None
    assert found.refused is not None
    assert found.refused.used is not None
    assert found.refused.capacity is not None
    assert found.refused.used > found.refused.capacity > 15 * 2**30


def test_a_config_that_does_not_fit_the_target_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "case.py"
    path.write_text("from tests.compiler_cases import case\ndef config():\n    return case('fsdp', 8)\n")
    with pytest.raises(InputError, match="devices"):
        compile_for(path, (), parse_target("cpu:4"))
    found = compile_for(path, ("--mesh.fsdp", "4"), parse_target("cpu:4"))
    assert found.mesh["fsdp"] == 4


def test_what_lasts_too_long_is_ended_and_says_so(tmp_path: Path) -> None:
    found = compiled(tmp_path, "fsdp", "cpu:8", limit=0.3)
    assert found.refused is not None
    assert found.refused.message == "no result within 0.3 s"


@pytest.mark.parametrize(
    ("how", "says"), [("SIGABRT", "fault of the compiler"), ("SIGKILL", "memory is used up")]
)
def test_a_compiler_that_dies_is_told_by_its_signal(how: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "case.py"
    path.write_text(f"import os, signal\ndef config():\n    os.kill(os.getpid(), signal.{how})\n")
    with pytest.raises(InputError, match=f"died of {how}.*{says}"):
        compile_for(path, (), parse_target("cpu:8"))


def test_ctrl_c_ends_the_process_that_compiles(tmp_path: Path) -> None:
    """And a signal that ends the one that asked ends it too, through its standard input."""
    path = tmp_path / "case.py"
    path.write_text("import time\ndef config():\n    time.sleep(60)\n")
    ask = (
        "import sys\nfrom pathlib import Path\nfrom experiments.compilers.ask import compile_for\n"
        "from sharding.price.target import parse_target\n"
        f"compile_for(Path({str(path)!r}), (), parse_target('cpu:8'))\n"
    )
    for how in (signal.SIGINT, signal.SIGKILL):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            [sys.executable, "-c", ask], env=environment, stderr=subprocess.DEVNULL
        ) as asks:
            child = _until(lambda asks=asks: _children(asks.pid))
            asks.send_signal(how)
            asks.wait(20)
        _until(lambda child=child: not Path(f"/proc/{child[0]}").exists() or _is_dead(child[0]))


def _children(process: int) -> list[int]:
    told = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(n) for n in told.split()]


def _is_dead(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _until(met: Any) -> Any:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if found := met():
            return found
        time.sleep(0.05)
    raise AssertionError("nothing within 20 s")


def test_the_tpu_compiler_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has it; the next says so, waits, and goes on when that one ends, however it ends."""
    monkeypatch.setattr(compilers.tempfile, "tempdir", str(tmp_path))
    hold = (
        "import tempfile, time\ntempfile.tempdir = {!r}\nfrom experiments.compilers.ask import _turn\n"
        "with _turn('tpu', print):\n    print('held', flush=True)\n    time.sleep({})\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold.format(str(tmp_path), 60)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    said: list[str] = []

    def hear(text: str) -> None:
        said.append(text)
        holder.kill()

    with holder, compilers._turn("tpu", hear):
        assert said == [f"waiting for the TPU compiler, which process {holder.pid} has"]
    with compilers._turn("cpu", hear), compilers._turn("gpu", hear):
        assert len(said) == 1


@pytest.mark.slow
def test_libtpus_own_lock_held_by_another_program_stops_nothing(tmp_path: Path) -> None:
    need("tpu:v5e:2x2")
    lock = str(Path(tempfile.gettempdir()) / "libtpu_lockfile")
    hold = (
        f"import fcntl, time\nf = open({lock!r}, 'a')\nfcntl.lockf(f, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\ntime.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            assert compiled(tmp_path, "perceptron", "tpu:v5e:2x2").collectives
        finally:
            holder.kill()


# What is installed.


@pytest.mark.parametrize(
    ("version", "wanted", "fit"),
    [
        ("0.0.42.1", "==0.0.42.*", True),
        ("0.0.50.1", "==0.0.42.*", False),
        ("0.10.2", "<=0.10.2,>=0.10.2", True),
        ("0.12.0.1", "<=0.12.0,>=0.12.0", False),
        ("0.12", "==0.12.0", True),
        ("1.9", ">=1.10", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, wanted: str, fit: bool) -> None:
    assert fits(version, wanted) is fit


def test_what_is_missing_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_versions.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(compiler_versions, "_version", lambda name: "")
    assert missing(parse_target("cpu:8")) == ""
    assert missing(parse_target("tpu:v5e:2x2")).endswith("not installed: pip install 'shardlab[tpu]'")
    assert "pip install 'shardlab[gpu-compiler]'" in missing(parse_target("gpu:h100:8"))
    with pytest.raises(InputError, match=r"tpu:v5e:2x2 cannot be compiled for here: .*shardlab\[tpu\]"):
        compile_for(Path("configs/quickstart.py"), (), parse_target("tpu:v5e:2x2"))


def test_a_compiler_of_another_jax_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_versions.importlib.util, "find_spec", lambda name: object())
    have = {"libtpu": "0.0.1", "jax-cuda12-plugin": "0.9.0", "jax": "0"}
    monkeypatch.setattr(compiler_versions, "_version", lambda name: have.get(name, ""))
    assert "libtpu 0.0.1 is installed, but jax 0 goes with libtpu==0.0." in missing(
        parse_target("tpu:v5e:2x2")
    )
    assert "jax-cuda12-plugin 0.9.0 is installed" in missing(parse_target("gpu:h100:8"))


def test_every_gpu_of_the_table_can_be_described_to_the_compiler() -> None:
    named = {m.name: m for m in MACHINES if m.platform == "gpu"}
    assert set(named) == set(GPUS)
    for name, machine in named.items():
        assert GPUS[name].kind == machine.device_kind
        assert machine.memory_bandwidth == pytest.approx(GPUS[name].bandwidth, rel=0.05)
        assert machine.memory == pytest.approx(GPUS[name].memory, rel=0.09)
        assert f"device_memory_size: {GPUS[name].memory}" in target_config(name)
    with pytest.raises(InputError, match="cannot be told what 'p100' is"):
        target_config("p100")


# Differences, from lists made by hand.

SIZES = {"replica": 2, "fsdp": 4}
AT = {"forward": Scope("forward"), "backward": Scope("backward"), "update": Scope()}


def one(
    kind: str,
    axes: str,
    elements: int,
    times: int = 1,
    dtype: str = "float32",
    phase: str = "update",
    line: int = 1,
) -> Emitted:
    """A collective."""
    over = tuple(axes.split())
    n = 1
    for a in over:
        n *= SIZES[a]
    each = {"float32": 4, "bfloat16": 2}[dtype]
    sent = sent_bytes(kind, elements * each, n) * times
    return Emitted(kind, over, n, dtype, (elements,), times, sent, f"model.py:{line}", "", AT[phase])


GATHER, SCATTER, REDUCE = (
    one("all-gather", "fsdp", 64),
    one("reduce-scatter", "fsdp", 256),
    one("all-reduce", "replica", 64),
)
NAMED: dict[str, tuple[list[Collective], list[Collective]]] = {
    "narrowed": ([GATHER], [one("all-gather", "fsdp", 64, dtype="bfloat16")]),
    "widened": ([one("all-reduce", "replica", 64, dtype="bfloat16")], [REDUCE]),
    "all-gather as all-reduce": ([GATHER], [one("all-reduce", "fsdp", 256)]),
    "reduce-scatter as all-reduce": ([SCATTER], [one("all-reduce", "fsdp", 256)]),
    "all-reduce as reduce-scatter": ([one("all-reduce", "fsdp", 256)], [SCATTER]),
    "hoisted": ([one("all-reduce", "replica", 64, times=3)], [one("all-reduce", "replica", 192)]),
    "over axes at once": (
        [one("all-reduce", "replica", 64), one("all-reduce", "fsdp", 64)],
        [one("all-reduce", "replica fsdp", 64)],
    ),
    "axis by axis": (
        [one("all-reduce", "replica fsdp", 64)],
        [one("all-reduce", "replica", 64), one("all-reduce", "fsdp", 64)],
    ),
    "padded": (
        [one("reduce-scatter", "fsdp", 256, times=2)],
        [one("reduce-scatter", "fsdp", 288, times=2), one("permute", "fsdp", 32, times=4)],
    ),
    "cut first": (
        [one("all-reduce", "replica", 256), SCATTER],
        [one("all-reduce", "replica", 64), SCATTER],
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_each_departure_is_named_and_its_bytes_are_the_whole_difference(name: str) -> None:
    predicted, found = NAMED[name]
    told = differences(predicted, found)
    assert {d.name for d in told} == {name}
    assert {d.source for d in told} == {"model.py:1"}
    missing_bytes = sum(d.compiled[1] - d.predicted[1] for d in told)
    assert missing_bytes == sum(c.bytes for c in found) - sum(c.bytes for c in predicted)


@pytest.mark.parametrize(
    "found",
    [
        [one("reduce-scatter", "fsdp", 512, times=2)],  # twice the rows are no tiles' doing
        [one("reduce-scatter", "fsdp", 288, times=2), one("permute", "fsdp", 64)],  # nor as many rows shifted
    ],
)
def test_padding_explains_no_more_than_a_tiles_rows(found: list[Collective]) -> None:
    assert "" in {d.name for d in differences([one("reduce-scatter", "fsdp", 256, times=2)], found)}


def test_equal_lists_have_no_difference_whatever_their_order_and_lines() -> None:
    mine = [GATHER, SCATTER, one("all-reduce", "replica", 64, times=3)]
    again = [replace(c, source="", scope=AT["backward"]) for c in (REDUCE, SCATTER, GATHER)]
    theirs = [*again, one("all-reduce", "replica", 64, times=2)]
    assert differences(mine, theirs) == []


def test_what_is_asked_for_twice_is_named_only_where_the_trace_asks_twice() -> None:
    mine, theirs = [one("permute", "fsdp", 64, times=6)], [one("permute", "fsdp", 64, times=3)]
    (told,) = differences(mine, theirs, [one("permute", "fsdp", 64, times=3)])
    assert (told.name, told.predicted[0], told.compiled[0]) == ("repeated", 3, 0)
    assert {d.name for d in differences(mine, theirs, [one("permute", "fsdp", 32, times=3)])} == {""}
    assert {d.name for d in differences(mine, theirs, [one("permute", "fsdp", 64, times=2)])} == {
        "repeated",
        "",
    }
    assert differences(mine, mine, [one("permute", "fsdp", 64, times=3)]) == []


FAULTS: dict[str, tuple[list[Collective], list[Collective]]] = {
    "nobody predicted it": ([GATHER], [GATHER, REDUCE]),
    "it is gone": ([GATHER, REDUCE], [GATHER]),
    "over another axis": ([one("all-reduce", "replica", 64)], [one("all-reduce", "fsdp", 64)]),
    "of another size": ([one("all-reduce", "replica", 64)], [one("all-reduce", "replica", 65)]),
    "of another type of the same width": ([GATHER], [replace(GATHER, dtype="int32")]),
    "once too often": ([GATHER], [replace(GATHER, times=2, bytes=2 * GATHER.bytes)]),
    "a gather that became a permute": ([GATHER], [one("permute", "fsdp", 64)]),
    "a reduction of a part that nothing cuts": (
        [one("all-reduce", "replica", 256)],
        [one("all-reduce", "replica", 64)],
    ),
    "a stack of more than the loop has": (
        [one("all-reduce", "replica", 64, times=2)],
        [one("all-reduce", "replica", 192)],
    ),
    "over a third axis at once": (
        [one("all-reduce", "fsdp", 64), one("all-reduce", "fsdp", 64, line=2)],
        [one("all-reduce", "replica fsdp", 64)],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_departure_that_nothing_explains_has_no_name(fault: str) -> None:
    told = differences(*FAULTS[fault])
    assert "" in {d.name for d in told}
    assert sum(d.predicted[1] for d in told if not d.name) or sum(d.compiled[1] for d in told if not d.name)


def test_unpredicted_collectives_are_told_by_line() -> None:
    told = unpredicted(
        [GATHER, one("all-gather", "fsdp", 64, times=2), one("all-gather", "fsdp", 64, line=2)]
    )
    assert [(d.source, d.compiled[0]) for d in told] == [("model.py:1", 3), ("model.py:2", 1)]


def test_a_mesh_is_scaled_to_any_power_of_two() -> None:
    for devices in (2, 4, 8, 16, 32):
        for _, _, sizes in CASES.values():
            assert scaled(sizes, devices).devices == devices
