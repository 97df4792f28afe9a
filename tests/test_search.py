"""`search`: candidates lie as they say, the ranking follows the figures, the pick fits, and what it writes runs."""

from __future__ import annotations

import ast
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from experiments import cli
from experiments.commands import search as command
from experiments.config import config_hash, load
from experiments.run_config import Origin
from experiments.search import compiled as search_compiled
from experiments.search import pool as search_pool
from experiments.search import searching
from experiments.search.compiled import hidden, regret, together
from experiments.search.config import check_out
from experiments.search.found import CompiledFigure, Figure, Found, Row, front
from experiments.search.guess import likely, spread
from experiments.search.layouts import Unfit, arrays_of, lay, useful
from experiments.search.pool import figure_of
from experiments.search.pruning import SAME, TOO_LARGE, space
from experiments.search.ranking import picked, ranked
from experiments.search.searching import Wanted, following, search
from experiments.search.space import Candidate, choices, covers, library, meshes
from experiments.search.target import complete, target_of
from sharding.errors import InputError
from sharding.module.compiled import Emitted
from sharding.price.target import Target, parse_target
from sharding.rules.data import data
from sharding.rules.expert import expert
from sharding.rules.fsdp import fsdp
from sharding.rules.tensor import tensor

ROOT = Path(__file__).resolve().parent.parent
PERCEPTRON = Origin(ROOT / "configs/digits_mlp.py")
WORDS = Origin(ROOT / "configs/quickstart.py", ("--model.layers", "2"))
EIGHT = parse_target("tpu:v5e:2x4")
TRACED = Wanted(compile=0)
Lie = Callable[[tuple[str, ...], Figure], Figure]


class Here:
    """The pool without processes; `lie` may change a figure."""

    lie: Lie = staticmethod(lambda words, figure: figure)  # pyright: ignore[reportAssignmentType]
    asked: ClassVar[list[tuple[str, ...]]] = []

    def __init__(self, path: Path, target: Target, jobs: int) -> None:
        self.path, self.target = path, target

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *failed: object) -> None:
        pass

    def figures(self, asked: Sequence[Sequence[str]]) -> list[Any]:
        Here.asked += [tuple(w) for w in asked]
        found = [(tuple(w), figure_of(self.path, w, self.target)) for w in asked]
        return [Here.lie(w, f) if isinstance(f, Figure) else f for w, f in found]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    monkeypatch.setattr(searching, "Pool", Here)
    monkeypatch.setattr(Here, "lie", staticmethod(lambda words, figure: figure))
    monkeypatch.setattr(Here, "asked", [])
    return Here


def searched(
    origin: Origin = PERCEPTRON, target: Target = EIGHT, wanted: Wanted = TRACED, **vary: Any
) -> Found:
    """A search of a config, by prediction alone."""
    made = origin.experiment()
    return search(origin, made, target, choices(made, **vary), wanted)


def with_memory(capacity: int) -> Target:
    return replace(EIGHT, machine=replace(EIGHT.machine, memory=capacity))


# What is chosen from.


def test_every_factorization_is_a_mesh() -> None:
    found = [tuple(m.values()) for m in meshes(12, ("data", "fsdp", "tensor"))]
    assert len(found) == len(set(found)) == 18  # 2^2 over three axes: 6, 3 over three: 3
    assert all(math.prod(m) == 12 for m in found)
    assert list(meshes(2, ())) == []


def test_rules_are_found_by_their_place_with_their_axes() -> None:
    known = {r.name: r for r in library()}
    files = {p.stem for p in (ROOT / "sharding/rules").glob("*.py")} - {"__init__"}
    assert set(known) == files - {
        "by_path",
        "replicated",
        "hsdp",
        "stages",
    }  # no axes; of others; a schedule's
    assert known["tensor2d"].axes == ("fsdp", "tensor")
    assert known["tensor"].calls == ("tensor", "tensor(kv_heads='whole')")
    assert {r.name for r in known.values() if r.fills} == {"sequence"}


