"""A config file's values are held against their annotations: one paragraph that names the field, and no jax for it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NewType

import numpy as np
import pytest

from experiments import sweep
from experiments.config import load
from experiments.field_types import check_types, words
from experiments.run_config import Origin, write_run_config
from sharding.axes import MeshShape
from sharding.errors import InputError
from tests.small import shardlab
from tests.support import ROOT

QUICKSTART = "from dataclasses import replace\nfrom configs.quickstart import config as quickstart\n"
CHANGED = QUICKSTART + "def config():\n    e = quickstart()\n    return replace(e, {})\n"

WRONG = {
    "mesh=replace(e.mesh, data='2')": ("mesh.data = '2'", "a whole number"),
    "mesh=replace(e.mesh, data=2.0)": ("mesh.data = 2.0", "a whole number"),
    "mesh=replace(e.mesh, slices=True)": ("mesh.slices = True", "a whole number"),
    "model=replace(e.model, embed=256.0)": ("model.embed = 256.0", "a whole number"),
    "model=replace(e.model, theta=True)": ("model.theta = True", "a number"),
    "model=replace(e.model, unembed='foo')": ("model.unembed = 'foo'", "one of 'untied', 'tied'."),
    "model=replace(e.model, loop='scam')": ("model.loop = 'scam'", "'unroll' (nearest: 'scan')"),
    "model=replace(e.model, dtype='float16')": ("model.dtype = 'float16'", "(nearest: 'bfloat16')"),
    "data=replace(e.data, tests=None)": ("data.tests = None", "one of 'exclude', 'include'"),
    "data=replace(e.data, tokenizer=3)": ("data.tokenizer = 3", "a text"),
    "sample=replace(e.sample, prompt=b'def ')": ("sample.prompt = b'def '", "a text"),
    "sample=replace(e.sample, temperature=True)": ("sample.temperature = True", "a number"),
    "optimizer=replace(e.optimizer, peak=True)": ("optimizer.peak = True", "a number"),
    "sample=replace(e.sample, prompt=['x' * 99])": ("sample.prompt = a value of type list", "a text"),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("change", WRONG)
def test_a_value_of_another_type_is_one_paragraph(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, CHANGED.format(change))
    assert shardlab("explain", path) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    field = WRONG[change][0].partition(" ")[0]
    for part in (f"config() in {path}", *WRONG[change], f"Change {field}."):
        assert part in said


@pytest.mark.parametrize(
    ("change", "field", "own"),
    [
        ("steps=np.int64(120)", "steps is np.int64(120), but", "int(...) around it, or 120."),
        ("model=replace(e.model, theta=np.float32(0.5))", "model.theta = np.float32(0.5)", "float(...) around it, or 0.5"),
        ("mesh=replace(e.mesh, data=np.int32(2))", "mesh.data = np.int32(2), but it takes a whole", "int(...) around it"),
        ("batch=np.array(16)", "batch is array(16)", "a numpy ndarray"),
    ],
)  # fmt: skip
def test_a_number_of_numpys_is_told_from_pythons_own(
    change: str, field: str, own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "import numpy as np\n" + CHANGED.format(change))
    assert shardlab("explain", path) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in (field, own, "Python's own numbers"):
        assert part in said


def test_a_number_of_numpys_that_would_not_do_as_pythons_own_is_of_another_type() -> None:
    with pytest.raises(InputError, match=r"Change maybe\.$"):
        check_types(Kinds(maybe=np.float64(2.5)), "it")  # type: ignore[arg-type]
    check_types(Kinds(many=(np.float64(2.5),)), "it")  # a float by its class


@pytest.mark.parametrize(
    ("holds", "said"),
    [
        ("m", "a model.me that is the model which holds it"),
        ("{'a': [1, m]}", "a model.me['a'][1] that is the model which holds it"),
        ("ring", "a model.me[0] that is the model.me which holds it"),
    ],
)
@pytest.mark.parametrize("annotation", ["Any", "'Mine | None'"])
def test_a_value_that_holds_itself_is_one_paragraph(
    holds: str, said: str, annotation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "import dataclasses\nfrom typing import Any\n" + QUICKSTART + "@dataclasses.dataclass(frozen=True)\n"
        f"class Mine:\n    me: {annotation} = None\n    def build(self): ...\n"
        "def config():\n    m, ring = Mine(), []\n    ring.append(ring)\n"
        f"    object.__setattr__(m, 'me', {holds})\n    return replace(quickstart(), model=m)\n"
    )
    assert shardlab("explain", write(tmp_path, text)) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert said in shown


def test_one_value_in_two_places_holds_not_itself() -> None:
    both = Inner()
    check_types(Kinds(union=both, free=[both, (both, [both])]), "it")


def test_an_int_may_stand_for_a_float(tmp_path: Path) -> None:
    path = write(tmp_path, CHANGED.format("model=replace(e.model, theta=10000)"))
    assert load(path) == load(ROOT / "configs" / "quickstart.py")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ("base=replace(s.base, model=replace(s.base.model, loop='scam'))", "base.model.loop = 'scam'"),
        ("points=(s.points[0], replace(s.points[1], mesh=replace(s.points[1].mesh, data=2.0)))",
         "points[1].mesh.data = 2.0"),
        ("points=(replace(s.points[0], rules='data'),)", "points[0].rules = 'data', but it takes Rules"),
        ("points=list(s.points)", "points = a value of type list, but it takes a tuple of Point"),
    ],
)  # fmt: skip
def test_a_sweep_is_checked_to_its_base_and_points(change: str, where: str, tmp_path: Path) -> None:
    text = "from dataclasses import replace\nfrom configs.scaling_quick import config as quick\n"
    path = write(tmp_path, text + f"def config():\n    s = quick()\n    return replace(s, {change})\n")
    with pytest.raises(InputError) as caught:
        sweep.load(path)
    assert where in str(caught.value)


def test_a_run_whose_source_has_changed_is_checked(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    origin = Origin(write(tmp_path, CHANGED.format("steps=7")))
    write_run_config(folder, origin, origin.experiment())
    (folder / "source.py").write_text(CHANGED.format("model=replace(e.model, loop='scam')"), encoding="utf-8")
    with pytest.raises(InputError, match=r"model.loop = 'scam'"):
        load(folder / "config.py")


Size = NewType("Size", int)


@dataclasses.dataclass(frozen=True)
class Inner:
    n: int = 1


@dataclasses.dataclass(frozen=True)
class Other:
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Kinds:
    """One field of each kind of annotation."""

    union: Inner | Other = Inner()
    maybe: int | None = None
    mixed: Literal["auto"] | int = "auto"
    pair: tuple[int, str] = (1, "a")
    many: tuple[float, ...] = ()
    nested: tuple[tuple[str, int], ...] = ()
    table: Mapping[str, int] = dataclasses.field(default_factory=dict)
    texts: Sequence[str] = ()
    path: Path = Path()
    flag: bool = False
    size: Size = Size(1)
    one: Literal[1] = 1
    free: Any = None
    function: Callable[[int], int] = abs


@pytest.mark.parametrize(
    ("field", "value"),
    [("union", Other("x")), ("maybe", 3), ("mixed", 3), ("pair", (2, "b")), ("many", (1, 2.5)),
     ("nested", (("a", 1),)), ("table", {"a": 1}), ("texts", ["a"]), ("path", Path("x")), ("flag", True),
     ("size", Size(2)), ("free", object()), ("function", len)],
)  # fmt: skip
def test_what_an_annotation_allows_passes(field: str, value: Any) -> None:
    check_types(dataclasses.replace(Kinds(), **{field: value}), "it")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("union", Inner("x"), "union.n = 'x', but it takes a whole number"),  # type: ignore[arg-type]
        ("union", MeshShape(), "it takes Inner or Other"),
        ("maybe", "3", "maybe = '3', but it takes a whole number or None"),
        ("mixed", "aut", "mixed = 'aut', but it takes one of 'auto' or a whole number (nearest: 'auto')"),
        ("pair", (1,), "pair = (1,), but it takes a tuple of a whole number, a text"),
        ("pair", (1, 2), "pair[1] = 2, but it takes a text"),
        ("many", (1, "2"), "many[1] = '2', but it takes a number"),
        ("nested", (("a", 1), ("b", 1.0)), "nested[1][1] = 1.0, but it takes a whole number"),
        ("table", {"a": None}, "table['a'] = None, but it takes a whole number"),
        ("table", {1: 1}, "a key of table = 1, but it takes a text"),
        ("texts", "abc", "texts = 'abc'"),
        ("path", "x", "path = 'x', but it takes a Path"),
        ("flag", 1, "flag = 1, but it takes True or False"),
        ("size", "2", "size = '2', but it takes a whole number"),
        ("one", True, "one = True, but it takes one of 1"),
    ],
)
def test_what_it_does_not_allow_is_named(field: str, value: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_types(dataclasses.replace(Kinds(), **{field: value}), "it")
    assert f"it gives {said}" in str(caught.value) or said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_annotation_that_only_a_type_checker_can_read_is_said(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass, replace\n"
        "from typing import TYPE_CHECKING\nfrom configs.quickstart import config as quickstart\n"
        "if TYPE_CHECKING:\n    from pathlib import Path\n"
        "@dataclass(frozen=True)\nclass Mine:\n    place: Path | None = None\n    def build(self): ...\n"
        "def config():\n    return replace(quickstart(), model=Mine())\n"
    )
    with pytest.raises(
        InputError, match=r"annotations of Mine, of which model is one, .*'Path' is not defined"
    ):
        load(write(tmp_path, text))


def test_words_are_of_a_file_or_of_a_flag() -> None:
    assert words(bool) == "True or False"
    assert words(bool, "flag") == "no value"
    assert words(Literal["a", "b"], "flag") == "one of a, b"
    assert words(tuple[int, int], "flag") == "a whole number, a whole number"


def test_the_check_does_without_jax_and_costs_milliseconds() -> None:
    told = "import sys; from experiments.config import load; load('configs/quickstart.py'); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    experiment = load(ROOT / "configs" / "quickstart.py")
    best = min(_seconds(experiment) for _ in range(5))
    assert best < 0.05, f"{best * 1000:.1f} ms"


def _seconds(experiment: Any) -> float:
    began = time.perf_counter()
    check_types(experiment, "it")
    return time.perf_counter() - began
