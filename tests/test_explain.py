"""`shardlab explain`: every array with what put it where, its real bytes per device, and no device touched."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments import assemble, cli
from experiments.config import Experiment, load
from experiments.explanation import explain, explain_step
from experiments.optimizers import AdamW
from experiments.overrides import apply
from sharding.finding import human
from sharding.partitioner import Auto
from tests.small import ROOT

CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if "-> Experiment" in p.read_text())

SPLITS = {
    "quickstart": (),
    "sequence": ("--rules", "data | fsdp | tensor | sequence"),
    "zero1": ("--rules", "zero1 | tensor", "--mesh.data", "4", "--mesh.fsdp", "1"),
    "zero2": ("--rules", "zero2 | tensor", "--mesh.data", "4", "--mesh.fsdp", "1"),
    "data": ("--rules", "data", "--mesh.data", "8", "--mesh.fsdp", "1", "--mesh.tensor", "1"),
}


def quickstart(*overrides: str) -> Experiment:
    """The quickstart with two narrow layers, overridden."""
    small = ("--model.layers", "2", "--model.embed", "32", "--model.head-dim", "8", "--model.mlp", "64")
    return apply(load(ROOT / "configs" / "quickstart.py"), (*small, *overrides))


def on_devices(tree: Any) -> int:
    """Bytes that the first device holds of a tree of arrays."""
    shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == jax.devices()[0])
    return sum(s.data.nbytes for s in shards)


@pytest.mark.parametrize("name", SPLITS)
def test_bytes_per_device_are_those_of_the_real_arrays(name: str):
    e = quickstart(*SPLITS[name])
    told = json.loads(json.dumps(explain(e, 8).to_json()))
    step = assemble.train_step(e, jax.devices())
    state = step.init(0)
    for path, array in state["params"].items():
        (line,) = (x for x in told["lines"] if x["kind"] == "parameter" and x["path"] == path)
        assert line["bytes_per_device"] == on_devices(array), path
        assert tuple(line["shape"]) == array.shape
        assert line["names"] == list(step.tree[path].names)
        spec = tuple(array.sharding.spec) + (None,) * array.ndim
        real = [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in spec[: array.ndim]]
        assert [tuple(d) for d in line["dims"]] == real
    counters = sum(x.nbytes for x in jax.tree.leaves(state["optimizer"]) if x.ndim == 0)
    assert told["bytes_per_device"]["optimizer"] == on_devices(state["optimizer"]) - counters
    assert told["bytes_per_device"]["parameter"] == on_devices(state["params"])
    assert told["parameters"] == sum(x.size for x in state["params"].values())


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_dim_names_its_rule_and_every_whole_array_its_reason(name: str):
    told = explain(quickstart(*SPLITS[name]), 8)
    kinds = {"parameter", "gradient", "optimizer", "batch", "activation", "inside"}
    assert {line.kind for line in told.lines} == kinds
    for line in told.lines:
        placed = {(p.name, p.axis): p for p in line.placed}
        for dim, axes in zip(line.names, line.dims, strict=True):
            for axis in axes:
                file, _, number = placed[dim, axis].source.rpartition(":")
                assert (ROOT / file).read_text().splitlines()[int(number) - 1].strip() in (
                    "@rule",
                    f"def {placed[dim, axis].rule.partition('(')[0]}(",
                )
        assert bool(line.whole) == (not any(line.dims)), line
    if name == "data":
        assert all("no rule names" in line.whole for line in told.of("parameter"))
    if name == "sequence":
        assert any("sequence() left length whole" in note for line in told.lines for note in line.notes)


def test_gathered_parameters_say_so():
    lines = {line.path: line for line in explain(quickstart(), 8).of("parameter")}
    table = lines["table"]
    assert (table.layout, table.in_use, table.gathered) == (
        "vocab/tensor embed/fsdp",
        "vocab/tensor embed",
        ("fsdp",),
    )


def test_what_is_explained_is_what_runs():
    """Without devices, on devices, and in the jaxpr that the compiled step is made from."""
    e = quickstart()
    step = assemble.train_step(e, jax.devices())
    there, here = explain(e, 8), explain_step(e, step)
    assert there.collectives == here.collectives
    assert there.lines == here.lines
    assert there.forward_flops == here.forward_flops > 0
    traced = 0
    update = step.update

    def counted(*arguments: Any) -> Any:
        nonlocal traced
        traced += 1
        return update(*arguments)

    step.update = counted  # pyright: ignore[reportAttributeAccessIssue]
    step.step = jax.jit(step.update, donate_argnums=0, out_shardings=(step.state_shardings(), None))
    explain_step(e, step)
    batch = {k: jax.numpy.zeros(x.shape, x.dtype) for k, x in step.abstract_batch(e.batch).items()}
    step.step(step.init(0), jax.device_put(batch, step.batch_shardings()))
    assert traced == 1, "the run traces its step a second time"


def test_xlas_partitioner_lists_no_collectives(capsys: pytest.CaptureFixture[str]):
    e = dataclasses.replace(quickstart(), partitioner=Auto())
    assert explain(e, 8).collectives == ()
    assert cli.main(["explain", str(ROOT / "configs" / "quickstart.py"), "--partitioner", "auto"]) == 0
    assert "none can be listed before" in capsys.readouterr().out


def name(line: dict[str, Any]) -> list[str]:
    """How a line's row begins: where an op is, its array's path, its shape."""
    return [*([line["source"]] if line["source"] else []), line["path"], "x".join(map(str, line["shape"]))]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_the_command_prints_every_array_and_writes_json(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "new" / "told.json"
    assert cli.main(["explain", str(config), "--json", str(out)]) == 0
    said, told = capsys.readouterr().out, json.loads(out.read_text())
    for line in told["lines"]:
        if line["kind"] == "gradient" or line["kind"] == "optimizer":
            continue
        rows = [x for x in said.splitlines() if x.split()[: len(name(line))] == name(line)]
        placed = [p for p in line["placed"] if p["size"] > 1]
        wanted = [f"{p['name']}/{p['axis']} by {p['rule']} {p['source']}" for p in placed]
        wanted.append(human(line["bytes_per_device"]))
        assert any(all(word in row for word in wanted) for row in rows), (line, rows)
    for kind, what in (("gradient", "Gradients"), ("optimizer", "Optimizer state")):
        assert f"{what}: {human(told['bytes_per_device'][kind])} per device" in said
    assert re.search(r"rules/\w+\.py:\d", said)
    assert "\x1b" not in said


PROBE = """
import sys
from experiments import cli
code = cli.main(["explain", sys.argv[1]])
from jax._src import xla_bridge
print("started:", sorted(xla_bridge._backends), code)
"""


def run_python(words: Sequence[str], cwd: Path) -> tuple[str, float]:
    """The last line that a fresh interpreter says, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", *words], capture_output=True, text=True, cwd=cwd, env=environment, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout.splitlines()[-1], spent


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> float:
    """CPU seconds that a fresh interpreter takes to import the libraries that every model needs."""
    return run_python(["import jax, optax, flax.nnx; print()"], tmp_path_factory.mktemp("imports"))[1]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_no_backend_is_started_and_it_is_quick(config: Path, tmp_path: Path, imports: float):
    """Quick: at most 6 times the CPU time of the imports, whatever the machine; it takes 1.5 to 2.5 times that."""
    said, spent = run_python([PROBE, str(config)], tmp_path)
    assert said == "started: [] 0"
    assert spent < 6 * imports, f"{spent:.1f} s of CPU time, and the imports alone {imports:.1f} s"
    assert not list(tmp_path.iterdir()), "explain wrote something"


