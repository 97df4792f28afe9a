"""Sweeps of plans: modelled curves with closed forms where there are some, and never mistaken for measured ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from configs.scaling_quick import config as scaling_quick
from experiments import cli
from experiments.config import Experiment, config_hash
from experiments.plan_sweep import Line, PlanPoint, PlanSweep
from experiments.plan_sweep_run import PRODUCTS, at_once, check_lines, price, work
from experiments.records import MissingRecords, Record, RecordError, Records, read
from experiments.sweep import load, load_either
from paper_figures import build, pods, scaling, style
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.price.target import Target
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.tensor import tensor

ROOT = Path(__file__).resolve().parent.parent
DATA = Line("data", data(), MeshShape(data=-1))
FSDP = Line("fsdp", fsdp(), MeshShape(fsdp=-1))
HOSTS = ("gpu:h100:1x2", "gpu:h100:1x8", "gpu:h100:4x8")

TINY = """
from tests.test_plan_sweep import *
def config():
    return tiny({0})
"""


def base() -> Experiment:
    """A small bf16 transformer, as a config has it."""
    own = scaling_quick().base
    sizes: dict[str, Any] = {
        "layers": 2,
        "embed": 64,
        "mlp": 128,
        "length": 32,
        "loop": "scan",
        "dtype": "bfloat16",
    }
    model = replace(own.model, **sizes)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return replace(own, model=model)


def tiny(**change: Any) -> PlanSweep:
    """Two lines on 2, 8 and 32 GPUs."""
    values: dict[str, Any] = {"targets": HOSTS, "lines": (DATA, FSDP), "batch": 64, "rows": 4}
    return PlanSweep("tiny", base(), **(values | change))


def endless(target: Target, memory: float | None = None) -> Target:
    """The target with networks that carry anything at once, and such a memory where one is given."""
    free = {"bandwidth": math.inf, "latency": 0.0, "start": 0.0}
    machine = target.machine
    nets = {"inside": replace(machine.inside, **free), "across": replace(machine.across, **free)}
    return replace(
        target, machine=replace(machine, **nets, memory_bandwidth=memory or machine.memory_bandwidth)
    )


def priced(sweep: PlanSweep, on: Callable[[Target], Target] = lambda t: t) -> list[dict[str, Any]]:
    points = [replace(p, target=on(p.target)) for p in sweep.points()]
    return [price(sweep, p, 32) for p in points]


def rate(values: dict[str, Any]) -> float:
    return values["tokens_per_step"] / values["step_seconds"] / values["devices"]


def test_strong_scaling_keeps_the_batch_and_weak_scaling_the_rows_of_a_device() -> None:
    points = list(tiny(batch=96, lines=(DATA,)).points())
    assert [(p.mode, p.target.devices, p.batch, p.accumulate) for p in points] == [
        *(("strong", 2, 96, 12), ("strong", 8, 96, 3), ("strong", 32, 96, 1)),
        *(("weak", 2, 8, 1), ("weak", 8, 32, 1), ("weak", 32, 128, 1)),
    ]
    assert [p.accumulate for p in tiny(batch=100, lines=(DATA,), modes=("strong",)).points()] == [20, 4, 1]
    here = tiny().experiment(points[0])
    assert (here.batch, here.accumulate, here.mesh, here.rules) == (96, 12, DATA.mesh, DATA.rules)


def test_with_data_parallelism_alone_and_endless_bandwidth_scaling_is_ideal() -> None:
    sweep = tiny(lines=(DATA,))
    ideal = priced(sweep, lambda t: endless(t, math.inf))
    assert {v["limit"] for v in ideal} == {PRODUCTS}
    assert [rate(v) / rate(ideal[0]) for v in ideal] == pytest.approx([1.0] * 6, rel=1e-9)
    assert [v["mfu"] for v in ideal] == pytest.approx([1.0] * 6)
    strong = ideal[:3]
    assert [strong[0]["step_seconds"] / v["step_seconds"] for v in strong] == pytest.approx([1, 4, 16])
    real = [rate(v) for v in priced(sweep)]  # the same check sees what a real network costs
    assert real[0] > 1.5 * real[2]
    assert real[0] < rate(ideal[0])


def test_memory_traffic_that_does_not_shrink_with_the_pod_bounds_strong_scaling() -> None:
    """Each device updates all parameters under data parallelism (Amdahl): its seconds are the same at every size."""
    few, more, most = priced(tiny(lines=(DATA,), modes=("strong",), rows=32), endless)
    assert few["collective_seconds"] == most["collective_seconds"] == 0
    slope = (few["step_seconds"] - more["step_seconds"]) / (1 / 2 - 1 / 8)
    fixed = more["step_seconds"] - slope / 8
    assert fixed > 0
    assert most["step_seconds"] == pytest.approx(fixed + slope / 32)


def test_parts_are_the_whole_step_and_the_limit_is_the_largest() -> None:
    for values in priced(tiny()):
        assert sum(values["parts"].values()) == pytest.approx(values["step_seconds"])
        assert values["parts"][values["limit"]] == max(values["parts"].values())
    (strong,) = (v for v in priced(tiny(lines=(DATA,), targets=("gpu:h100:4x8",), modes=("strong",))))
    assert strong["limit"] == "data, the network between hosts"
    assert {"products", "memory traffic", "data, NVLink"} < set(strong["parts"])
    slice_ = tiny(
        lines=(Line("t", data() | tensor(), MeshShape(data=-1, tensor=4)),), targets=("tpu:v5p:2x2x4",)
    )
    assert {"tensor, the ICI links", "data, the ICI links"} < set(priced(slice_)[0]["parts"])


def test_latency_is_told_from_bytes() -> None:
    """A ring of hosts takes a latency a step; on networks that begin at once nothing of the step is latency."""
    sweep = tiny(lines=(FSDP,), targets=("gpu:h100:4x8", "gpu:h100:8x8"), modes=("weak",))
    few, many = (v["latency"]["fsdp, the network between hosts"] for v in priced(sweep))
    started = 8.4e-6 / 14e-6  # before its first step a collective takes as long as so many steps
    assert many / few == pytest.approx((7 + started) / (3 + started), rel=0.02)
    for values in priced(sweep, at_once):
        assert all(s == pytest.approx(0.0, abs=1e-12) for s in values["latency"].values())
        assert any(values["latency"])
    assert all(v["latency"][w] <= v["parts"][w] for v in priced(sweep) for w in v["latency"])


def test_what_needs_more_memory_than_a_device_has_does_not_fit() -> None:
    sweep = tiny(lines=(DATA,), targets=HOSTS[:1], modes=("weak",))
    (values,) = priced(sweep)
    assert values["fits"] is True
    needs = values["predicted_bytes"]
    small = lambda room: lambda t: replace(t, machine=replace(t.machine, memory=room))
    assert [priced(sweep, small(needs - less))[0]["fits"] for less in (0, 1)] == [True, False]


def test_a_point_that_cannot_be_laid_out_ends_its_line_and_a_line_without_points_is_refused() -> None:
    points = priced(tiny(batch=16, modes=("strong",)))
    assert ["refused" in v for v in points] == [False, False, True] * 2
    assert "does not divide" in points[2]["refused"]
    check_lines(points)
    with pytest.raises(
        InputError,
        match=r"The split 'data' cannot be laid out on any pod of gpu:h100. On gpu:h100:4x8: A batch",
    ):
        check_lines([points[2]])
    with pytest.raises(
        InputError, match="The split 'none' cannot"
    ):  # a rule that uses an axis the mesh leaves at 1
        check_lines(priced(tiny(lines=(Line("none", fsdp(), MeshShape(data=-1)),), modes=("weak",))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": ("gpu:h100:8", "gpu:h100:1x8")}, "two pods of 8 NVIDIA H100"),
        ({"targets": ("cpu:8",)}, "no public rates"),
        ({"targets": ("gpu:h101:8",)}, "nearest: 'h100'"),
        ({"targets": ()}, "no targets"),
        ({"lines": (DATA, replace(FSDP, split="data"))}, "two lines called 'data'"),
        ({"modes": ()}, "no modes"),
        ({"batch": 0}, "sweep.batch is 0"),
        ({"rows": 0}, "sweep.rows is 0"),
    ],
)
def test_a_sweep_that_is_none_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        tiny(**change)
    assert "\n" not in str(caught.value)


def test_work_counts_a_row_and_the_parameters() -> None:
    of = work(tiny())
    assert of.tokens == 32
    assert of.parameters == price_parameters(base().model)


def price_parameters(model: Any) -> int:
    """Of a transformer, by hand: tables, attention, gated feed-forward, norms."""
    heads = model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    layer = model.embed * (heads + 3 * model.mlp) + 2 * model.embed
    return 2 * model.vocab * model.embed + model.layers * layer + model.embed


def swept(tmp_path: Path, text: str, *words: str) -> tuple[int, list[Path]]:
    """Exit code and run folders of `shardlab sweep` on such a config."""
    (tmp_path / "mine.py").write_text(text)
    code = cli.main(["sweep", str(tmp_path / "mine.py"), "--runs", str(tmp_path / "runs"), *words])
    return code, sorted((tmp_path / "runs").glob("*/*"))


def test_the_command_models_records_draws_and_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = 'targets=("gpu:h100:1x2", "tpu:v5p:2x2x1")'
    code, (folder,) = swept(tmp_path, TINY.format(targets), "--json", str(tmp_path / "out.json"))
    said = capsys.readouterr().out
    assert code == 0
    assert "modelled, not measured" in said
    records = read(folder / "records.jsonl")
    assert {(r.kind, r.provenance, r.device["platform"]) for r in records} == {("pod", "modelled", "none")}
    assert len(records) == 8
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["points"] == [dict(r.values) for r in records]
    names = {"pods-gpu-h100.svg", "pods-tpu-v5p.svg"}
    assert names <= {Path(p).name for p in result["figures"]} <= {p.name for p in folder.iterdir()}
    assert "shardlab sweep" in (folder / "command.txt").read_text()
    assert load_either(folder / "config.py") == load_either(tmp_path / "mine.py")
    code = cli.main(["sweep", str(folder / "config.py"), "--runs", str(tmp_path / "again")])
    (again,) = (tmp_path / "again" / "tiny").iterdir()
    assert code == 0
    assert [r.values for r in read(again / "records.jsonl")] == [r.values for r in records]
    for name in names:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        (TINY.format(""), ("--rounds", "2"), "has no rounds"),
        (
            TINY.format('lines=(Line("none", fsdp(), MeshShape(data=-1)),)'),
            (),
            "The split 'none' cannot be laid out",
        ),
        (TINY.format("rows=2.0"), (), "sweep.rows is 2.0"),
    ],
)
def test_what_is_refused_leaves_nothing(
    text: str, words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(tmp_path, text, *words) == (2, [])
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_sweep_of_plans_is_not_read_where_one_is_measured(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TINY.format(""))
    with pytest.raises(InputError, match="PlanSweep, which is modelled"):
        load(tmp_path / "mine.py")


# The figure.


def recorded(
    tmp_path: Path, values: list[dict[str, Any]], kind: str = "pod", provenance: str = "modelled"
) -> list[Record]:
    from experiments.plan_sweep_run import Work, header

    path = tmp_path / f"{kind}-{provenance}.jsonl"
    with Records(path, header(tiny(), f"{kind}-{provenance}", Work(32, 1))) as records:
        for each in values:
            records.write(kind, provenance, each)
    return read(path)


@pytest.fixture(scope="module")
def curves() -> list[dict[str, Any]]:
    """All points of the tiny sweep, of which fsdp ends early in strong scaling and does not fit at 8."""
    points = priced(tiny(batch=16))
    return [v | {"fits": False} if v["split"] == "fsdp" and v["devices"] == 8 else v for v in points]


def test_the_figure_shows_rates_limits_and_what_does_not_fit(
    tmp_path: Path, curves: list[dict[str, Any]]
) -> None:
    (figure,) = pods.draw(recorded(tmp_path, curves)).values()
    strong, weak, _ = figure.axes
    assert ["modelled" in axes.get_title(loc="left") for axes in (strong, weak)] == [True, True]
    assert "Modelled from a trace" in figure.get_supxlabel()
    assert "beyond 8 devices: a batch of 16 rows does not divide" in figure.get_supxlabel()
    marks = [line for line in weak.get_lines() if line.get_marker() not in ("None", None, "")]
    drawn = [(float(m.get_xdata()[0]), float(m.get_ydata()[0])) for m in marks]  # pyright: ignore
    assert drawn == [(v["devices"], pytest.approx(rate(v))) for v in curves if v["mode"] == "weak"]
    hollow = [m.get_xdata()[0] for m in marks if m.get_markerfacecolor() == "white"]  # pyright: ignore
    assert hollow == [8]
    shapes = {
        v["limit"]: m.get_marker()
        for v, m in zip([v for v in curves if v["mode"] == "weak"], marks, strict=True)
    }
    assert len(set(shapes.values())) == len(shapes), "each limit has a shape of its own"
    assert {"data: ", "fsdp: "} <= {t.get_text()[:6] for t in strong.texts}
    assert any(t.get_text().endswith(" at 8") for t in strong.texts)


def test_measured_and_modelled_never_change_places(tmp_path: Path, curves: list[dict[str, Any]]) -> None:
    """Planted: a measured record among the modelled ones, measured sweeps alone, and modelled ones called sweeps."""
    known = [v for v in curves if "refused" not in v]
    mixed = [*recorded(tmp_path, known), *recorded(tmp_path, known[:1], provenance="measured")]
    with pytest.raises(RecordError, match="says that it is measured"):
        pods.draw(mixed)
    with pytest.raises(MissingRecords, match=r'"sweep" are measured'):
        pods.draw(
            recorded(tmp_path, [v | {"step_seconds": [1.0], "cores": 2} for v in known], "sweep", "measured")
        )
    with pytest.raises(MissingRecords, match="no point of a sweep"):
        scaling.draw(recorded(tmp_path / "a", known))
    called = [v | {"step_seconds": [v["step_seconds"]], "cores": 2} for v in known]
    with pytest.raises(RecordError, match="are modelled"):
        scaling.draw(recorded(tmp_path, called, "sweep"))


def test_two_sweeps_in_one_figure_are_refused(tmp_path: Path, curves: list[dict[str, Any]]) -> None:
    one = recorded(tmp_path, curves)
    with pytest.raises(RecordError, match="several sweeps"):
        pods.draw([*one, *recorded(tmp_path / "b", curves[:1])])
    with pytest.raises(RecordError, match="does not say what its step waits for"):
        pods.draw(recorded(tmp_path / "d", [curves[0] | {"limit": "luck"}]))
    with pytest.raises(RecordError, match="'strong' or 'weak'"):
        pods.draw(recorded(tmp_path / "c", [curves[0] | {"mode": "sideways"}]))


def test_the_figure_has_the_same_bytes_twice(tmp_path: Path, curves: list[dict[str, Any]]) -> None:
    recorded(tmp_path, curves)
    made = [
        build.build("pods", tmp_path / name, paths=[tmp_path / "pod-modelled.jsonl"]).files
        for name in ("a", "b")
    ]
    assert [p.read_bytes() for p in made[0]] == [p.read_bytes() for p in made[1]]


def test_the_committed_pictures_are_drawn_from_the_committed_records_and_legible(tmp_path: Path) -> None:
    from tests.test_split_pictures import check_texts

    built = build.build("pods", tmp_path, ("svg",))
    assert [p.name for p in built.files] == ["pods-tpu-v5p.svg", "pods-gpu-h100.svg"]
    for file in built.files:
        assert file.read_bytes() == (ROOT / "docs" / file.name).read_bytes(), (
            f"{file.name}: shardlab figures pods --formats svg --out docs draws it anew"
        )
    with style.house("pods"):
        for figure in pods.draw(read(built.records)).values():
            check_texts(figure)


def test_the_committed_records_are_of_the_committed_config() -> None:
    sweep = load_either(ROOT / "configs" / "plan_scaling.py")
    assert isinstance(sweep, PlanSweep)
    records = read((ROOT / "paper_figures" / "records" / "pods").glob("*.jsonl"))
    assert {r.config_hash for r in records} == {config_hash(cast(Any, sweep))}
    told = [
        (r.values["mode"], r.values["split"], r.values["target"], r.values["global_batch"]) for r in records
    ]
    assert told == [(p.mode, p.line.split, p.target.text, p.batch) for p in sweep.points()]


def test_the_config_of_the_repository_covers_pods_of_8_to_4096() -> None:
    sweep = load_either(ROOT / "configs" / "plan_scaling.py")
    assert isinstance(sweep, PlanSweep)
    sizes = {t.machine.name: [] for t in sweep.pods()}
    for target in sweep.pods():
        sizes[target.machine.name].append(target.devices)
    assert sizes == {name: [8 * 2**i for i in range(10)] for name in ("v5p", "h100")}
    assert all(isinstance(p, PlanPoint) for p in sweep.points())
