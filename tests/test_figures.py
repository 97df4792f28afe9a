"""Figures: found by place, drawn from records alone, the same bytes every time, and never an empty picture."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import cli
from experiments.commands import figures
from experiments.records import Header, MissingRecords, RecordError, Records, installed_versions, read
from paper_figures import build, loss_curves, pipeline_memory, scaling, style

ROOT = Path(__file__).resolve().parent.parent
HEADER = Header(
    run="synthetic-run",
    config_hash="0123abcd",
    seed=3,
    versions=installed_versions(),
    device={"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1},
    mesh={"data": 2, "fsdp": 4},
    details={
        "name": "synthetic",
        "data": {"name": "synthetic", "vocab": 256, "heldout_unigram_bits_per_byte": 4.5},
        "evaluated": {"unigram_bits_per_byte": 4.75, "xz_bits_per_byte": 2.25},
    },
)
GPU = {"platform": "gpu", "kind": "synthetic gpu", "count": 8, "processes": 1}
PLACED = build.figure_names()


def train(
    path: Path, header: Header = HEADER, steps: int = 40, provenance: str = "measured", **last: float
) -> Path:
    """Made-up training records: an exponential decay, held-out points every tenth step."""
    with Records(path, header) as records:
        for step in range(1, steps + 1):
            nats = 1.5 + 4 * math.exp(-step / 10)
            values = {"loss": nats, "tokens": 4096 * step} | (last if step == steps else {})
            records.write("step", provenance, values, step=step)
            if step % 10 == 0:
                records.write(
                    "eval", "measured", {"loss": nats, "bits_per_byte": nats / math.log(2)}, step=step
                )
    return path


def sweep(
    path: Path, modes: tuple[str, ...] = ("strong", "weak"), header: Header = HEADER, **change: object
) -> Path:
    """Made-up sweep records of two splits over 1, 2 and 4 devices, three rounds each; on cpu the rate stays,
    else grows.
    """
    with Records(path, replace(header, mesh={})) as records:
        for mode in modes:
            for cost, split in enumerate(("data", "tensor")):
                for devices in (1, 2, 4):
                    tokens = 4096 * (devices if mode == "weak" else 1)
                    rate = (
                        4096
                        * (1 if header.device["platform"] == "cpu" else devices)
                        * (1 - 0.1 * cost * (devices > 1))
                    )
                    seconds = [tokens / rate * spread for spread in (1.0, 0.9, 1.25)]
                    values = {
                        "mode": mode, "split": split, "devices": devices, "global_batch": tokens // 256,
                        "tokens_per_step": tokens, "step_seconds": seconds, "cores": 2,
                    }  # fmt: skip
                    records.write("sweep", "measured", values | change)
    return path


def layouts(path: Path) -> Path:
    """Made-up records of where three arrays of a config lie."""
    placed = {"size": 2, "rule": "data()", "source": "data.py:8"}
    same = {"bytes_per_device": 64, "copies": 1, "in_use": "", "source": "", "dtype": "float32"}
    with Records(path, replace(HEADER, run="synthetic-layout")) as records:
        for kind, shape, names in (
            ("batch", [8, 4], ["batch", "length"]),
            ("parameter", [4, 8], ["embed", "mlp"]),
            ("activation", [8, 4, 4], ["batch", "length", "embed"]),
        ):
            split = "batch" in names
            dims = [["data"] if n == "batch" else [] for n in names]
            why = [{"name": "batch", "axis": "data", **placed}] if split else []
            layout = " ".join(n + "/data" * (n == "batch") for n in names)
            values = {"kind": kind, "path": kind, "shape": shape, "names": names, "dims": dims, "placed": why}
            records.write("layout", "modelled", values | same | {"layout": layout})
    return path


def pods(path: Path) -> Path:
    """Made-up records of two splits modelled on pods of three sizes."""
    with Records(path, replace(HEADER, run="synthetic-pods", mesh={})) as records:
        for cost, split in enumerate(("fsdp", "tensor")):
            for devices in (8, 16, 32):
                values = {
                    "mode": "weak", "split": split, "target": f"gpu:h100:{devices // 8}x8", "machine": "gpu:h100",
                    "machine_kind": "synthetic gpu", "devices": devices, "tokens_per_step": 4096 * devices,
                    "step_seconds": 1.0 + cost, "compute_seconds": 0.5, "mfu": 0.4 / (1 + cost), "fits": devices > 8,
                    "limit": "products" if devices < 32 else f"{split}, NVLink", "missing": [],
                    "parts": {"products": 0.5, f"{split}, NVLink": 0.5}, "latency": {f"{split}, NVLink": 0.3},
                }  # fmt: skip
                records.write("pod", "modelled", values)
    return path


def pipelines(path: Path) -> Path:
    """Made-up records of two schedules of a pipeline: bytes against micro-batches."""
    with Records(path, replace(HEADER, run="synthetic-pipeline", mesh={"stage": 4})) as records:
        for cost, schedule in enumerate(("gpipe", "1f1b")):
            for m in (4, 8, 16):
                where, slots = {"schedule": schedule, "stages": 4, "microbatches": m}, 7 if cost else m
                records.write("pipeline_buffers", "modelled", where | {"counted_bytes": slots << 20})
                records.write("pipeline_memory", "compiled", where | {"temp_bytes": (slots << 20) + 4096})
    return path


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file with all that the figures of this repository draw from."""
    path = tmp_path_factory.mktemp("synthetic") / "records.jsonl"
    train(path)
    layouts(path)
    pods(path)
    pipelines(path)
    return sweep(path, header=replace(HEADER, run="synthetic-sweep"))