def test_a_cover_uses_each_axis_once_and_what_fills_comes_last() -> None:
    known = [
        r
        for r in library()
        if r.name in ("data", "zero1", "fsdp", "tensor", "tensor2d", "sequence", "ulysses")
    ]
    chains = [" ".join(calls[0] for calls in c) for c in covers(("fsdp", "context", "tensor"), known)]
    assert sorted(chains) == sorted(
        [
            "fsdp tensor ulysses",
            "fsdp tensor ulysses sequence",
            "tensor2d ulysses",
            "tensor2d ulysses sequence",
        ]
    )


def test_rules_that_say_nothing_of_the_model_are_left_out() -> None:
    arrays = arrays_of(PERCEPTRON.experiment())
    assert useful(data(), arrays)
    assert useful(tensor(), arrays)
    assert not useful(expert(), arrays)  # it would split the batch, which is not what it is for
    names = {r.name for r in library() if useful(r.rules, arrays)}
    assert not names & {"context", "ulysses", "spatial", "sequence", "expert"}


def test_layouts_refuse_what_does_not_divide_and_know_equal_splits() -> None:
    arrays = arrays_of(WORDS.experiment())
    with pytest.raises(Unfit, match=r"^kv_heads = 4 does not divide$"):
        lay(tensor(), {"tensor": 8}, arrays)
    with pytest.raises(Unfit, match=r"^batch = 16 does not divide$"):
        lay(data(), {"data": 32}, arrays)
    sizes = {"fsdp": 8}
    assert lay(data() | fsdp(), sizes, arrays).dims == lay(fsdp(), sizes, arrays).dims
    assert lay(fsdp("data"), {"data": 8}, arrays).dims != lay(data(), {"data": 8}, arrays).dims


def test_the_state_that_layouts_count_is_the_state_that_is_predicted() -> None:
    from experiments.assemble import untouched
    from experiments.plans.estimate import estimate

    experiment = replace(WORDS.experiment(), mesh=replace(WORDS.experiment().mesh, data=2, fsdp=4, tensor=1))
    memory = untouched(lambda: estimate(experiment, EIGHT)).predicted.memory
    laid = lay(data() | fsdp(), {"data": 2, "fsdp": 4}, arrays_of(experiment))
    assert laid.state == pytest.approx(memory.parameters + memory.optimizer, rel=1e-3)


def test_what_is_larger_than_a_device_falls_without_a_trace() -> None:
    made = WORDS.experiment()
    whole = space(made, EIGHT, choices(made, axes=("data", "fsdp")))
    assert TOO_LARGE not in whole.fallen
    least = lay(data(), {"data": 8}, arrays_of(made)).state
    tight = space(made, with_memory(least - 1), choices(made, axes=("data", "fsdp")))
    assert tight.fallen[TOO_LARGE] >= 1
    assert whole.fallen[SAME] >= 1
    assert len({(c.mesh, c.rules) for c in tight.candidates}) < len(
        {(c.mesh, c.rules) for c in whole.candidates}
    )


def test_micro_batches_leave_whole_rows_to_each_device() -> None:
    made = PERCEPTRON.experiment()  # 64 rows
    found = space(made, EIGHT, choices(made, axes=("data",), accumulates=(1, 8, 16))).candidates
    assert {c.accumulate for c in found} == {1, 8}


def test_slices_may_hold_whole_copies(here: type[Here]) -> None:
    found = searched(
        target=parse_target("tpu:v5e:2x2x2slices"), axes=("replica", "data", "fsdp"), accumulates=(1,)
    )
    assert not found.refused
    over = [r for r in found.rows if dict(r.candidate.mesh).get("replica")]
    assert {dict(r.candidate.mesh)["replica"] for r in over} == {2}
    assert any(r.rules == "data(axis='replica') | fsdp" for r in over)
    assert all("--mesh.slices" in r.words for r in found.rows)


# What is picked.


