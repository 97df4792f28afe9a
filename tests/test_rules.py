"""Every rule file keeps the contract by being where it is; chains of rules are values."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sharding.axes import AXES
from sharding.errors import InputError
from sharding.layout import Layouts
from sharding.rule import Ask, Rule, Rules, also, first_dim, if_free, rule
from tests.support import ROOT, custom, examples, factory, load, rule_files, split_axes

OUTSIDE = '''
"""Column parallelism alone, as somebody's own file (no source but this file)."""

from __future__ import annotations

from sharding.rule import Rule, rule


@rule
def columns(axis: str = "tensor") -> Rule:
    """Split feed-forward features over `axis`."""
    return Rule(compute={"mlp": axis}, activation={"mlp": axis})
'''
FILES = rule_files()
SOURCE = re.compile(r"arXiv:\d{4}\.\d{5}|et al\. \d{4}")


def _scope() -> dict[str, object]:
    return {p.stem: factory(p) for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_rule_file_holds_a_factory_of_its_name_whose_repr_makes_it_again(path: Path) -> None:
    for made in examples(path):
        assert isinstance(made, Rules)
        assert made.chain
        again = eval(repr(made), _scope())
        assert again == made
        assert hash(again) == hash(made)
        assert repr(again) == repr(made)


NEEDY = '''
"""One axis for one name, as somebody's own file (no source but this file)."""

from sharding.rule import Rule, rule


@rule
def one(name: str, axis: str = "tensor") -> Rule:
    """Split `name` over `axis`{}."""
    return Rule(compute={{name: axis}}, activation={{name: axis}})