@pytest.fixture(scope="module")
def drawn(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, build.Built]:
    """Every figure of this repository, built once in this process."""
    built, missing = build.build_all(PLACED, tmp_path_factory.mktemp("drawn"), paths=[synthetic])
    assert not missing
    return {figure.name: figure for figure in built}


def test_the_two_first_figures_stand_in_their_place() -> None:
    assert {"loss_curves", "scaling"} <= set(PLACED)
    assert not {"build", "style", "__init__"} & set(PLACED)


@pytest.mark.parametrize("name", PLACED)
def test_every_figure_keeps_the_contract(name: str, drawn: dict[str, build.Built]) -> None:
    source = build.load(name)
    assert f"shardlab figures {name}" in source.sections["Reproduce"]
    assert all(glob.endswith(".jsonl") for glob in source.globs)
    files = drawn[name].files
    assert [p.name for p in files] == [f"{name}.svg", f"{name}.pdf", f"{name}.png"]
    assert [p.read_bytes()[:5] for p in files] == [b"<?xml", b"%PDF-", b"\x89PNG\r"]
    assert not list(files[0].parent.glob(".*"))
    inches = float(files[0].read_text().split('width="')[1].split("pt")[0]) / 72
    assert inches in (style.COLUMN, style.PAGE)
    with pytest.raises(MissingRecords):
        source.draw([])


@pytest.mark.parametrize("name", PLACED)
def test_committed_records_draw(name: str, tmp_path: Path) -> None:
    """Where records are committed they draw; where they are not yet, the error tells how to make them."""
    source = build.load(name)
    committed = [f for g in source.globs for f in (ROOT / "paper_figures" / "records").glob(g)]
    if committed:
        assert build.build(name, tmp_path, ("svg",)).files
    else:
        with pytest.raises(MissingRecords, match=r"Make them with: shardlab "):
            build.build(name, tmp_path, ("svg",))


def test_a_fresh_process_writes_the_same_bytes_and_no_jax(
    synthetic: Path, drawn: dict[str, build.Built], tmp_path: Path
) -> None:
    script = (
        "import sys; from experiments.commands.figures import main\n"
        "code = main(['--records', sys.argv[1], '--out', sys.argv[2]])\n"
        "heavy = {m.split('.')[0] for m in sys.modules} & {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}\n"
        "assert not heavy, heavy\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "sys.exit(code)"
    )
    # A user's own look, hash seed and time zone must not reach the figures.
    (tmp_path / "matplotlibrc").write_text("font.size: 11\nlines.linewidth: 3\naxes.grid: True\n")
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "MATPLOTLIBRC": str(tmp_path)}
    command = [sys.executable, "-c", script, str(synthetic), str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    here = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for f in drawn.values() for p in f.files}
    there = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "out").iterdir()}
    assert len(here) == 3 * len(PLACED)
    assert there == here