def test_every_candidate_is_what_its_words_make(here: type[Here]) -> None:
    found = searched(accumulates=(1, 2))
    assert found.estimated == found.candidates == len(found.rows) == len(set(here.asked))
    for row in found.rows:
        made = Origin(PERCEPTRON.path, row.words).experiment()
        assert tuple((a, n) for a, n in made.mesh.sizes().items() if n > 1) == row.candidate.mesh
        assert made.accumulate == row.candidate.accumulate
        assert (made.devices.kind, made.devices.count) == ("present", 8)
    assert [r.given for r in found.rows].count(True) == 1
    given = next(r for r in found.rows if r.given)
    assert dict(given.candidate.mesh) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_the_shortest_step_is_first_and_a_lie_changes_the_pick(
    here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = searched(accumulates=(1,))
    steps = [r.figure.step or 0.0 for r in honest.rows]
    assert steps == sorted(steps)
    assert honest.pick == 1
    truth = honest.rows[0].words

    def lie(words: tuple[str, ...], figure: Figure) -> Figure:
        return replace(figure, step=10 * (figure.step or 0.0)) if words == truth else figure

    monkeypatch.setattr(Here, "lie", staticmethod(lie))
    lied = searched(accumulates=(1,))
    assert lied.rows[0].words == honest.rows[1].words
    assert lied.rows[-1].words == truth


def test_what_does_not_fit_is_never_first(here: type[Here]) -> None:
    free = searched(accumulates=(1,))
    needs = sorted({r.figure.memory for r in free.rows})
    least = [r for r in free.rows if r.figure.memory == needs[0]]
    assert free.rows[0].figure.memory > needs[0]  # or this test says nothing
    tight = searched(target=with_memory(needs[0]), accumulates=(1,))
    assert tight.rows[0].words == least[0].words
    fits = [bool(r.fits) for r in tight.rows]
    assert fits == sorted(fits, reverse=True)
    assert False in fits


def test_where_nothing_fits_the_nearest_is_told(here: type[Here]) -> None:
    made = PERCEPTRON.experiment()
    state = min(
        lay(fsdp(), {"fsdp": 8}, arrays_of(made)).state, lay(data(), {"data": 8}, arrays_of(made)).state
    )
    found = searched(target=with_memory(state + 1), accumulates=(1,))
    nearest = min(r.figure.memory for r in found.rows)
    assert found.pick is None
    assert found.rows[0].figure.memory == nearest
    assert "No candidate fits: the nearest is candidate 1" in found.says
    assert "too much on each" in found.says


def test_candidates_refused_while_traced_are_counted(
    here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures(self: Here, asked: Sequence[Sequence[str]]) -> list[Any]:
        return ["heads = 4 of q does not divide into 8 parts."] * len(asked)

    monkeypatch.setattr(Here, "figures", figures)
    found = searched(accumulates=(1,))
    assert sum(found.refused.values()) == found.estimated
    assert found.rows == ()
    assert found.pick is None


def test_a_mesh_over_which_nothing_divides_is_an_error() -> None:
    with pytest.raises(InputError, match="batch = 64 does not divide"):
        searched(target=parse_target("tpu:v5e:16x16"), axes=("data",))
    with pytest.raises(InputError, match="no rule uses any of these axes"):
        searched(axes=("stage",))


def test_the_front_holds_what_nothing_else_beats() -> None:
    figures = [
        Figure(m, s, None, "") for m, s in ((3, 1.0), (2, 2.0), (2, 2.5), (1, 4.0), (4, 1.0), (5, None))
    ]
    assert front(figures) == [True, True, False, True, False, False]


# What is compiled.


def rows(*figures: tuple[int, float]) -> tuple[Row, ...]:
    """Rows whose candidates have (memory, step)."""
    made = [Candidate((("data", i + 2),), "data", "none", 1) for i in range(len(figures))]
    known = {c: Figure(m, s, None, "") for c, (m, s) in zip(made, figures, strict=True)}
    return ranked(known, lambda c: (), PERCEPTRON.experiment(), with_memory(100))


def test_the_compilers_word_is_the_last() -> None:
    by_trace = rows((50, 1.0), (60, 1.1), (70, 1.2))
    said = {1: CompiledFigure(120, 1.0, ""), 2: CompiledFigure(60, 1.4, ""), 3: CompiledFigure(70, 1.3, "")}
    made = tuple(replace(r, compiled=said[r.rank]) for r in by_trace)
    assert picked(by_trace, with_memory(100))[0] == 1
    assert picked(made, with_memory(100))[0] == 3  # 1 does not fit after all, 2 is longer than modelled
    refused = tuple(replace(r, compiled=CompiledFigure(None, None, "no result")) for r in by_trace)
    assert picked(refused, with_memory(100)) == (
        None,
        "None of the 3 candidates that were compiled fits: the compiler refused candidate 1 (data=2, data, remat none, "
        "accumulate 1): no result",
    )


def test_what_the_compiler_took_more_is_expected_of_the_next() -> None:
    by_trace = rows((90, 1.0), (80, 1.1), (40, 1.2))
    first = following(by_trace, {}, 100)
    assert first is not None
    assert first.rank == 1
    second = following(by_trace, {1: CompiledFigure(180, None, "too large")}, 100)
    assert second is not None
    assert second.rank == 3  # twice 80 would be too much
    both = {1: CompiledFigure(180, None, ""), 3: CompiledFigure(110, None, "")}
    assert following(by_trace, both, 100) == by_trace[1]  # a compiler may take less than predicted
    assert following(rows((500, 1.0)), {}, 100) is None  # but not that much less
    assert following(by_trace, both | {2: CompiledFigure(1, 1.0, "")}, None) is None


def test_regret_is_against_the_best_that_fits() -> None:
    said = {1: (50, 1.2), 2: (60, 1.1), 3: (70, 1.0), 4: (500, 0.1)}
    made = tuple(
        replace(r, compiled=CompiledFigure(*said[r.rank], ""))
        for r in rows((50, 1.0), (60, 1.1), (70, 1.2), (80, 1.3))
    )
    found = regret(made, 100)
    assert found is not None
    assert (found.compiled, found.fit, found.best) == (4, 3, 3)
    assert found.predicted == pytest.approx(0.2)
    assert found.checked[2] == pytest.approx(0.1)
    assert found.checked[3] == pytest.approx(0.0)


def emitted(instruction: str, axes: tuple[str, ...], elements: int, overlapped: bool = False) -> Emitted:
    return Emitted(
        *("all-gather", axes, 4, "float32", (elements,), 2, 3 * 4 * elements * 2, ""),
        instruction=instruction,
        overlapped=overlapped,
    )


def test_arrays_that_are_moved_together_start_once() -> None:
    found = [emitted("a", ("fsdp",), 10), emitted("a", ("fsdp",), 5), emitted("b", ("fsdp",), 1, True)]
    made = together(found)
    assert [(c.payload, c.bytes, c.times) for c in made] == [(120, 360, 2), (8, 24, 2)]
    assert sum(c.bytes for c in found) == sum(c.bytes for c in made)
    assert hidden(found) == {(("fsdp",), "all-gather"): 1 / 16}


def test_a_limit_of_the_compiler_costs_one_candidate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(*given: Any) -> Any:
        raise InputError("The compiler cannot compile this step.")

    monkeypatch.setattr(search_compiled, "compile_for", limit)
    made = search_compiled.compiled_figure(PERCEPTRON.path, (), EIGHT, lambda text: None)
    assert made == CompiledFigure(None, None, "The compiler cannot compile this step.")
    assert not made.fits(None)


def test_an_exhaustive_search_of_much_is_refused() -> None:
    with pytest.raises(InputError, match="--exhaustive would compile"):
        searched(origin=WORDS, wanted=Wanted(exhaustive=True))


@pytest.mark.slow
def test_every_candidate_compiled_has_a_figure_and_the_pick_is_near_the_best(here: type[Here]) -> None:
    from experiments.search.compiled import compiled_figure

    target = replace(parse_target("cpu:4"), machine=replace(EIGHT.machine, platform="cpu", memory=None))
    found = searched(
        target=target, wanted=Wanted(exhaustive=True), axes=("data", "fsdp"), accumulates=(1,), chains="own"
    )
    assert found.regret is not None
    assert found.regret.compiled == len(found.rows) == 3
    assert found.regret.checked[3] == pytest.approx(0.0)
    assert all(r.compiled and (r.compiled.memory or 0) > 0 for r in found.rows)
    again = compiled_figure(PERCEPTRON.path, found.rows[0].words, target, lambda text: None)
    assert again == found.rows[0].compiled


# Which candidates are traced where there are too many.


def landscape(c: Candidate) -> Figure:
    """A step and a memory with trade-offs as a real one has."""
    sizes = dict(c.mesh)
    n, t, f, x = (sizes.get(a, 1) for a in ("data", "tensor", "fsdp", "context"))
    again = {"none": 1.0, "dots": 1.15, "full": 1.33}[c.remat]
    step = again + 0.05 * math.log2(n) + 0.1 * (t - 1) ** 0.5 + 0.02 * f**0.4 + 0.05 * x + 0.03 * c.accumulate
    step += 0.05 * ("zero1" in c.rules) - 0.04 * ("sequence" in c.rules) + 0.03 * ("tensor2d" in c.rules)
    kept = (
        {"none": 60, "dots": 25, "full": 5}[c.remat] / c.accumulate / (t if "sequence" in c.rules else t**0.5)
    )
    return Figure(int(1e9 * (kept / x + 200 / (f * t))), step, None, "")


def test_likely_candidates_hold_one_nearly_as_good_as_the_best() -> None:
    origin = Origin(WORDS.path, ("--model.heads", "32", "--model.kv-heads", "32", "--batch", "512"))
    made, target = origin.experiment(), parse_target("tpu:v5e:16x16")
    every = space(made, target, choices(made)).candidates
    assert len(every) > 5000
    fit = [c for c in every if landscape(c).memory <= 16e9]
    best = min(landscape(c).step or 0.0 for c in fit)
    known: dict[Candidate, Figure | None] = {c: landscape(c) for c in spread(every, 80)}
    blind = min((f.step or 0.0) for f in known.values() if f and f.memory <= 16e9)
    while len(known) < 240:
        chosen = likely(every, known, 32, int(16e9))
        assert len(set(chosen) - set(known)) == 32
        known |= {c: landscape(c) for c in chosen}
    found = min((f.step or 0.0) for f in known.values() if f and f.memory <= 16e9)
    assert found <= 1.02 * best < blind
    assert list(known)[:80] == spread(every, 80)


def test_a_search_of_too_many_is_cut_and_says_so(here: type[Here]) -> None:
    found = searched(wanted=Wanted(most=6, compile=0))
    assert found.candidates > found.estimated == 6
    again = searched(wanted=Wanted(most=6, compile=0))
    assert again.rows == found.rows


# The command.


def test_targets_are_completed_by_the_number_of_devices() -> None:
    assert complete("cpu", 8) == "cpu:8"
    assert complete("gpu:h100", 64) == "gpu:h100:8x8"
    assert complete("tpu:v5p", 256) == "tpu:v5p:4x8x8"
    assert target_of("tpu:v5e", ("--devices.count", "8")).text == "tpu:v5e:2x4"
    assert target_of("tpu:v5e:2x2", ("--devices.count=4",)).devices == 4
    with pytest.raises(InputError, match="which is 4"):
        target_of("tpu:v5e:2x2", ("--devices.count", "8"))
    with pytest.raises(InputError, match="do not fill hosts"):
        complete("gpu:h100", 12)
    with pytest.raises(InputError, match="No slice of TPU v5 lite has 6 devices"):
        complete("tpu:v5e", 6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--axes", "dada"), "nearest: 'data'"),
        (("--remat", "full"), "has no remat policy"),
        (("--microbatches", "7"), "does not divide into 7"),
        (("--most", "0"), "at least 1"),
        (("--target", "tpu:v5q:2x2"), "nearest: 'v5"),
        (("--out", "configs/digits_mlp.py"), "another config file"),
        (("--out", "elsewhere.txt"), "another config file"),
    ],
)
def test_bad_flags_are_one_paragraph(
    given: tuple[str, ...], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["search", str(PERCEPTRON.path), *given]) == cli.BAD_INPUT
    said = capfd.readouterr()
    assert says in said.err
    assert said.out == ""


def run(*given: str) -> int:
    return command.main([str(PERCEPTRON.path), "--target", "tpu:v5e:2x4", "--compile", "0", *given])


def test_the_command_prints_writes_and_says_the_same_twice(
    here: type[Here], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told, out = tmp_path / "found.json", tmp_path / "picked.py"
    given = ("--microbatches", "1", "--json", str(told), "--out", str(out))
    assert run(*given) == 0
    first, written = capfd.readouterr().out, out.read_text()
    document = json.loads(told.read_text())
    assert document["pick"] == 1
    assert len(document["rows"]) == document["estimated"]
    row = document["rows"][0]
    assert {"rank", "candidate", "rules", "words", "figure", "fits", "front", "given", "compiled"} == set(row)
    assert load(out) == Origin(PERCEPTRON.path, tuple(row["words"])).experiment()
    assert config_hash(load(out)) == config_hash(Origin(PERCEPTRON.path, tuple(row["words"])).experiment())
    doc = ast.get_docstring(ast.parse(written))
    assert doc is not None
    assert all(word in doc for word in ("Predicted:", "Modelled:", "not measured", "shardlab search"))
    assert "predicted memory" in first
    assert "modelled step" in first
    assert run(*given) == 0
    second = capfd.readouterr().out
    timeless = lambda text: [line for line in text.splitlines() if not line.startswith("took")]
    assert timeless(first) == timeless(second)
    assert out.read_text() == written


def test_nothing_fits_is_told_with_an_exit_code_of_its_own(
    here: type[Here], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Here, "lie", staticmethod(lambda words, figure: replace(figure, memory=2**60)))
    out = tmp_path / "picked.py"
    assert run("--microbatches", "1", "--out", str(out)) == command.NOTHING_FITS
    assert "No candidate fits: the nearest is" in capfd.readouterr().err
    assert not out.exists() or not out.read_text()


def test_a_picked_config_lies_where_a_run_can_keep_it(tmp_path: Path) -> None:
    assert check_out(tmp_path / "picked.py", PERCEPTRON) == "configs.digits_mlp"
    own = tmp_path / "mine.py"
    own.write_text(PERCEPTRON.path.read_text())
    assert check_out(tmp_path / "picked.py", Origin(own)) == "mine"
    with pytest.raises(InputError, match="does not lie beside"):
        check_out(tmp_path / "further" / "picked.py", Origin(own))
    with pytest.raises(InputError, match="is a file of its own"):
        check_out(tmp_path / "picked.py", Origin(own, ("--rules", "rules.py")))


# Processes.


def test_processes_give_the_same_figures_as_this_one() -> None:
    made = PERCEPTRON.experiment()
    asked = [("--mesh.data", "8", "--mesh.fsdp", "1", "--mesh.tensor", "1"), ("--mesh.data", "3")]
    with search_pool.Pool(PERCEPTRON.path, EIGHT, 2) as pool:
        there = pool.figures(asked)
    assert there == [figure_of(PERCEPTRON.path, w, EIGHT) for w in asked]
    assert isinstance(there[0], Figure)
    assert "asks for" in str(there[1])
    assert made.mesh.devices == 8


@pytest.mark.slow
def test_an_interrupt_ends_the_search_and_its_processes() -> None:
    start = (
        "import signal, sys; from experiments import cli; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # which a shell's background jobs ignore
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    words = f"search {PERCEPTRON.path} --target tpu:v5p:4x8x8 --batch 512 --compile 0 --jobs 2".split()
    process = subprocess.Popen(
        [sys.executable, "-c", start, *words],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("estimated"):
            break
    os.killpg(process.pid, signal.SIGINT)
    with process.stderr as rest:
        said = rest.read()
    assert process.wait(timeout=60) == cli.INTERRUPTED
    assert "Traceback" not in said
    assert "shardlab: interrupted" in said
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process outlived the search")
