"""Pictures of splits: blocks lie where jax lays them, every page has its picture, and no text covers another."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments import cli
from experiments.records import Header, Record, installed_versions, read
from paper_figures import build, split, style
from paper_figures.blocks import Array, band_of, chosen, holders, listed, split_names
from sharding.order import ZigZag

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted((ROOT / "paper_figures" / "records" / "split").glob("*.jsonl"))
PAGES = ROOT / "docs" / "splits"
CHAINED = {"replicated", "by_path"}
"""Rules that are no split: one keeps names whole, the other says axes one by one."""


def array(shape: tuple[int, ...], dims: tuple[tuple[str, ...], ...], **more: Any) -> Array:
    """An array of made-up names."""
    return Array("x", "", tuple(f"dim{i}" for i in range(len(shape))), shape, dims, (), 4, **more)


def held_in(a: Array, mesh: Mapping[str, int]) -> dict[int, set[tuple[int, ...]]]:
    """Device -> indices of the elements that the picture gives it, all dims drawn."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for cut in itertools.product(*(a.segments(i, mesh) for i in range(len(a.shape)))):
        for device in holders(a, {i: s.part for i, s in enumerate(cut)}, mesh):
            found.setdefault(device, set()).update(itertools.product(*(range(s.start, s.stop) for s in cut)))
    return found