def test_the_check_for_jax_sees_a_figure_that_imports_it(tmp_path: Path) -> None:
    """The guard above, planted: a figure outside the repository that imports a module named jax is seen."""
    (tmp_path / "jax.py").write_text("")
    mine = tmp_path / "mine.py"
    body = (ROOT / "paper_figures" / "loss_curves.py").read_text()
    mine.write_text(body.replace("import math\n", "import math\nimport jax\n"))
    script = (
        "import sys; from paper_figures import build, loss_curves, scaling\n"
        "assert 'jax' not in sys.modules\n"
        "build.load(sys.argv[1]); assert 'jax' in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script, str(mine)], cwd=ROOT, env=environment, check=True)


def test_a_pipelines_memory_is_drawn_as_its_records_say(tmp_path: Path) -> None:
    counted, compiled = pipeline_memory.draw(read(pipelines(tmp_path / "a.jsonl"))).axes
    heights = lambda axes: [np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()]
    assert heights(counted) == [[4.0, 8.0, 16.0], [7.0, 7.0, 7.0]]
    assert heights(compiled) == [[n + 2**-8 for n in row] for row in heights(counted)]


def test_a_pipelines_memory_is_not_drawn_from_a_model_in_place_of_a_compilation(tmp_path: Path) -> None:
    rows = read(pipelines(tmp_path / "a.jsonl"))
    with Records(tmp_path / "b.jsonl", replace(HEADER, run="modelled")) as records:
        for r in rows:
            records.write(r.kind, "modelled", r.values)
    with pytest.raises(RecordError, match="pipeline_memory records are modelled"):
        build.build("pipeline_memory", tmp_path, ("svg",), [tmp_path / "b.jsonl"])


def test_mixed_provenance_is_refused(tmp_path: Path) -> None:
    path = train(tmp_path / "a.jsonl")
    train(tmp_path / "b.jsonl", replace(HEADER, run="synthetic-model"), provenance="modelled")
    with pytest.raises(RecordError, match="mixes records of different provenance"):
        build.build("loss_curves", tmp_path, ("svg",), [path, tmp_path / "b.jsonl"])
    with pytest.raises(
        RecordError, match="mixes records of different provenance"
    ):  # modelled steps, measured evals
        build.build("loss_curves", tmp_path, ("svg",), [tmp_path / "b.jsonl"])
    assert not list(tmp_path.glob("*.svg"))


def test_loss_is_in_bits_per_byte_where_every_run_can_say_so(tmp_path: Path) -> None:
    records = read(train(tmp_path / "a.jsonl"))
    figure = loss_curves.draw(records)
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Loss (bits per byte)"
    line = axes.get_lines()[0]
    assert np.asarray(line.get_xdata()).tolist() == [4096.0 * s for s in range(1, 41)]
    wanted = [(1.5 + 4 * math.exp(-s / 10)) / math.log(2) for s in range(1, 41)]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx(wanted)
    assert np.asarray(axes.get_lines()[1].get_xdata()).tolist() == [40960.0, 81920.0, 122880.0, 163840.0]
    assert {"unigram 4.75", "xz 2.25"} <= {t.get_text() for t in axes.texts}
    plain = [
        r for r in records if r.kind == "step"
    ]  # without evaluations or bytes per token: nats, and no such lines
    axes = loss_curves.draw(plain).axes[0]
    assert axes.get_title(loc="left") == "Loss (nats per token)"
    assert not {"unigram 4.75", "xz 2.25"} & {t.get_text() for t in axes.texts}


def test_curves_of_tokens_and_of_examples_are_both_named(tmp_path: Path) -> None:
    images = replace(HEADER, run="images", details={"name": "images", "data": {"name": "digits"}})
    paths = train(tmp_path / "text.jsonl"), train(tmp_path / "images.jsonl", images)
    plain = [r for r in read(list(paths)) if r.kind == "step"]
    assert loss_curves.draw(plain).axes[0].get_title("left") == "Loss (nats per token or example)"


def test_small_print_stays_on_the_page() -> None:
    with style.house("small print"):
        figure = style.Figure(figsize=(style.COLUMN, 2))
        style.note(
            figure,
            "Measured on 8 NVIDIA H100 80GB HBM3 devices. Lines: training batches; points: held-out data.",
        )
        figure.draw_without_rendering()
        (said,) = figure.texts
        assert len(said.get_text().splitlines()) == 2
        assert said.get_window_extent().x1 <= figure.bbox.x1


def resumed_on(path: Path, before: dict[str, Any], after: dict[str, Any]) -> list[Any]:
    """Records of a run that was resumed after step 20 with other rows to evaluate: what is known of the texts."""
    with Records(path, replace(HEADER, details={**HEADER.details, "evaluated": before})) as records:
        values: dict[str, float] = {"loss": 2.0}
        for step in range(1, 21):
            records.write("step", "measured", values | {"tokens": 4096 * step}, step=step)
            if step % 10 == 0:
                size = before.get("bytes_per_token")
                bits = {} if size is None else {"bits_per_byte": 2.0 / math.log(2) / size}
                records.write("eval", "measured", values | bits, step=step)
    with Records(
        path, replace(HEADER, details={**HEADER.details, "evaluated": after}, resumed_step=20)
    ) as records:
        for step in range(21, 41):
            records.write("step", "measured", values | {"tokens": 4096 * step}, step=step)
            if step % 10 == 0:
                size = after["bytes_per_token"]
                records.write(
                    "eval", "measured", {"loss": 1.0, "bits_per_byte": 1 / math.log(2) / size}, step=step
                )
    return read(path)


def points_of(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """Face colour -> held-out points."""
    marked = [line for line in axes.get_lines() if line.get_linestyle() == "None"]
    return {
        str(line.get_markerfacecolor()): [tuple(p) for p in np.asarray(line.get_xydata()).tolist()]
        for line in marked
    }


def test_a_run_resumed_on_another_held_out_text_keeps_the_two_apart(tmp_path: Path) -> None:
    one = {"bytes_per_token": 4.0, "unigram_bits_per_byte": 4.5, "xz_bits_per_byte": 2.0}
    two = {"bytes_per_token": 2.0, "unigram_bits_per_byte": 4.75, "xz_bits_per_byte": 2.25}
    records = resumed_on(tmp_path / "a.jsonl", one, two)
    figure = loss_curves.draw(records)
    axes = figure.axes[0]
    nat = 1 / math.log(2)
    assert points_of(axes) == {
        style.colour(0): [(40960.0, pytest.approx(2 * nat / 4)), (81920.0, pytest.approx(2 * nat / 4))],
        "white": [(122880.0, pytest.approx(nat / 2)), (163840.0, pytest.approx(nat / 2))],
    }
    said = {text.get_text() for text in axes.texts}
    assert {"unigram 4.75", "xz 2.25", "unigram 4.50 (to step 20)", "xz 2.00 (to step 20)"} <= said
    grey = {np.asarray(line.get_ydata())[0] for line in axes.get_lines() if line.get_color() == style.GREY}
    assert grey == {4.5, 2.0, 4.75, 2.25}
    assert "Filled points: of another held-out text" in figure.get_supxlabel()


def test_values_of_one_corpus_are_told_apart_by_the_run(tmp_path: Path) -> None:
    def evaluated(name: str, unigram: float, data: str = "synthetic") -> Path:
        details = {**HEADER.details, "name": name, "data": {**HEADER.details["data"], "name": data}}
        details["evaluated"] = {"unigram_bits_per_byte": unigram, "xz_bits_per_byte": 2.25}
        return train(tmp_path / f"{name}.jsonl", replace(HEADER, run=name, details=details))

    def said(*paths: Path) -> set[str]:
        texts = {text.get_text() for text in loss_curves.draw(read(list(paths))).axes[0].texts}
        return {text for text in texts if text.startswith(("unigram", "xz"))}

    a, b, c = evaluated("a", 4.5), evaluated("b", 4.75), evaluated("c", 4.75)
    assert said(a, b) == {"unigram 4.50 (a)", "unigram 4.75 (b)", "xz 2.25"}
    assert said(a, b, c) == {"unigram 4.50 (a)", "unigram 4.75 (b and 1 more)", "xz 2.25"}
    assert said(b, c) == {"unigram 4.75", "xz 2.25"}
    other = evaluated("d", 4.0, "other")
    assert said(a, b, other) == {
        "unigram 4.50 (synthetic, a)", "unigram 4.75 (synthetic, b)", "unigram 4.00 (other)",
        "xz 2.25 (synthetic)", "xz 2.25 (other)",
    }  # fmt: skip


def test_records_from_before_a_text_was_known_are_told_from_those_after(tmp_path: Path) -> None:
    figure = loss_curves.draw(
        resumed_on(tmp_path / "a.jsonl", {}, {"bytes_per_token": 2.0, "xz_bits_per_byte": 2.25})
    )
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Loss (nats per token)", "of the first, nobody knows its bytes"
    assert [len(points) for points in points_of(axes).values()] == [2, 2]
    assert "Filled points: of another held-out text" in figure.get_supxlabel()


def test_a_run_resumed_on_the_same_text_has_one(tmp_path: Path) -> None:
    known = {"bytes_per_token": 2.0, "xz_bits_per_byte": 2.25}
    figure = loss_curves.draw(resumed_on(tmp_path / "a.jsonl", known, known))
    assert [len(points) for points in points_of(figure.axes[0]).values()] == [4]
    assert "Filled" not in figure.get_supxlabel()
    assert "xz 2.25" in {text.get_text() for text in figure.axes[0].texts}


@pytest.mark.parametrize("what", ["no evaluation", "evaluations that are not finite"])
def test_without_a_held_out_point_the_axes_have_their_full_height(what: str, tmp_path: Path) -> None:
    records = read(train(tmp_path / "a.jsonl"))
    known = {"evaluated": {"bytes_per_token": 1.0, "unigram_bits_per_byte": 4.75}}
    bare = [replace(r, header=replace(r.header, details={**HEADER.details, **known})) for r in records]
    if what == "no evaluation":
        bare = [r for r in bare if r.kind == "step"]
    else:
        bare = [replace(r, values={"loss": math.nan}) if r.kind == "eval" else r for r in bare]

    def height(drawn: list[Any]) -> float:
        figure = loss_curves.draw(drawn)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib's, that a layout has collapsed
            figure.draw_without_rendering()
        axes = figure.axes[0]
        assert axes.get_title(loc="left") == "Loss (bits per byte)"
        assert "unigram 4.75" in {t.get_text() for t in axes.texts}
        return axes.get_position().height

    assert height(bare) == pytest.approx(height(records), abs=0.02)
    assert height(bare) > 0.5


def test_a_loss_that_is_not_finite_is_marked(tmp_path: Path) -> None:
    axes = loss_curves.draw(read(train(tmp_path / "a.jsonl", loss=math.nan))).axes[0]
    assert any("not finite at 40" in t.get_text() for t in axes.texts)


def test_runs_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    one, two = HEADER, replace(HEADER, run="synthetic-2", mesh={"tensor": 8, "data": 1})
    assert loss_curves._names([one, two]) == ["data 2 × fsdp 4", "tensor 8"]
    assert loss_curves._names([one, replace(two, details={"name": "other"})]) == ["synthetic", "other"]
    assert loss_curves._names([one, replace(one, run="r2", seed=4)]) == ["seed 3", "seed 4"]
    assert loss_curves._names([one, replace(one, run="r2")]) == ["synthetic-run", "r2"]
    figure = loss_curves.draw(read([train(tmp_path / "a.jsonl"), train(tmp_path / "b.jsonl", two)]))
    assert {"data 2 × fsdp 4", "tensor 8"} <= {t.get_text() for t in figure.axes[0].texts}


def test_pretend_devices_have_a_flat_ideal_and_real_ones_a_slope(tmp_path: Path) -> None:
    figure = scaling.draw(read(sweep(tmp_path / "cpu.jsonl")))
    assert len(figure.axes) == 4
    assert "share the same 2 CPU cores, so the ideal is a flat line" in figure.get_supxlabel()
    left, right = figure.axes[:2]
    assert {"ideal", "data 100%", "tensor 90%"} == {t.get_text() for t in right.texts}
    ideal = next(line for line in left.get_lines() if line.get_color() == style.GREY)
    assert np.asarray(ideal.get_ydata()).tolist() == [4096.0] * 3
    figure = scaling.draw(read(sweep(tmp_path / "gpu.jsonl", ("strong",), replace(HEADER, device=GPU))))
    assert "flat" not in figure.get_supxlabel()
    left, right = figure.axes
    assert {"ideal", "data 4×", "tensor 3.6×"} == {t.get_text() for t in left.texts}
    assert {"ideal", "data 100%", "tensor 90%"} == {t.get_text() for t in right.texts}
    ideal = next(line for line in left.get_lines() if line.get_color() == style.GREY)
    assert np.asarray(ideal.get_ydata()).tolist() == [1, 2, 4]


def test_points_are_medians_and_bars_the_range(tmp_path: Path) -> None:
    (data, _) = scaling._series(read(sweep(tmp_path / "a.jsonl", ("strong",))))
    assert data.base_rate == 4096
    axes = scaling.draw(read(tmp_path / "a.jsonl")).axes[1]
    container = axes.containers[0]
    points, _, (bars,) = container  # type: ignore[misc]
    assert np.asarray(points.get_ydata()).tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert [s[:, 1].tolist() for s in bars.get_segments()] == [pytest.approx([1 / 1.25, 1 / 0.9])] * 3


def test_one_device_is_measured_once_for_all_splits(tmp_path: Path) -> None:
    records = [
        r for r in read(sweep(tmp_path / "a.jsonl")) if r.values["split"] == "data" or r.values["devices"] > 1
    ]
    assert [s.base_devices for s in scaling._series(records)] == [1] * 4
    records = [r for r in records if r.values["devices"] > 1]
    assert [s.base_devices for s in scaling._series(records)] == [2] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "sideways"}, "'strong' or 'weak'"),
        ({"step_seconds": []}, "median step time of each round"),
        ({"step_seconds": [0.0]}, "median step time of each round"),
        ({"devices": "2"}, "needs a number from every record"),
        ({"tokens_per_step": 4096, "mode": "weak"}, "in proportion to the devices"),
    ],
)
def test_a_sweep_that_is_none_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        scaling.draw(read(sweep(tmp_path / "a.jsonl", ("strong",), **change)))


