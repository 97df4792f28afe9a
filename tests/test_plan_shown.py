"""How a plan is shown: in a terminal, as a page and beside another plan. What is shown is what the plan holds, all of it."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import jax
import pytest

from experiments.compilers.ask import Memory, Refusal
from experiments.plans.compared import difference
from experiments.plans.diff import difference_page, print_difference
from experiments.plans.page import page
from experiments.plans.pictures.arrays import draw, in_use, pictured, shape_of
from experiments.plans.pictures.html import el, join
from experiments.plans.pictures.mesh import board_of
from experiments.plans.pictures.timeline import slots
from experiments.plans.planned import Change, Made, Plan, Total, Verdict
from experiments.plans.planning import plan_for
from experiments.plans.tables import print_plan
from experiments.plans.words import (
    compiled_parts,
    duration,
    predicted_parts,
    side_by_side,
    total_row,
    what_for,
)
from experiments.run_config import Origin
from sharding.axes import AXES, MeshShape
from sharding.finding import human
from sharding.mesh import device_mesh
from sharding.module.differences import UNPREDICTED, Difference
from sharding.price.target import parse_target

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--model.layers", "2", "--model.embed", "32", "--model.head-dim", "8", "--model.mlp", "64")
PLANS = {
    "quickstart": ("quickstart", "tpu:v5e:2x4", ()),
    "moe": ("moe_quick", "tpu:v5e:2x4", ()),
    "hsdp": ("transformer_85m", "gpu:h100:2x8", ("--mesh.data", "2", "--mesh.fsdp", "8", "--model.embed", "64")),
    "sequence": ("quickstart", "tpu:v5e:2x4", ("--rules", "data | fsdp | tensor | sequence")),
    "zigzag": ("long_context", "cpu:8", ()),
    "pod": ("transformer_85m", "tpu:v5p:8x8x16", ("--rules", "data | fsdp | tensor", "--mesh.data", "4", "--mesh.fsdp", "32",
                                                  "--mesh.tensor", "8", "--batch", "256", "--model.heads", "16",
                                                  "--model.kv-heads", "8", "--model.embed", "256")),
}  # fmt: skip
Make = Callable[[str], Plan]


@pytest.fixture(scope="module")
def plan() -> Make:
    """Plans by name, each made once: predicted and modelled, with what a compiler might have made of them."""
    held: dict[str, Plan] = {}

    def made(name: str) -> Plan:
        if name not in held:
            config, target, words = PLANS[name]
            origin = Origin(ROOT / "configs" / f"{config}.py", (*SMALL, *words))
            held[name] = plan_for(origin, origin.experiment(), parse_target(target), "none")
        return held[name]

    return made


def compiled(plan: Plan) -> Plan:
    """The plan with two compiled steps: one that departs from the prediction by name, and XLA's."""
    first, *rest = plan.totals
    halved = Total(first.axes, first.kind, first.times, first.sent // 2)
    named = Difference(
        first.axes, first.kind, "narrowed", (first.times, first.sent), (first.times, halved.sent), first.kind
    )
    theirs = Difference(
        ("data",), "all-reduce", UNPREDICTED, (0, 0), (7, 7777), "all-reduce", "models/transformer.py:1"
    )
    memory = Memory(arguments=1000 * 2**20, outputs=300, aliased=300, temporaries=24 * 2**20, code=0)
    manual = Made(
        "manual", (halved, *rest), (named,), memory, None, {"trace": 1.0, "compile": 2.0}, {"jax": "0.10.2"}
    )
    auto = Made("auto", (Total(("data",), "all-reduce", 7, 7777),), (theirs,), memory, None, {}, {})
    return dataclasses.replace(plan, made=(manual, auto))


class Read(HTMLParser):
    """What a browser would make of a page: its text, the cells of its rows, its tags, its ids."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.mark.parametrize("name", PLANS)
def test_every_array_is_on_the_page_with_its_layout_and_bytes(plan: Make, name: str):
    told = plan(name)
    read = Read(page(told))
    assert not read.wrong
    assert not read.open
    for line in told.explanation.lines:
        label = f"{line.path} {line.source}" if line.source else line.path
        shape = "x".join(map(str, line.shape)) or "scalar"
        rows = [r for r in read.rows if len(r) == 5 and r[0] == label and shape in r[1]]
        assert any(
            r[2].startswith(line.layout) and r[3].startswith(human(line.bytes_per_device)) for r in rows
        ), line
        for placed in line.placed:
            if any(placed.axis in axes for axes in line.dims):
                assert any(f"{placed.rule} {placed.source}" in r[4] for r in rows), line


@pytest.mark.parametrize("name", PLANS)
def test_every_array_is_drawn(plan: Make, name: str):
    told = plan(name)
    each = [p for group in pictured(told.explanation).values() for p in group]
    shown = {(path, p.shape.dims, p.dtype) for p in each for path in p.paths}
    for line in told.explanation.lines:
        assert (line.path, line.dims, line.dtype) in shown or line.kind == "optimizer", line
        assert any(line.path in p.paths and line.dims == p.shape.dims for p in each), line
    figures = [a for t, a in Read(page(told)).tags if t == "figure"]
    axes = len(told.explanation.mesh)
    assert len(figures) == len(each) + axes + (len(told.lies) <= 16)


@pytest.mark.parametrize("name", ["quickstart", "sequence", "moe"])
def test_blocks_are_held_by_the_devices_that_jax_gives_them(plan: Make, name: str):
    told = plan(name).explanation
    mesh = device_mesh(MeshShape(**told.mesh))
    seen = 0
    for line in told.lines:
        for shape in filter(None, (shape_of(line, ()), in_use(line))):
            spec = jax.sharding.PartitionSpec(*(axes or None for axes in shape.dims))
            lies = jax.sharding.NamedSharding(mesh, spec).devices_indices_map(shape.shape)
            for at, device in enumerate(mesh.devices.flat):
                starts = [s.start or 0 for s in lies[device]]
                steps = [n // shape.parts(i, told.mesh) for i, n in enumerate(shape.shape)]
                parts = {i: start // step for i, (start, step) in enumerate(zip(starts, steps, strict=True))}
                assert at in shape.holders(parts, told.mesh)
                assert len(shape.holders(parts, told.mesh)) == sum(x == lies[device] for x in lies.values())
                seen += 1
    assert seen


def test_orders_of_positions_are_drawn(plan: Make):
    told = plan("zigzag").explanation
    line = next(x for x in told.of("batch") if len(x.shape) == 2)
    shape = shape_of(line, told.orders)
    segments = shape.segments(1, told.mesh)
    assert [s.part for s in segments] == [*range(8), *range(6, -1, -1)]
    assert (segments[0].start, segments[-1].stop) == (0, line.shape[1])
    assert draw(shape, told.mesh).count("<rect") >= 15


@pytest.mark.parametrize("name", ["quickstart", "moe", "hsdp"])
def test_numbers_on_the_page_are_those_of_the_plan(plan: Make, name: str):
    told = compiled(plan(name))
    read = Read(page(told))
    rows = side_by_side(told)
    assert {(r.axes, r.kind) for r in rows} >= {(t.axes, t.kind) for t in told.totals}
    for r in (*rows, total_row(told, rows)):
        wanted = [f"{human(t.sent)} ({t.times:,})" if t else "—" for t in (r.predicted, *r.compiled.values())]
        over = " x ".join(r.axes) or "all"
        assert any(row[0] == over and all(w in row for w in wanted) for row in read.rows), r
    assert told.memory is not None
    assert told.modelled is not None
    for n in (told.memory.total, *(p.bytes for p in predicted_parts(told) if p.bytes)):
        assert human(n) in read.text
    for n in (1024 * 2**20, *(p.bytes for p in compiled_parts(told.made[0]) if p.bytes)):
        assert human(n) in read.text
    for s in (told.modelled.step, told.modelled.compute, told.modelled.collectives):
        assert duration(s) in read.text
    for m in told.moved:
        assert any(row[0] == what_for(m) and human(m.sent) in row and m.source in row for row in read.rows), m
    for words in (*told.modelled.assumed, *told.missing, told.verdict.says.partition(": ")[2]):
        assert words in read.text


def test_ratios_are_of_what_a_device_sends(plan: Make):
    told = compiled(plan("quickstart"))
    by = {(r.axes, r.kind): r for r in side_by_side(told)}
    first = told.totals[0]
    assert by[first.axes, first.kind].ratio("manual") == pytest.approx(0.5, rel=1e-6)
    assert all(
        r.ratio("manual") == 1
        for at, r in by.items()
        if at != (first.axes, first.kind) and r.predicted and r.predicted.sent
    )


@pytest.mark.parametrize("name", PLANS)
def test_the_page_needs_nothing_from_anywhere_and_is_the_same_every_time(plan: Make, name: str):
    told = compiled(plan(name))
    text = page(told)
    assert text == page(told) == page(pickle.loads(pickle.dumps(told)))
    for tag, attributes in Read(text).tags:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed", "base", "form"}, tag
        assert not {"src", "href", "srcset", "data"} & set(attributes), (tag, attributes)
        assert not any(k.startswith("on") or "http" in v for k, v in attributes.items()), (tag, attributes)
        assert all(x.startswith("#h") for x in re.findall(r"url\((.*?)\)", " ".join(attributes.values())))
    assert "@import" not in text
    assert "http" not in text


def test_the_bytes_do_not_hang_on_the_process(plan: Make, tmp_path: Path):
    both = compiled(plan("quickstart")), plan("sequence")
    (tmp_path / "plans").write_bytes(pickle.dumps(both))
    code = (
        "import pickle, sys; from experiments.plans.page import page; from experiments.plans.diff import *\n"
        "a, b = pickle.loads(open(sys.argv[1], 'rb').read()); print(page(a) + difference_page(difference(a, b)), end='')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "plans")], env=environment, cwd=tmp_path,
                         capture_output=True, text=True, encoding="utf-8", check=True)  # fmt: skip
    assert run.stdout == page(both[0]) + difference_page(difference(*both))


EVIL = "<script>alert('1&2')</script>\"><img src=x onerror=1>"


def test_whatever_a_user_names_is_escaped(plan: Make, capsys: pytest.CaptureFixture[str]):
    told = compiled(plan("quickstart"))
    e = told.explanation
    lines = tuple(dataclasses.replace(x, path=EVIL, source=EVIL, whole=EVIL, notes=(EVIL,)) for x in e.lines)
    moved = tuple(dataclasses.replace(m, op=EVIL, names=EVIL, source=EVIL, rules=(EVIL,)) for m in told.moved)
    explanation = dataclasses.replace(e, name=EVIL, rules=EVIL, chain=((EVIL, EVIL),), lines=lines)
    refused = dataclasses.replace(told.made[1], refused=Refusal(EVIL, 2, 1), memory=None)
    changes = (Change((EVIL,), 5, None),)
    verdict = Verdict(7, "compiled", 3, False, EVIL, changes)
    planted = dataclasses.replace(told, config=EVIL, devices=EVIL, explanation=explanation, moved=moved, missing=(EVIL,),
                                  made=(told.made[0], refused), verdict=verdict, over_budget=(EVIL,))  # fmt: skip
    for text in (
        page(planted),
        difference_page(difference(planted, told)),
        difference_page(difference(told, planted)),
    ):
        read = Read(text)
        assert not {"script", "img"} & {tag for tag, _ in read.tags}
        assert read.text.count(EVIL) > 20
        assert not read.wrong
    print_plan(planted)
    print_difference(difference(planted, told))
    assert EVIL in capsys.readouterr().out
    assert el("b", EVIL, title=EVIL).count("<") == 2
    assert join([EVIL]).count("<") == 0


@pytest.mark.parametrize("name", PLANS)
def test_the_first_screen_of_a_window_says_what_is_decided_by(
    plan: Make, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    told = compiled(plan(name))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    print_plan(told)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) < 140
    first = " ".join(" ".join(lines[:40]).split())
    assert told.memory is not None
    assert told.modelled is not None
    assert told.verdict.says in first
    assert human(told.memory.total) in first
    assert told.modelled.bottleneck in first
    if told.modelled.step is not None:
        assert f"{duration(told.modelled.step)} modelled" in first


def test_a_pipe_has_every_row_on_one_line(plan: Make, capsys: pytest.CaptureFixture[str]):
    told = compiled(plan("quickstart"))
    print_plan(told)
    lines = capsys.readouterr().out.splitlines()
    for m in told.moved:
        wanted = (what_for(m), " x ".join(m.axes), m.kind, m.phase, human(m.sent), m.source, *m.rules)
        assert any(all(w in line for w in wanted) for line in lines), m
    assert told.modelled is not None
    for c in told.modelled.moved:
        assert any(all(w in line for w in (c.kind, c.op, duration(c.seconds), c.path)) for line in lines), c
    assert any(
        "predicted" in x and "compiled (shardlab)" in x and "compiled (XLA's partitioner)" in x for x in lines
    )
    assert any("data" in x and "all-reduce" in x and "models/transformer.py:1" in x for x in lines)


def test_a_departure_without_a_name_is_not_passed_over(plan: Make, capsys: pytest.CaptureFixture[str]):
    told = compiled(plan("quickstart"))
    manual = told.made[0]
    stray = dataclasses.replace(manual.differences[0], name="", predicted=(0, 0), compiled=(3, 4321))
    told = dataclasses.replace(told, made=(dataclasses.replace(manual, differences=(stray,)),))
    print_plan(told)
    out = capsys.readouterr().out
    assert "NO NAME" in out
    assert "for which there is no name: 4.22 KiB" in out
    text = page(told)
    assert "for which there is no name: 4.22 KiB" in text
    assert 'class="unnamed"' in text
    assert 'class="unnamed"' not in page(plan("quickstart"))


def test_a_step_that_does_not_fit_says_what_would(plan: Make, capsys: pytest.CaptureFixture[str]):
    told = plan("quickstart")
    change = Change(("--mesh.fsdp", "8"), 2**30, 0.5)
    told = dataclasses.replace(
        told, verdict=Verdict(2**40, "predicted", 2**34, False, "It does not fit: so much.", (change,))
    )
    print_plan(told)
    for text in (capsys.readouterr().out, Read(page(told)).text):
        assert "--mesh.fsdp 8" in text
        assert "1 GiB predicted" in text
        assert "modelled step 500 ms" in text


def test_a_plan_of_a_model_without_names_is_shown_with_what_it_lacks(capsys: pytest.CaptureFixture[str]):
    origin = Origin(ROOT / "configs" / "foreign_linen.py")
    told = plan_for(origin, origin.experiment(), parse_target("gpu:h100:8"), "none")
    assert told.memory is None
    assert told.modelled is None
    assert not told.moved
    print_plan(told)
    for text in (capsys.readouterr().out, Read(page(told)).text):
        assert all(words in text for words in told.missing)
    merged = [
        p for p in pictured(told.explanation)["Parameters, gradients and optimizer state"] if len(p.paths) > 1
    ]
    assert {path for p in merged for path in p.paths} < {line.path for line in told.explanation.lines}
    assert difference(told, told).empty


@pytest.mark.parametrize("name", ["quickstart", "moe", "hsdp", "pod"])
def test_the_timeline_is_as_long_as_the_modelled_step(plan: Make, name: str):
    modelled = plan(name).modelled
    assert modelled is not None
    assert modelled.step is not None
    assert sum(s.seconds for s in slots(modelled)) == pytest.approx(
        modelled.step * (1 - modelled.bubble), rel=1e-9
    )
    moved = modelled.moved[0]
    assert moved.seconds is not None
    beside = dataclasses.replace(moved, hidden=moved.seconds / 2)
    shorter = dataclasses.replace(
        modelled, moved=(beside, *modelled.moved[1:]), hidden=modelled.hidden + beside.hidden
    )
    less = sum(s.seconds for s in slots(modelled)) - sum(s.seconds for s in slots(shorter))
    assert less == pytest.approx(moved.seconds / 2)


@pytest.mark.parametrize("name", PLANS)
def test_the_mesh_picture_has_every_device_once_and_the_groups_of_the_mesh(plan: Make, name: str):
    told = plan(name)
    board = board_of(told)
    assert sorted(board.at) == list(range(len(told.lies)))
    assert len(set(board.at.values())) == len(told.lies)
    assert sorted(told.lies) == list(range(len(told.lies)))
    sizes = told.explanation.mesh
    grid = jax.numpy.arange(len(told.lies)).reshape([sizes.get(a, 1) for a in AXES])
    for axis in sizes:
        at = tuple(slice(None) if a == axis else 0 for a in AXES)
        assert board.group(axis) == grid[at].tolist()
        assert [board.coordinate(p, axis) for p in board.group(axis)] == list(range(sizes[axis]))


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_differs_in_nothing_from_itself(plan: Make, name: str, capsys: pytest.CaptureFixture[str]):
    told = compiled(plan(name))
    same = difference(told, pickle.loads(pickle.dumps(told)))
    assert same.empty
    print_difference(same)
    for text in (capsys.readouterr().out, difference_page(same)):
        assert "The two plans are equal" in text


def test_the_difference_names_what_moved_and_the_rule_that_moved_it(
    plan: Make, capsys: pytest.CaptureFixture[str]
):
    a, b = plan("quickstart"), plan("sequence")
    told = difference(a, b)
    assert told.changed == ("rules",)
    ours, theirs = a.explanation.lines, b.explanation.lines
    pairs = list(zip(ours, theirs, strict=True))
    assert (
        len(told.arrays)
        == sum((x.layout, x.bytes_per_device) != (y.layout, y.bytes_per_device) for x, y in pairs)
        > 3
    )
    for moved in told.arrays:
        assert [(p.name, p.axis, p.rule) for p in moved.gained] == [("length", "tensor", "sequence()")]
        assert not moved.lost
    print_difference(told)
    out = capsys.readouterr().out
    assert "+ length/tensor 2 by sequence() sharding/rules/sequence.py" in out
    text = Read(difference_page(told)).text
    for moved in told.arrays:
        assert moved.a is not None
        assert moved.b is not None
        assert moved.a.layout in text
        assert moved.b.layout in text
    there = json.loads(json.dumps(told.to_json()))
    assert len(there["arrays"]) == len(told.arrays)
    assert there["arrays"][0]["gained"][0]["rule"] == "sequence()"
    back = difference(b, a)
    assert {p.rule for m in back.arrays for p in m.lost} == {"sequence()"}


def test_differences_add_up(plan: Make):
    a, b = plan("quickstart"), plan("sequence")
    told = difference(a, b)
    gained = lambda rows: sum((r.b or (0, 0))[1] - (r.a or (0, 0))[1] for r in rows)
    sent = sum(t.sent for t in b.totals) - sum(t.sent for t in a.totals)
    assert gained(told.traffic) == gained(told.ops) == sent != 0
    assert a.memory is not None
    assert b.memory is not None
    (total,) = (f for f in told.memory if f.what == "total")
    assert (total.a, total.b) == (a.memory.total, b.memory.total)
    assert (
        sum((f.b or 0) - (f.a or 0) for f in told.memory if f.what != "total")
        == b.memory.total - a.memory.total
    )
    assert a.modelled is not None
    assert b.modelled is not None
    (step,) = (f for f in told.time if f.what == "step")
    assert (step.a, step.b) == (a.modelled.step, b.modelled.step)


def test_plans_of_other_targets_meshes_and_models_are_compared(
    plan: Make, capsys: pytest.CaptureFixture[str]
):
    told = difference(compiled(plan("quickstart")), plan("hsdp"))
    assert {"config", "target", "mesh", "rules"} <= set(told.changed)
    assert all(f.b is None for f in told.memory if f.said.startswith("compiled"))
    print_difference(told)
    assert "not in B" in capsys.readouterr().out
    moe = difference(plan("quickstart"), plan("moe"))
    assert any(m.a is None for m in moe.arrays)
    assert any(m.b is None for m in moe.arrays)
    assert "not there" in difference_page(moe)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOOK = """<script>addEventListener("load", () => {
const svgs = [...document.querySelectorAll("main svg")].filter(s => s.checkVisibility() && !s.closest("[aria-hidden]"));
const empty = svgs.filter(s => { const r = s.getBoundingClientRect(); return r.width < 5 || r.height < 5 });
const fills = new Set([...document.querySelectorAll("main svg rect, main svg path")].map(x => getComputedStyle(x).fill));
document.title = JSON.stringify({wide: innerWidth, needs: document.documentElement.scrollWidth, svgs: svgs.length,
empty: empty.length, fills: fills.size, ground: getComputedStyle(document.body).backgroundColor})})</script>"""


@pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed: the page is not looked at in a browser"
)
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_chromium_draws_the_page(plan: Make, tmp_path: Path, width: int, dark: bool):
    pages = {name: page(compiled(plan(name))) for name in ("quickstart", "pod")}
    pages["difference"] = difference_page(difference(plan("quickstart"), plan("sequence")))
    for name, text in pages.items():
        (tmp_path / "page.html").write_text(text.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += " --disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
        flags += " --blink-settings=preferredColorScheme=0" if dark else ""
        run = subprocess.run(
            [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / name}", f"--window-size={width},900",
             (tmp_path / "page.html").as_uri()],
            capture_output=True, text=True, encoding="utf-8", timeout=120, check=True,
        )  # fmt: skip
        title = re.search(r"<title>(.*?)</title>", run.stdout, re.DOTALL)
        assert title is not None
        saw = json.loads(title[1].replace("&quot;", '"'))
        assert saw["needs"] <= saw["wide"] <= max(width, 500), (name, saw)
        assert saw["svgs"] > 8, (name, saw)
        assert saw["empty"] == 0, (name, saw)
        assert saw["fills"] > 5, (name, saw)
        assert (saw["ground"] == "rgb(255, 255, 255)") is not dark, (name, saw)