'''


def test_a_rule_that_needs_arguments_is_tested_on_the_calls_that_its_docstring_shows(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text(NEEDY.format(""))
    with pytest.raises(AssertionError, match=r"one needs name, so its docstring must show a call"):
        examples(path, "somebodys_one")
    path.write_text(NEEDY.format(": `one('mlp')`, `one('classes', 'data')`"))
    made = examples(path, "somebodys_other_one")
    assert [repr(r) for r in made] == ["one('mlp')", "one('classes', 'data')"]
    assert [split_axes(r) for r in made] == [("tensor",), ("data",)]


def test_every_rule_that_splits_has_an_example_that_does() -> None:
    idle = {p.stem for p in FILES if not any(split_axes(r) for r in examples(p))}
    assert idle == {"replicated"}  # it declares what stays whole


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"compute": ["embed"]}, r"Rule\(compute=\['embed'\]\): a role is a mapping .* Change compute."),
        ({"param": "embed"}, r"Rule\(param='embed'\)"),
        ({"optimizer": None}, r"Rule\(optimizer=None\)"),
        ({"activation": {5: "data"}}, r"Rule\(activation=\{5: 'data'\}\): .* a name is a text"),
        ({"gradient": {"embed": ("data", "fsdp")}}, r"'embed': \('data', 'fsdp'\)\}\): .* also\(axis\)"),
        ({"replicated": "embed"}, r"Rule\(replicated='embed'\): it is a tuple"),
        ({"replicated": (5,)}, r"Rule\(replicated=\(5,\)\): it is a tuple"),
    ],
)
def test_a_role_that_is_no_mapping_of_names_to_axes_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Rule(**given)


def test_a_function_that_places_what_is_no_name_is_refused() -> None:
    ask = Ask("w", "param", ("embed",), (8,), ((),), dict.fromkeys(AXES, 1))
    with pytest.raises(InputError, match="wants to split a dim 5 of w"):
        Rule(param=lambda _: {5: "data"}).place(ask)  # type: ignore[dict-item, return-value]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_rule_points_at_its_own_lines(path: Path) -> None:
    chain = [one for made in examples(path) for one in made.chain]
    for one in chain:
        file, _, line = one.source.rpartition(":")
        text = Path(file).read_text().splitlines()[int(line) - 1 :]
        assert text[0].startswith("@rule"), one.source
        assert text[1].startswith(f"def {one.call.partition('(')[0]}("), one.source
    own = {Path(one.source.rpartition(":")[0]).stem for one in chain}
    assert path.stem in own or len(own) > 1, "a file makes its own rule, or chains those of others"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_rule_file_is_short_and_says_where_it_comes_from(path: Path) -> None:
    make = factory(path)
    assert len(path.read_text().splitlines()) <= 40
    assert make.__doc__
    assert SOURCE.search(str(load(path).__doc__)) or not split_axes(examples(path)[0]), (
        "a strategy names its paper"
    )
    given = [p for p in inspect.signature(make).parameters.values() if p.default is not p.empty]
    words = [p for p in given if str(p.annotation).startswith("Literal[")]
    assert all(p.default in AXES for p in given if p not in words)
    for p in words:
        said = rf"{make.__name__}\({p.name}='neither'\): it is .*{p.default!r}"
        with pytest.raises(InputError, match=said):
            make(**{p.name: "neither"})


def test_rules_and_configs_of_models_leave_jax_alone() -> None:
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in FILES]
    names += [f"models.{p.stem}" for p in (ROOT / "models").glob("*_config.py")]
    names += ["sharding.layout", "sharding.contraction", "sharding.partitioner"]
    script = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        "from sharding.layout import Layouts\nfrom sharding.rules.hsdp import hsdp\n"
        "L = Layouts(hsdp(), {'data': 2, 'fsdp': 4})\n"
        "print(L.param('w', ('embed', 'mlp'), (8, 8)).param.text(), 'jax' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["embed/fsdp", "mlp", "False"]


def test_a_rule_outside_the_repo_is_a_rule(tmp_path: Path) -> None:
    path = tmp_path / "columns.py"
    path.write_text(OUTSIDE)
    columns = load(path, "somebodys_columns").columns
    made = columns()
    assert repr(made) == "columns()"
    file, _, line = made.chain[0].source.rpartition(":")
    assert (Path(file), int(line)) == (path, OUTSIDE.splitlines().index("@rule") + 1)
    lies = Layouts(made, {"tensor": 4}).param("w", ("embed", "mlp"), (8, 8))
    assert lies.compute.text() == "embed mlp/tensor"
    assert lies.compute.reasons[0].source == made.chain[0].source


def test_a_repr_shows_the_arguments_as_given() -> None:
    scope = _scope()
    for text in (
        "fsdp('data')",
        "hsdp('replica', inner='data')",
        "replicated('mine', 'yours') | data(axis='replica')",
    ):
        made = eval(text, scope)
        assert eval(repr(made), scope) == made
        ast.parse(repr(made), mode="eval")
    assert repr(eval("replicated('mine', 'yours') | data(axis='replica')", scope)) == (
        "replicated('mine', 'yours') | data('replica')"
    )
    assert eval(repr(Rules()), {"Rules": Rules}) == Rules()


def test_chaining_is_associative_and_keeps_the_order() -> None:
    data, fsdp, tensor = (factory(p) for p in FILES if p.stem in ("data", "fsdp", "tensor"))
    assert (data() | fsdp()) | tensor() == data() | (fsdp() | tensor())
    assert data() | fsdp() != fsdp() | data()
    assert fsdp() != fsdp("data")
    assert len({fsdp(), fsdp(), fsdp("data")}) == 2


def test_rules_of_one_name_from_two_places_differ() -> None:
    @rule
    def fsdp() -> Rule:
        return Rule()

    (other,) = [factory(p) for p in FILES if p.stem == "fsdp"]
    assert fsdp() != other()


@pytest.mark.parametrize("wrong", ["data() | fsdp", "data | fsdp()"])
def test_a_rule_written_without_its_call_is_refused(wrong: str) -> None:
    with pytest.raises(InputError, match=r"written without \(\)"):
        eval(wrong, _scope())


def test_a_factory_that_returns_no_rule_is_refused() -> None:
    @rule
    def chain() -> Rule:
        return custom()  # type: ignore[return-value]

    with pytest.raises(InputError, match="returns a Rules"):
        chain()


def test_an_unknown_axis_in_a_rule_names_the_nearest() -> None:
    (fsdp,) = [factory(p) for p in FILES if p.stem == "fsdp"]
    layouts = Layouts(fsdp("fsp"), dict.fromkeys(AXES, 1))
    for ask in (
        lambda: layouts.param("w", ("embed",), (8,)),
        lambda: layouts.activation(("batch",)),
    ):
        with pytest.raises(InputError, match="nearest: 'fsdp'"):
            ask()


def test_a_function_that_places_a_dim_which_is_not_there_is_refused() -> None:
    layouts = Layouts(custom(param=lambda ask: {"embedd": "fsdp"}), dict.fromkeys(AXES, 1))
    with pytest.raises(InputError, match="nearest: 'embed'"):
        layouts.param("w", ("embed", "mlp"), (8, 8))


def test_the_first_dim_that_divides_is_split() -> None:
    def ask(names: str, shape: tuple[int, ...], dims: tuple[tuple[str, ...], ...]) -> dict[str, str]:
        asked = Ask("w", "param", tuple(names.split()), shape, dims, {"fsdp": 4, "tensor": 2})
        return {n: s.axis for n, s in first_dim("fsdp")(asked).items()}

    assert ask("embed mlp", (8, 16), ((), ())) == {"embed": "fsdp"}
    assert ask("embed mlp", (6, 16), ((), ())) == {"mlp": "fsdp"}  # 6 does not divide
    assert ask("mlp embed", (16, 8), (("tensor",), ())) == {"embed": "fsdp"}  # a free dim comes first
    assert ask("mlp embed", (16, 6), (("tensor",), ())) == {"mlp": "fsdp"}  # else further, inside the split
    assert ask("layers embed", (64, 8), ((), ())) == {"embed": "fsdp"}  # never the stack of layers
    assert ask("embed mlp", (6, 6), ((), ())) == {}


def test_also_and_if_free_are_values() -> None:
    assert also("data") == also("data") != if_free("data")
    assert custom(activation={"batch": also("data")}).chain[0].names() == {"batch"}