def test_pretend_and_real_devices_have_no_common_ideal(tmp_path: Path) -> None:
    sweep(tmp_path / "a.jsonl")
    sweep(tmp_path / "b.jsonl", header=replace(HEADER, run="synthetic-gpu", device=GPU))
    with pytest.raises(RecordError, match="mix pretend devices"):
        scaling.draw(read([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))


def test_a_run_is_drawn_into_its_folder(tmp_path: Path) -> None:
    train(tmp_path / "run" / "records.jsonl")
    assert figures.draw_run(tmp_path / "run") == [
        tmp_path / "run" / "loss.svg",
        tmp_path / "run" / "loss.png",
    ]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["loss.png", "loss.svg", "records.jsonl"]
    with pytest.raises(MissingRecords):
        figures.draw_run(tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "runs" / "records.jsonl").parent
    common = ["--records", str(run), "--out", str(tmp_path / "out"), "--formats", "svg"]
    assert (
        figures.main([*common, "--json", str(tmp_path / "result.json")]) == 0
    )  # draws what these records can draw
    said = capsys.readouterr()
    assert said.out == f"{tmp_path}/out/loss_curves.svg\n"
    assert "The figure scaling has no records to draw" in said.err
    result = json.loads((tmp_path / "result.json").read_text())
    (drawn,) = [f for figure in result["figures"] for f in figure["files"]]
    assert drawn["sha256"] == hashlib.sha256(Path(drawn["path"]).read_bytes()).hexdigest()
    assert list(result["missing"]) == [name for name in build.figure_names() if name != "loss_curves"]

    assert figures.main(["scaling", *common]) == 2  # asked for by name, it must be there
    assert "Make them with: shardlab sweep" in capsys.readouterr().err
    assert not (tmp_path / "out" / "scaling.svg").exists()
    assert figures.main(["pie", *common]) == 2
    assert f"no figure 'pie'. The figures are {', '.join(build.figure_names())};" in capsys.readouterr().err
    for name, why in (("./nofig.py", "it does not exist (looked for from "), (f"{run}.py", "it is a folder")):
        run.with_name("runs.py").mkdir(exist_ok=True)
        assert figures.main([name, *common]) == 2
        assert f"There is no figure file {name}: {why}" in capsys.readouterr().err
    assert figures.main(["scaling.py", *common]) == 2
    assert "The figure scaling of shardlab's own is asked for without .py." in capsys.readouterr().err
    assert figures.main(["loss_curves", *common[:-1], "gif"]) == 2
    assert "saved as svg, pdf, png, not as gif" in capsys.readouterr().err
    assert figures.main(["--records", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2
    assert "no records at" in capsys.readouterr().err


def test_records_that_are_not_there_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["--records", str(tmp_path / "gone"), "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_figure_of_ones_own_is_a_file_anywhere(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text((ROOT / "paper_figures" / "loss_curves.py").read_text())
    run = train(tmp_path / "records.jsonl")
    assert build.build(str(mine), tmp_path, ("svg",), [run]).files == (tmp_path / "mine.svg",)
    mine.write_text('"""Claim: none."""\n')
    with pytest.raises(RecordError, match=r"section Records:, .* RECORDS, a tuple of globs, draw\(records\)"):
        build.load(str(mine))


FAULTS = {
    "while it draws": (
        "    return 1 / 0\n",
        "ZeroDivisionError: division by zero (",
        "line 9: `return 1 / 0`",
    ),
    "when it is read": (
        "    pass\nimport nowhere\n",
        "No module named 'nowhere'",
        "line 10: `import nowhere`",
    ),
    "a syntax error": ("    return (\n", "was never closed", "line 9"),
    "no figure": ("    return None\n", "draw(records) returned None", "mine.py)"),
    "a record without its values": (
        "    return records[0].values['x']\n",
        "KeyError: 'x'",
        "line 9: `return records[0].values['x']`",
    ),
    "text that cannot be set": (
        "    from matplotlib.figure import Figure\n    f = Figure()\n    f.text(0, 0, '$\\\\frac$')\n    return f\n",
        "ValueError",
        "mine.py)",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_figure_that_raises_is_one_paragraph_and_the_others_are_drawn(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body, said, where = FAULTS[what]
    head = '"""A figure.\n\nClaim: c\nRecords: r\nReproduce: shardlab train c\n"""\nRECORDS = ("*",)\n'
    Path("mine.py").write_text(f"{head}def draw(records):\n{body}")
    train(Path("records.jsonl"))
    words = ["mine.py", "loss_curves", "--records", "records.jsonl", "--out", "out", "--formats", "svg"]
    assert cli.main(["figures", *words, "--json", "result.json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "out/loss_curves.svg\n"
    assert [p.name for p in Path("out").iterdir()] == ["loss_curves.svg"]
    read = what != "a syntax error"
    fault = "mine cannot be drawn" if read else f"file {tmp_path / 'mine.py'} cannot be read"
    assert shown.err.startswith(f"shardlab: The figure {fault}: ")
    assert shown.err.count("\n") == 1
    assert said in shown.err
    assert where in shown.err
    result = json.loads(Path("result.json").read_text())
    assert ([f["name"] for f in result["figures"]], list(result["broken"])) == (["loss_curves"], ["mine.py"])
    assert cli.main(["figures", *words, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None; sys.path.insert(0, '.')\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n"
        "from experiments.commands.figures import main; sys.exit(main(['loss_curves', '--records', "
        "sys.argv[1]]))"
    )
    run = train(tmp_path / "records.jsonl")
    done = subprocess.run(
        [sys.executable, "-c", script, str(run)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "shardlab[figures]" in done.stderr
    assert "Traceback" not in done.stderr


@given(
    st.lists(st.tuples(st.floats(-50, 150), st.floats(1, 8)), min_size=1, max_size=10),
)
def test_labels_are_spread_without_overlap(labels: list[tuple[float, float]]) -> None:
    centres, sizes = [c for c, _ in labels], [s for _, s in labels]
    places = style.spread(centres, sizes, 0, 100)  # ten labels of size 8 always fit
    for place, size in zip(places, sizes, strict=True):
        assert place - size / 2 >= -1e-6
        assert place + size / 2 <= 100 + 1e-6
    order = sorted(range(len(labels)), key=lambda i: places[i])
    for below, above in itertools.pairwise(order):
        assert places[above] - places[below] >= (sizes[above] + sizes[below]) / 2 - 1e-6
        assert centres[below] <= centres[above] or centres[below] == pytest.approx(centres[above])
    free = all(abs(a - b) >= 8 for i, a in enumerate(centres) for b in centres[:i]) and all(
        4 <= c <= 96 for c in centres
    )
    assert not free or places == pytest.approx(centres)


def test_counts_are_short() -> None:
    cases = (0, 950, 3410, 999_900, 1_638_400, 2.5e9)
    assert [style.counted(n) for n in cases] == ["0", "950", "3.41k", "1M", "1.64M", "2.5G"]
