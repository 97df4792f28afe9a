"""`shardlab plan`: what it predicts, what the compiler made of it, whether it fits and what would make it fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.budget import budget_of
from experiments.compilers.ask import Refusal
from experiments.config import load
from experiments.config_file import execute
from experiments.plans.estimate import estimate
from experiments.plans.planned import Made
from experiments.plans.planning import verdict
from experiments.run_config import Origin
from sharding.price.target import parse_target
from tests import small
from tests.small import shardlab

ROOT = small.ROOT
SHRUNK = ["--model.layers", "2", "--model.embed", "32", "--model.heads", "4", "--model.kv-heads", "2", "--model.head-dim", "8",
          "--model.mlp", "64", "--model.length", "32", "--data.length", "32"]  # fmt: skip
QUICK = [str(ROOT / "configs" / "quickstart.py"), *SHRUNK]
BIG = str(ROOT / "configs" / "transformer_80b.py")


def planned(tmp_path: Path, *words: str, code: int = 0) -> dict[str, Any]:
    """The JSON of a plan."""
    assert shardlab("plan", *words, "--json", tmp_path / "plan.json") == code
    return json.loads((tmp_path / "plan.json").read_text())


def test_predicted_is_compiled_and_both_partitioners_stand_side_by_side(tmp_path: Path) -> None:
    told = planned(tmp_path, *QUICK, "--target", "cpu:8")
    manual, auto = told["made"]
    assert (manual["partitioner"], auto["partitioner"]) == ("manual", "auto")
    assert told["totals"] == manual["totals"]
    assert manual["differences"] == []
    assert {d["name"] for d in auto["differences"]} == {"unpredicted collective"}
    assert all(d["source"] for d in auto["differences"])
    assert manual["memory"]["arguments"] == told["memory"]["arguments"]
    assert told["verdict"]["by"] == "compiled"
    assert told["verdict"]["needs"] == manual["memory"]["total"]
    assert sorted(told["lies"]) == list(range(8))


def test_the_verdict_is_that_of_the_configs_own_partitioner(tmp_path: Path) -> None:
    told = planned(tmp_path, *QUICK, "--target", "cpu:8", "--partitioner", "auto", code=1)  # above its budget
    needs = {m["partitioner"]: m["memory"]["total"] for m in told["made"]}
    assert needs["auto"] != needs["manual"]
    assert told["verdict"]["needs"] == needs["auto"]


def test_a_step_that_the_compiler_refused_does_not_fit_by_prediction() -> None:
    refused = Made("manual", (), (), None, Refusal("RESOURCE_EXHAUSTED: too much"), {}, {})
    here, target = load(ROOT / "configs" / "quickstart.py"), parse_target("tpu:v5e:2x4")
    small = estimate(here, target).predicted.memory
    told = verdict(small, refused, Origin(Path(QUICK[0])), here, target, lambda text: None)
    assert told.fits is False
    assert "too much" in told.says


def test_each_collective_has_its_op_layers_and_rule(tmp_path: Path) -> None:
    told = planned(tmp_path, *QUICK, "--target", "tpu:v5e:2x4", "--compile", "none")
    rows = {
        (m["op"], m["names"], m["phase"], m["layers"]): m for m in told["moved"] if m["axes"] == ["tensor"]
    }
    down = rows["einsum", "batch length mlp, mlp embed -> batch length embed", "forward", 2]
    assert (down["kind"], down["times"]) == ("all-reduce", 2)
    assert down["rules"][0].startswith("tensor() sharding/rules/tensor.py:")
    tokens, embed, item = (
        16 * 32 // 4,
        32,
        4,
    )  # of a device, 2 x 2 of them sharing the rows; an all-reduce among 2 sends as much
    assert down["sent"] == down["payload"] == 2 * tokens * embed * item
    paths = {m["names"] for m in told["moved"] if m["op"] == "gradient"}
    assert paths >= {"table", "layers.mlp.down", "norm"}
    assert told["made"] == []
    assert "not asked for" in " ".join(told["missing"])
    assert told["verdict"]["by"] == "predicted"
    assert told["modelled"]["step"] > 0


def test_a_pod_that_is_too_small_is_told_with_what_would_make_it_fit(tmp_path: Path) -> None:
    small_pod = ["--target", "tpu:v5p:4x4x4", "--compile", "none", "--mesh.tensor", "4", "--batch", "64"]
    told = planned(tmp_path, BIG, *small_pod, "--model.remat", "none")
    verdict = told["verdict"]
    assert verdict["fits"] is False
    assert verdict["needs"] > verdict["capacity"]
    assert verdict["changes"]
    seconds = [c["step"] for c in verdict["changes"]]
    assert seconds == sorted(seconds)
    for change in verdict["changes"][:2]:  # done, it fits, in the bytes that were told
        again = planned(tmp_path, BIG, *small_pod, "--model.remat", "none", *change["words"])
        assert again["memory"]["total"] == change["total"] <= verdict["capacity"]
        assert again["verdict"]["fits"]


def test_eighty_billion_parameters_on_a_thousand_chips_are_predicted() -> None:
    made = estimate(load(BIG), parse_target("tpu:v5p:8x8x16"))
    memory = made.predicted.memory
    assert memory.parameters * 1024 == pytest.approx(4 * 80e9, rel=0.02)
    layer = (
        1024 * 4096 * 8192 * 2 // 1024
    )  # what remat="full" keeps of one layer: its input, split 128 x 8 ways
    assert 80 * layer <= memory.kept + memory.made
    assert made.modelled.step is not None


def test_the_hundred_layer_trace_costs_no_more_than_the_ten_layer_one() -> None:
    few, many = (estimate(load_with(BIG, layers), parse_target("tpu:v5p:4x4x8")) for layers in (10, 100))
    assert len(few.predicted.collectives) == len(many.predicted.collectives)


def load_with(path: str, layers: int) -> Any:
    from experiments.overrides import apply

    return apply(load(path), ("--model.layers", str(layers)))


def test_a_page_is_written_into_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    page = tmp_path / "pages" / "plan.html"
    changed = ["--against", "--mesh.fsdp 4 --mesh.data 1"]
    for words in ([], changed):
        assert shardlab("plan", *QUICK, "--target", "cpu:8", "--compile", "none", "--html", page, *words) == 0
        assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--target", "tpu:v5q:2x4"], "v5p"),
        (["--target", "tpu:v5e:2x4", "--mesh.data", "3"], "12 devices, but there are 8"),
        (["--target", "cpu:8", "--mesh.tensor", "8"], "Change one axis"),
        (["--target", "gpu:h100:16"], "2x8"),
        (["--target", "cpu:8", "--html", "/proc/none/x.html"], "--html"),
        (
            ["--target", "cpu:8", "--against", "--mesh.fsdp 8 --mesh.data 1", "--compile", "none"],
            "16 devices, but there are 8",
        ),
    ],
)
def test_bad_input_is_one_paragraph(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shardlab("plan", *QUICK, *words) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


def test_without_a_compiler_the_plan_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else real(name, *a)
    )
    told = planned(tmp_path, *QUICK, "--target", "tpu:v5e:2x4")
    assert told["made"] == []
    assert any("shardlab[tpu]" in line for line in told["missing"])
    assert told["memory"]["total"] > 0


def test_a_model_that_knows_no_names_is_told_by_its_compiled_module(tmp_path: Path) -> None:
    told = planned(tmp_path, str(ROOT / "configs" / "foreign_linen.py"), "--target", "cpu:8")
    assert told["moved"] == []
    assert told["modelled"] is None
    assert any(line.startswith("prediction:") for line in told["missing"])
    (made,) = told["made"]
    assert made["partitioner"] == "auto"
    assert made["totals"]
    assert told["verdict"]["needs"] == made["memory"]["total"]


# Collective budgets.

BUDGETS = [p for p in sorted((ROOT / "configs").glob("*.py")) if hasattr(execute(p), "budget")]


@pytest.mark.parametrize("path", BUDGETS, ids=lambda p: p.stem)
def test_every_config_keeps_to_its_budget(path: Path) -> None:
    from experiments.budget import exceeded
    from experiments.plans.planned import totals_of

    experiment = load(path)
    made = estimate(experiment, parse_target(f"cpu:{experiment.devices.count}"))
    assert budget_of(path)
    assert exceeded(budget_of(path), totals_of(made.predicted.collectives), "predicted") == ()


def test_a_step_over_its_budget_is_told_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tight.py"
    config.write_text(
        "from configs.quickstart import config\nfrom experiments.budget import Most\n\n\n"
        "def budget():\n    return (Most('tensor', 'all-reduce', times=13), Most('data', bytes=10))\n"
    )
    told = planned(tmp_path, str(config), *SHRUNK, "--target", "cpu:8", "--compile", "none", code=1)
    assert len(told["over_budget"]) == 2
    assert (
        "over budget: predicted: 14 all-reduces over tensor in a step, but the config's budget is 13."
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("bound", "says"),
    [
        ("Most('tensr', times=1)", "tensor"),
        ("Most('data', 'reduce', times=1)", "all-reduce"),
        ("Most('data')", "times or bytes"),
    ],
)
def test_a_budget_that_bounds_nothing_is_refused(
    bound: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "odd.py"
    imports = "from configs.quickstart import config\nfrom experiments.budget import Most\n"
    config.write_text(f"{imports}\n\ndef budget():\n    return ({bound},)\n")
    assert shardlab("plan", config, *SHRUNK, "--target", "cpu:8", "--compile", "none") == 2
    assert says in capsys.readouterr().err