MESHES: tuple[dict[str, int], ...] = (
    {"data": 8},
    {"data": 2, "fsdp": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
)


@given(st.sampled_from(MESHES), st.data())
def test_blocks_are_held_by_the_devices_that_jax_puts_them_on(mesh: dict[str, int], data: st.DataObject):
    left = data.draw(st.permutations(list(mesh)))
    ends = sorted(data.draw(st.tuples(st.integers(0, len(left)), st.integers(0, len(left)))))
    dims = (tuple(left[: ends[0]]), tuple(left[ends[0] : ends[1]]))
    a = array((8, 16), dims)
    real = Mesh(np.asarray(jax.devices()[:8]).reshape(tuple(mesh.values())), tuple(mesh))
    found = NamedSharding(real, PartitionSpec(*dims)).devices_indices_map(a.shape)
    want = {
        number: {(i, j) for i in range(8)[index[0]] for j in range(16)[index[1]]}
        for number, index in ((d.id, at) for d, at in found.items())
    }
    assert held_in(a, mesh) == want


@pytest.mark.parametrize("dims", [("context",), ("context", "tensor")])
def test_positions_in_zigzag_are_drawn_where_they_lie(dims: tuple[str, ...]):
    mesh, size = {"context": 4, "tensor": 2}, 32
    at = ZigZag("context").position(np.arange(size), size, 4)
    starts = [0, *(np.flatnonzero(np.diff(at) != 1) + 1).tolist(), size]
    runs = [[a, int(at[a]), b - a] for a, b in itertools.pairwise(starts)]
    a = array((size,), (dims,), orders=({"names": ["dim0"], "size": size, "axis": "context", "runs": runs},))
    parts = 8 if "tensor" in dims else 4
    for device, held in held_in(a, mesh).items():
        part = device if parts == 8 else device // 2
        assert held == {(int(p),) for p in at[part * size // parts : (part + 1) * size // parts]}, device
    if parts == 4:
        assert [s.part for s in a.segments(0, mesh)] == [0, 1, 2, 3, 2, 1, 0]
    natural = replace(a, orders=())
    assert held_in(natural, mesh) != held_in(a, mesh), "the order is what makes the difference"


@given(st.floats(0.05, 3), st.floats(0.05, 3), st.floats(0.02, 0.5))
def test_stripes_cover_a_block_once(w: float, h: float, band: float):
    areas, at = [], 0.0
    while at < w + h:
        corners = band_of(5, 7, w, h, at, at + band)
        assert all(5 - 1e-9 <= x <= 5 + w + 1e-9 and 7 - 1e-9 <= y <= 7 + h + 1e-9 for x, y in corners)
        turned = [*corners[1:], corners[0]]
        areas.append(abs(sum(x * v - u * y for (x, y), (u, v) in zip(corners, turned, strict=True))) / 2)
        at += band
    assert sum(areas) == pytest.approx(w * h)


def test_devices_in_words():
    assert listed((0, 1, 2, 3, 8), 16) == "0–3 8"
    assert listed((4, 5), 8) == "4 5"
    assert listed(tuple(range(8)), 8) == "all 8"
    assert listed((0,), 1) == "0"


def pictures() -> dict[str, Figure]:
    """Every committed picture as drawn now."""
    return dict(split.draw(read(RECORDS)))


@pytest.mark.parametrize("name", [p.stem for p in RECORDS])
def test_no_text_covers_another_or_leaves_the_page(name: str):
    with style.house("split"):
        figure = pictures()[name]
        check_texts(figure)


def check_texts(figure: Figure) -> None:
    """Each text within the page and apart from all others."""
    figure.draw_without_rendering()
    texts = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_text() and t.get_visible()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    page = figure.bbox
    for words, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1
        assert inside, f"{words!r} leaves the page"
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 0.5 or b.y1 <= a.y0 + 0.5
        assert apart, f"{one!r} covers {two!r}"


def test_the_check_of_texts_sees_a_covered_one():
    with style.house("split"):
        figure = pictures()["data"]
        figure.axes[0].text(0.2, 0.26, "planted")
        with pytest.raises(AssertionError, match="planted"):
            check_texts(figure)


def test_the_committed_pictures_are_drawn_from_the_committed_records(tmp_path: Path):
    built = build.build("split", tmp_path, ("svg",))
    assert {f.name for f in built.files} == {p.name for p in PAGES.glob("*.svg")}
    for file in built.files:
        assert file.read_bytes() == (PAGES / file.name).read_bytes(), (
            f"{file.name}: shardlab figures split --formats svg --out docs/splits draws it anew"
        )


def test_every_rule_has_its_page_with_a_picture():
    shown = {
        picture: page.read_text()
        for page in PAGES.glob("*.md")
        for picture in re.findall(r"!\[[^\]]+\]\(split-(\w+)\.svg\)", page.read_text())
    }
    assert set(shown) == {p.stem for p in RECORDS}, (
        "every picture stands in a page, every page's picture is there"
    )
    chains = {p.stem: json.loads(p.read_text().split("\n")[0])["details"]["rules"] for p in RECORDS}
    rules = {p.stem for p in (ROOT / "sharding" / "rules").glob("*.py")} - {"__init__"} - CHAINED
    for rule in sorted(rules):
        found = [n for n, chain in chains.items() if n == rule or re.search(rf"\b{rule}\(", chain)]
        assert any(f"{rule}(" in shown[n] for n in found), f"no page shows a picture of {rule}()"


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_records_are_what_their_command_explains(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    old = read(path)
    words = shlex.split(old[0].details["command"])[1:]
    again = tmp_path / "again.jsonl"
    words[words.index("--record") + 1] = str(again)
    assert cli.main(words) == 0

    def told(records: list[Record]) -> list[Any]:
        keep = ("kind", "path", "shape", "names", "dims", "bytes_per_device", "in_use")
        rules = [[(p["name"], p["axis"], p["rule"]) for p in r.values["placed"]] for r in records]
        return [[[r.values[k] for k in keep], p] for r, p in zip(records, rules, strict=True)]

    new = read(again)
    assert told(new) == told(old)
    assert new[0].details["orders"] == old[0].details["orders"]


def test_explained_twice_the_last_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    words = ["explain", "configs/digits_mlp.py", "--record", str(tmp_path / "x.jsonl")]
    assert cli.main([*words, "--draw", "features"]) == 0
    assert cli.main([*words, "--draw", "labels", "layers.up", "batch mlp"]) == 0
    figure = split.draw(read(tmp_path / "x.jsonl"))["digits-mlp"]
    said = {t.get_text() for t in figure.axes[0].texts}
    assert {"labels", "layers.up", "result of einsum", "at rest, gradient, optimizer state", "in use"} <= said
    assert "features" not in said
    assert cli.main(["figures", "split", "--records", str(tmp_path / "x.jsonl"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "split.svg").exists(), "one run, one picture, by the figure's name"


def test_an_array_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [
        "explain",
        str(ROOT / "configs/digits_mlp.py"),
        "--record",
        str(tmp_path / "x.jsonl"),
        "--draw",
        "feature",
    ]
    assert cli.main(words) == 2
    assert "--draw 'feature': there is no such array (nearest: 'features')" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()


def rows(*lines: Mapping[str, Any]) -> list[Record]:
    """Records of layouts on a mesh of 512 devices."""
    header = Header(
        "big", "0", 0, installed_versions(), {}, {"data": 64, "tensor": 8}, {"name": "big", "rules": "mine()"}
    )
    return [Record("layout", "modelled", line, header) for line in lines]


def row(kind: str, path: str, shape: list[int], layout: str, **more: Any) -> dict[str, Any]:
    """Values of a record of a layout."""
    words = [w.split("/") for w in layout.split()]
    sizes = {"data": 64, "tensor": 8}
    placed = [{"name": n, "axis": a, "size": sizes[a], "rule": f"{a}()"} for n, *axes in words for a in axes]
    return {
        "kind": kind, "path": path, "shape": shape, "names": [w[0] for w in words], "dims": [w[1:] for w in words],
        "layout": layout, "bytes_per_device": 4096, "placed": placed, "copies": 1, "in_use": "", "source": "", **more,
    }  # fmt: skip


def test_a_mesh_of_many_devices_is_drawn_in_part_and_says_so():
    many = rows(
        row("batch", "tokens", [512, 64], "batch/data length"),
        row("parameter", "layers.mlp.down_projection_of_a_long_name", [8, 512, 64], "layers mlp/tensor embed/data",
            in_use="layers mlp/tensor embed"),
        row("activation", "attention", [512, 64, 16, 4], "batch/data length heads/tensor head_dim"),
        row("activation", "three", [512, 64, 16], "batch/data length/tensor heads"),
    )  # fmt: skip
    with style.house("split"):
        figure = split.draw(many)["big"]
        check_texts(figure)
    said = {t.get_text() for t in figure.axes[0].texts}
    assert {
        "drawn: 16 of 64 parts of batch",
        "8 copies: whole over tensor",
        "… 512 devices in all",
    } <= said


def test_what_is_chosen_shows_every_way_that_a_parameter_lies():
    lines = [
        row("batch", "tokens", [64, 8], "batch/data length"),
        row("batch", "labels", [64], "batch/data"),
        row("parameter", "up", [64, 8], "embed mlp"),
        row("optimizer", "up", [64, 8], "embed/data mlp", copies=2),
        row("activation", "embed", [64, 8, 8], "batch/data length embed"),
        row("activation", "norm", [64, 8, 8], "batch/data length embed"),
        row("activation", "einsum", [64, 8, 8], "batch/data length mlp/tensor"),
    ]
    arrays = chosen(lines, (), (), 5)
    assert [(a.title, a.moment) for a in arrays] == [
        ("tokens", "of the batch"),
        ("up", "at rest, in use"),
        ("up", "optimizer state"),
        ("result of embed", "activation of "),
        ("result of einsum", "activation of "),
    ]
    assert arrays[2].bytes_per_device == 2048, "one of its two arrays"
    assert split_names(arrays) == {"batch", "embed", "mlp"}
    assert arrays[1].drawn(split_names(arrays)) == (0, 1)
    assert chosen(lines, (), ("batch length mlp",), 5)[0].names == ("batch", "length", "mlp")