@pytest.mark.parametrize("split", ["quickstart", "sequence", "zero2"])
def test_tables_fit_120_columns(
    split: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["explain", str(ROOT / "configs" / "quickstart.py"), *SPLITS[split]]) == 0
    said = capsys.readouterr().out
    told = explain(apply(load(ROOT / "configs" / "quickstart.py"), SPLITS[split]), 8)
    rows = re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines()
    assert max(len(row) for row in rows if not row.startswith("sequence()")) <= 120
    for line in (*told.of("parameter"), *told.of("activation")):
        start = name({**vars(line), "source": line.source.rpartition("/")[2]})
        (row, *_) = (x for x in rows if x.split()[: len(start)] == start)
        assert human(line.bytes_per_device) in row, "a row is wrapped"


def test_state_in_another_type_is_counted_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "digits_mlp.py")
    assert cli.main(["explain", config, "--optimizer.mean_dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    held = {
        kind: explain(dataclasses.replace(load(config), optimizer=AdamW(mean_dtype=kind)), 8).bytes_per_device
        for kind in ("float32", "bfloat16")
    }
    assert held["bfloat16"]["optimizer"] * 4 == held["float32"]["optimizer"] * 3
    assert f"Optimizer state: {human(held['bfloat16']['optimizer'])} per device, 2 for each parameter" in said
