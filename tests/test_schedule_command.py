"""`shardlab schedule`: schedules by name, expression and file, drawn alike each time; what docs/schedules.md shows is so."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from experiments import cli
from experiments.schedules.console import columns, print_seen
from experiments.schedules.look import INK, SHADES, colour
from experiments.schedules.named import find, known, parse_schedule, short, show_schedule, written
from experiments.schedules.page import page
from experiments.schedules.seen import Seen, percent, see
from experiments.schedules.svg import alone
from sharding.errors import InputError
from sharding.pipeline.clocks import Costs, independent, lockstep, messages, stash
from sharding.schedules.breadth_first import BreadthFirst
from sharding.schedules.interleaved import Interleaved
from sharding.schedules.one_f_one_b import OneFOneB
from sharding.schedules.zbv import ZBV
from sharding.schedules.zero_bubble import ZeroBubble
from tests.support import ROOT

PAGE = (ROOT / "docs/schedules.md").read_text(encoding="utf-8")
ROUNDS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *words: str) -> tuple[int, str, str]:
    """Exit code, output and error of `shardlab schedule WORDS`."""
    capsys.readouterr()
    code = cli.main(["schedule", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture
def rounds(tmp_path: Path) -> Path:
    """The worked file of the page, elsewhere."""
    path = tmp_path / "rounds.py"
    path.write_text(ROUNDS, encoding="utf-8")
    return path


# Names.


@pytest.mark.parametrize("name", ["1f1b", "one_f_one_b", "OneFOneB", "1f1b(8)", "OneFOneB(microbatches=8)"])
def test_all_names_of_a_schedule_mean_it(capsys: Capture, name: str) -> None:
    code, out, err = run(capsys, name)
    assert (code, err) == (0, "")
    assert out.startswith("1f1b: OneFOneB(microbatches=8) on 4 stages, 14 ticks\n")
    for line in ("lockstep    bubble 27.3 %: a step takes 33", "independent bubble 27.3 %",
                 "stash       7 5 3 1 micro-batches", "messages    24 forward, 24 backward"):  # fmt: skip
        assert line in out


def test_what_is_shown_of_a_value_is_read_back() -> None:
    values = (
        OneFOneB(3),
        Interleaved(8, 4),
        BreadthFirst(5, 3),
        ZBV(2),
        *(kind() for kind in known().values()),
    )
    for value in values:
        assert parse_schedule(show_schedule(value)) == value
    assert show_schedule(OneFOneB(16)) == "OneFOneB(microbatches=16)"
    assert show_schedule(None) == "none"


BAD = {
    "1fb": "no schedule '1fb' (nearest: '1f1b'). The schedules are 1f1b, breadth-first, gpipe, interleaved, zb-h1, zb-v",
    "none": "takes a NAME or a FILE.py first",
    "1f1b --microbatches 0": "OneFOneB has microbatches=0",
    "1f1b --stages 0": "--stages is 0",
    "1f1b --chunks 2": "OneFOneB has no chunks, so it cannot be 2. It has microbatches",
    "interleaved --microbatches 6": "6 micro-batches are no multiple of 4 stages",
    "interleaved(chunks=0)": "Interleaved has chunks=0",
    "1f1b(m=3)": "OneFOneB takes microbatches=8, but got an unexpected keyword argument 'm'",
    "1f1b(microbatches=open)": "cannot be read at `open`",
    "1f1b(microbatches=1,microbatches=2)": "cannot be read at `microbatches=2`",
    "1f1b(**{})": "cannot be read at `**{}`",
    "1f1b(": "cannot be read at `1f1b(`",
    "1f1b(1)(2)": "cannot be read at `1)(2`",
    "1f1b --costs 1,2": "--costs is '1,2', but it takes three numbers",
    "1f1b --costs 1,2,x": "--costs is '1,2,x'",
    "1f1b --costs=-1,1,1": "The cost forward is -1.0",
    "1f1b --costs 0,0,0": "The costs are 0, 0 and 0",
    "1f1b --message=-1": "A message is to take -1.0",
    "1f1b --stage 3": "perhaps --stages?",
    "1f1b --stages four": "--stages four cannot be read",
    "1f1b gpipe": "gpipe",
    "nowhere.py": "no schedule file nowhere.py",
    "1f1b --json docs": "--json docs cannot be written",
    "1f1b --svg docs": "--svg docs cannot be written",
    "1f1b --html docs": "--html docs cannot be written",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_paragraph(capsys: Capture, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.chdir(ROOT)
    code, out, err = run(capsys, *words.split())
    assert (code, out) == (2, "")
    assert BAD[words] in err
    assert err.count("\n") == 1
    assert run(capsys)[0] == 2


FILES = {
    "no schedule": ("x = 1\n", "to have one schedule, a frozen dataclass with microbatches and grid(stages), but has none"),
    "two": (f"{ROUNDS}\n\n{ROUNDS.partition('@dataclass')[1]}{ROUNDS.partition('@dataclass')[2].replace('Rounds', 'Again')}",
            "but has Rounds and Again"),
    "not frozen": (ROUNDS.replace("(frozen=True)", ""), "Rounds in FILE is no frozen dataclass"),
    "no microbatches": (ROUNDS.replace("microbatches", "many"), "Rounds in FILE has no field microbatches"),
    "raises": (ROUNDS.replace("ticks, tasks =", "ticks, tasks = 1 // 0,"), "fails with ZeroDivisionError"),
    "no grid": (ROUNDS.replace("return placed(tasks, looped(stages), self.microbatches)", "return tasks"),
                "grid(4) of Rounds(microbatches=8, together=4) returns a dict"),
    "no Python": ("def (\n", "is not Python"),
    "too few stages": (ROUNDS.replace("looped(stages)", "looped(stages + 1)"), "cannot run"),
    "early": (ROUNDS.replace("- 1 - i - s", "- 3 - i - s"), "In tick 5 stage 3 does B3, which waits for its own F3"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_none_is_refused(capsys: Capture, tmp_path: Path, what: str) -> None:
    text, words = FILES[what]
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    code, out, err = run(capsys, str(path))
    assert (code, out) == (2, "")
    assert words.replace("FILE", str(path)) in err
    assert err.count("\n") == 1


def test_a_schedule_of_ones_own_is_one_file_anywhere(capsys: Capture, rounds: Path) -> None:
    assert not rounds.is_relative_to(ROOT)
    code, out, err = run(capsys, str(rounds), "--microbatches", "16")
    assert (code, err) == (0, "")
    assert out.startswith("Rounds: Rounds(microbatches=16, together=4) on 4 stages, 35 ticks")
    value = parse_schedule(f"{rounds}(together=2)")
    assert value is not None
    assert written(value) == "Rounds(microbatches=8, together=2)"
    assert show_schedule(value) == f"{rounds}(microbatches=8, together=2)"
    assert written(parse_schedule(show_schedule(value))) == written(value)
    assert parse_schedule("rounds.py", rounds.parent) is not None
    with pytest.raises(InputError, match="Rounds of 3 do not make up 8 micro-batches"):
        parse_schedule(f"{rounds}(together=3)")


# What it shows.


def test_the_grid_of_the_page_is_the_commands(capsys: Capture, tmp_path: Path) -> None:
    shown = re.findall(r"```\n(tick .*?)```", PAGE, re.DOTALL)
    assert len(shown) == 1
    assert shown[0] in run(capsys, "1f1b")[1]
    refused = re.findall(r"^> (The grid of .*?)\n\n", PAGE, re.DOTALL | re.MULTILINE)
    assert len(refused) == 1
    broken = ROUNDS.replace("- 1 - i - s", "- 3 - i - s")
    (tmp_path / "broken.py").write_text(broken, encoding="utf-8")
    err = run(capsys, str(tmp_path / "broken.py"))[2]
    assert err == f"shardlab: {' '.join(refused[0].replace(f'{chr(10)}> ', ' ').split())}\n"


def test_the_numbers_of_the_page_are_the_grids() -> None:
    rows = re.findall(
        r"^\| ([\w-]+) \| ([\d.]+ %) \| ([\d.]+ %) \| ([\d. ]+) \| (\d+) \|$", PAGE, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["gpipe", "1f1b", "interleaved", "breadth-first", "zb-h1", "zb-v"]
    for name, together, alone_, kept, sent in rows:
        grid = find(name)(16).grid(4)  # pyright: ignore[reportCallIssue]
        both = messages(grid)
        assert percent(lockstep(grid, Costs()).bubble) == together
        assert percent(independent(grid, Costs()).bubble) == alone_
        assert " ".join(f"{n / grid.chunks:g}" for n in stash(grid)) == kept
        assert both.forward + both.backward == int(sent)


def test_the_json_is_the_whole_schedule(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    assert (
        run(capsys, "zb-v", "--stages", "2", "--microbatches", "3", "--costs", "1,2,3", "--json", str(path))[
            0
        ]
        == 0
    )
    told, grid = json.loads(path.read_text(encoding="utf-8")), ZBV(3).grid(2)
    assert told["expression"] == "ZBV(microbatches=3)"
    assert [told[k] for k in ("stages", "microbatches", "chunks", "ticks")] == [2, 3, 2, grid.ticks]
    assert told["grid"] == [[[str(task) for task in cell] for cell in row] for row in grid.cells]
    assert told["slots"][-1] == "BW"
    assert told["costs"] == {"F": 1, "B": 2, "W": 3}
    for name, clock in (
        ("lockstep", lockstep(grid, Costs(1, 2, 3))),
        ("independent", independent(grid, Costs(1, 2, 3))),
    ):
        assert told[name]["makespan"] == clock.makespan
        assert told[name]["bubble"] == clock.bubble
        assert len(told[name]["tasks"]) == 3 * 4 * 3
    assert told["stash"] == list(stash(grid))
    assert told["messages"] == {"forward": 6, "backward": 6}


SHOWN = (OneFOneB(8), Interleaved(8, 3), ZeroBubble(16), ZBV(12))


@pytest.mark.parametrize("schedule", SHOWN, ids=lambda s: type(s).__name__)
def test_pictures_are_the_same_bytes_and_have_every_task(schedule: OneFOneB, tmp_path: Path) -> None:
    seen = see(schedule, 4, Costs(1, 1.25, 0.75))
    again = see(replace(schedule), 4, Costs(1, 1.25, 0.75))
    assert alone(seen) == alone(again)
    assert page(seen) == page(again)
    assert str(ROOT) not in page(seen) + alone(seen)
    drawing = ElementTree.fromstring(alone(seen))
    bars = bars_of(drawing)
    tasks = sum(1 for _ in seen.grid.tasks())
    assert len(bars) == 2 * tasks
    titles = [bar.findtext("{*}title") or "" for bar in bars]
    for name, clock in seen.clocks:
        for span in clock.spans:
            assert f"{span.task} of stage {span.stage}: {span.start:.6g} to {span.end:.6g}" in titles, name
    fills = {colour(task.kind, task.chunk, seen.grid.chunks) for _, _, task in seen.grid.tasks()}
    assert {bar.get("fill") for bar in bars} == fills
    inside(drawing)


def bars_of(drawing: ElementTree.Element) -> list[ElementTree.Element]:
    """The bars of tasks: those with a title."""
    return [x for x in drawing.iter() if x.tag.endswith("rect") and x.find("{*}title") is not None]


def inside(drawing: ElementTree.Element) -> None:
    """Nothing is drawn outside the picture, and bars of one stage and clock do not overlap."""
    wide, tall = float(drawing.get("width", 0)), float(drawing.get("height", 0))
    rows: dict[str, list[tuple[float, float]]] = {}
    for x in drawing.iter():
        if x.tag.endswith("rect"):
            left, top, width = (float(x.get(k, 0)) for k in ("x", "y", "width"))
            assert 0 <= left <= left + width <= wide
            assert 0 <= top <= tall
    for bar in bars_of(drawing):
        left, width = float(bar.get("x", 0)), float(bar.get("width", 0))
        rows.setdefault(str(bar.get("y")), []).append((left, left + width))
    for spans in rows.values():
        ordered = sorted(spans)
        assert all(a[1] <= b[0] + 0.02 for a, b in itertools.pairwise(ordered))


def test_numbers_are_legible_on_every_shade() -> None:
    def light(hex_colour: str) -> float:  # WCAG 2.1, relative luminance
        parts = [int(hex_colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for kind in SHADES:
        for chunk in range(4):
            assert (light(colour(kind, chunk, 4)) + 0.05) / (light(INK) + 0.05) > 4.5


class Page(HTMLParser):
    """What a page asks for from elsewhere, and its open tags."""

    def __init__(self) -> None:
        super().__init__()
        self.asks: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asks += [f"{tag} {k}" for k, _ in attrs if k in ("src", "href", "onload")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_and_says_what_the_terminal_does(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.html"
    svg = tmp_path / "new" / "a.svg"
    words = ("zb-h1", "--stages", "3", "--microbatches", "5")
    assert run(capsys, *words, "--html", str(path), "--svg", str(svg))[0] == 0
    text = path.read_text(encoding="utf-8")
    parser = Page()
    parser.feed(text)
    assert (parser.asks, parser.open) == ([], [])
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", text)
    seen = see(ZeroBubble(5), 3, Costs())
    assert text == page(seen)
    assert svg.read_text(encoding="utf-8") == alone(seen)
    for words in (percent(seen.lockstep.bubble), percent(seen.independent.bubble), f"{max(seen.stash)}"):
        assert f">{words}</div>" in text


def test_a_narrow_window_cuts_the_grid_and_says_so(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "dumb")
    print_seen(see(OneFOneB(16), 4, Costs()))
    out = capsys.readouterr().out.splitlines()
    cut = next(line for line in out if "of 22 ticks: the window is too narrow" in line)
    shown = int(cut.split()[0])
    assert 5 < shown < 22
    rows = [line for line in out if line.startswith("stage ")]
    assert len(rows) == 4
    assert all(len(line) <= 60 for line in rows)
    assert all(row.count("|") == shown - 1 for row in rows)


@dataclass(frozen=True)
class Long:
    """1F1B with a tick of rest before each, so that the grid has empty ticks."""

    microbatches: int = 8

    def grid(self, stages: int):
        made = OneFOneB(self.microbatches).grid(stages)
        rest = ((),) * stages
        return replace(made, cells=tuple(row for cells in made.cells for row in (rest, cells)))


def test_empty_ticks_cost_nothing_and_are_drawn() -> None:
    seen, plain = see(Long(), 2, Costs()), see(OneFOneB(8), 2, Costs())
    assert seen.name == short(Long) == "Long"
    assert seen.lockstep.makespan == plain.lockstep.makespan
    drawn = columns(seen.grid)
    assert len(drawn) == seen.grid.ticks == 2 * plain.grid.ticks
    assert drawn[0][1][0] == ((".", None),)
    assert all(len(head) == len(" ".join(text for text, _ in row)) for head, rows in drawn for row in rows)


def test_neither_help_nor_the_command_imports_jax() -> None:
    program = (
        "import sys; from experiments import cli\n"
        "try: code = cli.main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "sys.exit(code or ('jax' if 'jax' in sys.modules else 0))"
    )
    for words in (["schedule", "--help"], ["schedule", "zb-v"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "shardlab schedule" in done.stdout or "stage 0" in done.stdout


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOOK = """<script>addEventListener("load", () => {
const s = document.querySelector("main svg").getBoundingClientRect();
const texts = [...document.querySelectorAll("main svg text.in")].map(x => getComputedStyle(x));
document.title = JSON.stringify({wide: innerWidth, needs: document.documentElement.scrollWidth, drawn: s.width,
inks: [...new Set(texts.map(x => x.fill))], anchors: [...new Set(texts.map(x => x.textAnchor))],
ground: getComputedStyle(document.body).backgroundColor})})</script>"""


@pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed: the page is not looked at in a browser"
)
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_chromium_draws_the_page(tmp_path: Path, width: int, dark: bool) -> None:
    seen: Seen = see(Interleaved(16, 2), 4, Costs())
    (tmp_path / "page.html").write_text(page(seen).replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    )
    flags += " --disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
    flags += " --blink-settings=preferredColorScheme=0" if dark else ""
    done = subprocess.run(
        [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
         (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, encoding="utf-8", timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    saw = json.loads(title[1].replace("&quot;", '"'))
    assert saw["needs"] <= saw["wide"] <= max(width, 500), saw
    assert saw["drawn"] > 900, saw
    assert saw["inks"] == ["rgb(16, 21, 31)"], saw
    assert saw["anchors"] == ["middle"], saw
    assert (saw["ground"] == "rgb(255, 255, 255)") is not dark, saw
