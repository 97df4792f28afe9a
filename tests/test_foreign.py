"""Models that know nothing of shardlab: they train the numbers of one device, and what cannot be is said."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import Array

from configs import foreign_linen
from experiments.assemble import train_step
from experiments.config import Devices, Experiment, load
from experiments.explanation import explain
from experiments.overrides import apply
from experiments.records import read
from models.linen_rows import start as linen_init
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.foreign import Foreign
from sharding.layout import Layouts
from sharding.params import Entry, declare, matrices
from sharding.partitioner import Auto, Manual
from sharding.region import Region
from sharding.rule import Rule, Rules, rule
from sharding.rules.by_path import by_path
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.hsdp import hsdp
from sharding.rules.tensor import tensor
from sharding.rules.zero1 import zero1
from sharding.rules.zero2 import zero2
from tests import small
from tests.support import (
    ROOT,
    assert_same,
    batches,
    initial_params,
    make_step,
    model_configs,
    oracle,
    shrunk,
    train,
)
from tests.test_parity import BOUND, SMALL_MESH

PAGE = ROOT / "docs" / "foreign.md"
EXAMPLES = dict(
    re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
)
INPUTS = {
    "features": Entry("batch features", (8,), "float32"),
    "labels": Entry("batch", (), "int32"),
    "weights": Entry("batch", (), "float32"),
}
LINEN = replace(shrunk(foreign_linen.RowsConfig()), rows=4, layers=1)


@pytest.fixture(autouse=True)
def _promotion_is_jaxs_own() -> Iterator[None]:
    """What is foreign is written to jax's defaults, under which a user runs it; the strict ones are the house's."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def plain_init(key: Array) -> Any:
    """A tree of a list, a dict and a tuple; one array has a dim of 6, which 4 devices do not divide."""
    keys = jax.random.split(key, 3)
    draw = lambda at, shape: jax.random.normal(keys[at], shape) * shape[0] ** -0.5
    return {
        "layers": [draw(0, (8, 16)), draw(1, (16, 16))],
        "leave": {"w": draw(2, (16, 6)), "b": jnp.zeros(6)},
    }


def plain_loss(params: Any, batch: dict[str, Array]) -> dict[str, Array]:
    """A softmax over hidden features and a mean over the batch's weights: what shards would get wrong."""
    h = batch["features"]
    for w in params["layers"]:
        h = jax.nn.softmax(h @ w, axis=-1) * w.shape[-1] + h.mean(axis=-1, keepdims=True)
    nats = -jax.nn.log_softmax(h @ params["leave"]["w"] + params["leave"]["b"])
    picked = jnp.take_along_axis(nats, batch["labels"][:, None], axis=1)[:, 0]
    return {"loss": jnp.sum(picked * batch["weights"]), "weight": jnp.sum(batch["weights"])}


@dataclass(frozen=True)
class Plain:
    """Config of a plain model."""

    names: tuple[tuple[str, str], ...] = ()
    classes: int = 6
    init: Callable[[Array], Any] = plain_init
    loss: Callable[[Any, dict[str, Array]], Any] = plain_loss
    vectors: tuple[str, ...] = ("*bias", "*scale")
    inputs: Mapping[str, Entry] = field(default_factory=lambda: INPUTS, hash=False)

    def build(self) -> Foreign:
        """The model."""
        return Foreign(self.init, self.loss, self.inputs, dict(self.names), self.vectors)


NAMED = Plain((("layers.0", "- mlp"), ("layers.1", "mlp embed"), ("leave.w", "embed classes")))
BY_PATH = by_path(compute={"layers.0": "- tensor", "layers.*": "tensor -"}, param={"leave.w": "fsdp -"})
CASES: dict[str, tuple[Any, Rules, MeshShape, int]] = {
    "linen by names": (LINEN, data() | fsdp() | tensor(), SMALL_MESH, 2),
    "linen hsdp": (LINEN, hsdp(), MeshShape(data=2, fsdp=4), 1),
    "linen zero1 and heads": (LINEN, zero1() | tensor(), MeshShape(data=2, tensor=4), 1),
    "plain, nothing named": (Plain(), zero2() | fsdp(), MeshShape(data=2, fsdp=2), 2),
    "plain by names": (NAMED, data() | fsdp() | tensor(), SMALL_MESH, 1),
    "plain by path": (Plain(), data() | BY_PATH, SMALL_MESH, 2),
    "plain by path, then fsdp": (
        Plain(),
        data() | by_path(compute={"*.[01]": "- tensor"}) | fsdp(),
        SMALL_MESH,
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_model_has_the_numbers_of_one_device(case: str) -> None:
    config, rules, mesh, accumulate = CASES[case]
    step = make_step(config, rules, mesh, Auto(), accumulate)
    assert any(x.param.axes for x in step.layouts.values())
    found = train(step, initial_params(config), batches(config, 3))
    assert_same(found, oracle(config, 3), BOUND)


def test_a_planted_fault_departs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Region.constrain
    monkeypatch.setattr(Region, "constrain", lambda self, x, dims: right(self, jnp.flip(x, 0), dims))
    config, rules, mesh, _ = CASES["plain by names"]
    found = train(make_step(config, rules, mesh, Auto()), initial_params(config), batches(config, 3))
    with pytest.raises(AssertionError, match=r"departs|loss|grad_norm"):
        assert_same(found, oracle(config, 3), 100 * BOUND)


@pytest.mark.parametrize("case", CASES)
def test_initial_parameters_are_those_of_its_own_init_to_the_bit(case: str) -> None:
    config, rules, mesh, _ = CASES[case]
    init = plain_init if isinstance(config, Plain) else partial(linen_init, config.build()._init.args[0])
    own = jax.tree.leaves(jax.jit(init)(jax.random.key(3)))
    step = make_step(config, rules, mesh, Auto())
    state = step.init(3)
    for (path, made), w in zip(state["params"].items(), own, strict=True):
        assert made.sharding.is_equivalent_to(step.sharding(step.layouts[path].param), made.ndim), path
        np.testing.assert_array_equal(jax.device_get(made), jax.device_get(w), err_msg=path)
    moments = [x for x in jax.tree.leaves(state["optimizer"]) if x.ndim]
    assert moments
    assert not any(np.any(jax.device_get(x)) for x in moments)


@pytest.mark.parametrize("setting", ["rbg", "not partitionable"])
def test_initial_parameters_depend_on_no_setting_of_jax(setting: str) -> None:
    model = LINEN.build()
    usual = model.initial(3)
    with jax.default_prng_impl("rbg") if setting == "rbg" else jax.threefry_partitionable(False):
        drawn = LINEN.build().initial(3)
    for path, array in usual.items():
        np.testing.assert_array_equal(drawn[path], array, err_msg=path)


def test_paths_names_and_shapes_are_those_of_the_tree() -> None:
    tree = declare(LINEN.build())
    said = {p: " ".join(s.names) for p, s in tree.items()}
    assert said["Block_0.attention.query.kernel"] == "embed heads head_dim"
    assert said["Block_0.attention.out.kernel"] == "heads head_dim embed"  # the narrower pattern stands first
    assert said["Block_0.LayerNorm_0.scale"] == "dim0"
    assert said["positions"] == "dim0 dim1 dim2"
    assert tree["Block_0.attention.query.kernel"].shape == (16, 8, 2)
    tree = declare(
        replace(NAMED, init=lambda key: {"a/~/b": plain_init(key)}, names=(("*.0", "- mlp"),)).build()
    )
    assert {p: s.names for p, s in tree.items() if "layers" in p} == {
        "a.~.b.layers.0": ("dim0", "mlp"),
        "a.~.b.layers.1": ("dim0", "dim1"),
    }
    (alone,) = declare(Foreign(lambda key: jnp.ones(4), plain_loss, INPUTS))
    assert alone == "array"


def test_weight_decay_takes_kernels_and_leaves_biases_of_two_dims() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            x = nn.Embed(3, 4)(x)
            return nn.LayerNorm()(nn.Conv(4, (3,))(nn.MultiHeadDotProductAttention(2, name="attention")(x)))

    init = lambda key: Net().init(key, jnp.zeros((1, 5), jnp.int32))["params"]
    tree = declare(Foreign(init, plain_loss, INPUTS))
    assert tree["attention.query.bias"].shape == (2, 2)
    decays = matrices(tree)
    assert {p.rpartition(".")[2] for p, yes in decays.items() if yes} == {"kernel", "embedding"}
    assert {p.rpartition(".")[2] for p, yes in decays.items() if not yes} == {"bias", "scale"}
    own = matrices(declare(Foreign(init, plain_loss, INPUTS, vectors=("*.embedding",))))
    assert not own["Embed_0.embedding"]
    assert own["attention.query.bias"]


def test_on_one_device_the_manual_region_is_the_whole() -> None:
    step = make_step(Plain(), Rules(), MeshShape(), Manual())
    assert_same(train(step, initial_params(Plain()), batches(Plain(), 3)), oracle(Plain(), 3), BOUND)


def test_by_path_splits_the_houses_own_models_in_the_manual_region() -> None:
    config = model_configs()["mlp"]
    table = {"layers.up": "- - tensor", "layers.down": "- tensor -"}
    rules = data() | by_path(compute=table) | by_path(param={"enter": "- fsdp"}) | hidden()
    step, other = (make_step(config, r, SMALL_MESH) for r in (rules, data() | fsdp() | tensor()))
    for path in table:
        assert step.layouts[path].compute.dims == other.layouts[path].compute.dims
    assert step.layouts["enter"].param.text() == "features embed/fsdp"
    assert not step.layouts["enter"].compute.axes
    reason = step.layouts["layers.up"].compute.reasons[0]
    assert reason.source.endswith("by_path.py:11")
    assert_same(train(step, initial_params(config), batches(config, 3)), oracle(config, 3), BOUND)


@rule
def hidden() -> Rule:
    """The activations of the split features."""
    return Rule(activation={"mlp": "tensor"})


# Bad input. Each is told in one paragraph with what is wrong, where, and what to change.


def tree_of(**leaves: Any) -> Plain:
    """A plain model with this tree."""
    return Plain(init=lambda key: leaves)


TREES: dict[str, tuple[Plain, str]] = {
    "a typo in a pattern": (
        replace(NAMED, names=(("leav.w", "embed classes"),)),
        r"'leav\.w' matches no array \(nearest: 'leave\.w'\)",
    ),
    "a pattern for nothing like it": (replace(NAMED, names=(("zzz", "mlp"),)), r"The paths are layers\.0, "),
    "a pattern behind a wider one": (
        replace(NAMED, names=(("layers.*", "- mlp"), ("layers.1", "mlp -"))),
        r"'layers\.1' speaks for no array: 'layers\.\*' stands before it",
    ),
    "too few names": (
        replace(NAMED, names=(("leave.*", "classes"),)),
        r"has 1 words, but leave\.w.* has 2 dims \(16, 6\)",
    ),
    "one name twice": (
        replace(NAMED, names=(("layers.1", "mlp mlp"),)),
        r"calls two dims of layers\.1 by one name",
    ),
    "vectors that are not there": (
        Plain(vectors=("*.beta",)),
        r"vectors: the pattern '\*\.beta' matches no array",
    ),
    "an integer": (tree_of(w=jnp.ones((2, 2)), n=jnp.arange(3)), r"returns n, which is int32"),
    "a number": (tree_of(w=1.0), r"returns w, which is float: .* close over it"),
    "a function": (tree_of(w=jnp.ones(2), act=jax.nn.relu), r"returns act, which is"),
    "no array": (tree_of(), "returns no array"),
    "batch statistics": (
        tree_of(params={"w": jnp.ones(2)}, batch_stats={"mean": jnp.ones(2)}),
        r"other collections beside params: batch_stats",
    ),
    "a path that is taken": (
        tree_of(**{"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}}),
        r"whose path is 'a\.b'",
    ),
    "a path that the model uses": (tree_of(inputs=jnp.ones(2)), r"whose path is 'inputs'"),
}


@pytest.mark.parametrize("what", TREES)
def test_a_tree_that_cannot_be_is_refused_when_the_model_is_built(what: str) -> None:
    config, said = TREES[what]
    with pytest.raises(InputError, match=said):
        config.build()


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "no weight": (lambda p, b: {"loss": jnp.zeros(())}, r"lacks \{'weight'\}"),
    "an array alone": (lambda p, b: jnp.zeros(()), r"lacks a mapping"),
    "not summed": (
        lambda p, b: {"loss": b["weights"], "weight": jnp.ones(())},
        r"returns 'loss' of shape \(16,\)\. Sum it",
    ),
}


@pytest.mark.parametrize("what", LOSSES)
def test_a_loss_that_returns_no_sums_is_refused(what: str) -> None:
    loss, said = LOSSES[what]
    step = make_step(Plain(loss=loss))
    with pytest.raises(InputError, match=said):
        jax.eval_shape(step.update, step.abstract_state(), step.abstract_batch(16))


def experiment(model: Any, rules: Rules, **mesh: int) -> Experiment:
    """The Linen config with another model, rules and mesh."""
    shape = MeshShape(**mesh)
    devices = Devices("pretend", shape.devices)
    return replace(foreign_linen.config(), model=model, rules=rules, mesh=shape, batch=16, devices=devices)


SPLITS: dict[str, tuple[Plain, Rules, str]] = {
    "an unknown name": (
        replace(NAMED, names=(("layers.0", "- mpl"),)),
        tensor(),
        r"layers\.0 has a dim named 'mpl', .* \(nearest: 'mlp'\)",
    ),
    "a pattern that matches nothing": (
        Plain(),
        by_path(compute={"layer.0": "- tensor", "*.1": "- tensor"}),
        r"by_path \(.*by_path\.py:11\): the pattern 'layer\.0' matches no array \(nearest: 'layers\.0'\)",
    ),
    "a pattern behind a wider one, by path": (
        Plain(),
        by_path(compute={"layers.*": "- tensor", "*.1": "- -"}),
        r"'\*\.1' speaks for no array",
    ),
    "too many axes": (
        Plain(),
        by_path(param={"leave.b": "tensor -"}),
        r"'tensor -' has 2 words, but leave\.b",
    ),
    "an axis twice": (Plain(), by_path(param={"layers.0": "tensor tensor"}), r"already uses for dim0"),
    "a dim that does not divide": (Plain(), by_path(param={"leave.b": "tensor"}), r"dim0 = 6 into 4 parts"),
    "a dim that is taken": (
        Plain(),
        by_path(compute={"layers.0": "- tensor"}) | by_path(param={"layers.0": "- data"}),
        r"two rules for the dim dim1",
    ),
    "no table at all": (Plain(), data() | by_path(), r"by_path\(\) .* is used by no array"),
}


@pytest.mark.parametrize("what", SPLITS)
def test_a_split_that_cannot_be_is_refused_without_devices(what: str) -> None:
    model, rules, said = SPLITS[what]
    with pytest.raises(InputError, match=said):
        explain(experiment(model, rules, tensor=4), 4)


def test_a_rule_by_path_is_checked_when_it_is_written() -> None:
    with pytest.raises(InputError, match=r"no axis 'tenser' \(nearest: 'tensor'\)"):
        by_path(compute={"*": "- tenser"})
    with pytest.raises(InputError, match=r"role 'params' \(nearest: 'param'\)"):
        by_path(params={"*": "- tensor"})
    with pytest.raises(InputError, match=r"role 'activation', but only parameters have paths"):
        by_path(activation={"*": "data"})
    with pytest.raises(InputError, match=r"gives compute 'tensor'; it takes a table"):
        by_path(compute="tensor")  # pyright: ignore[reportArgumentType]
    made = Layouts(by_path(compute={"w": "- tensor"}), {"tensor": 2})
    with pytest.raises(InputError, match=r"which has two of that name \(embed embed\)"):
        made.param("w", ("embed", "embed"), (4, 4))


def test_the_manual_partitioner_is_refused_with_what_to_change() -> None:
    e = replace(experiment(Plain(), data(), data=4), partitioner=Manual())
    with pytest.raises(InputError, match=r"The model is foreign.*partitioner=Auto\(\)"):
        explain(e, 4)
    explain(replace(e, partitioner=Auto()), 4)


def test_a_rule_by_path_is_a_value_that_the_command_line_reads() -> None:
    text = "data | fsdp | by_path(compute={'*.up.kernel': '- tensor', '*.up.bias': 'tensor'})"
    made = apply(foreign_linen.config(), ("--rules", text))
    assert eval(repr(made.rules), {"data": data, "fsdp": fsdp, "by_path": by_path}) == made.rules
    told = explain(made, 8)
    lies = {line.path: line.layout for line in told.of("parameter")}
    assert lies["Block_1.up.kernel"] == "embed/fsdp mlp/tensor"
    assert lies["Block_1.down.kernel"] == "mlp/fsdp embed"


def test_what_nobody_splits_is_explained_by_its_own_reasons() -> None:
    told = explain(
        experiment(Plain(), data() | by_path(compute={"layers.0": "- tensor"}), data=2, tensor=2), 4
    )
    (line,) = (x for x in told.of("parameter") if x.path == "leave.b")
    assert line.whole == "no rule names dim0"
    assert told.tokens == 16
    unlabelled = {"x": Entry("batch features", (8,), "float32")}
    loss = lambda p, b: {"loss": jnp.sum(b["x"] @ p["layers"][0]), "weight": jnp.ones(())}
    assert explain(experiment(Plain(loss=loss, inputs=unlabelled), data(), data=2), 2).tokens == 16


# The command line, with the files that docs/foreign.md shows.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder outside the repository with the page's files."""
    where = tmp_path_factory.mktemp("foreign")
    for name, code in EXAMPLES.items():
        (where / name).write_text(code, encoding="utf-8")
    before = list(sys.path)
    yield where
    sys.path[:] = before
    sys.modules.pop("plain_net", None)


def test_the_page_shows_two_files_that_pass_the_checks() -> None:
    assert PAGE.read_text(encoding="utf-8").count("```python") == len(EXAMPLES) == 2
    for name, code in EXAMPLES.items():
        for arguments in (["check"], ["format", "--check"]):
            command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--stdin-filename", name, "-"]
            ran = subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_pages_model_trains_resumes_to_the_bit_and_runs_again_when_its_files_are_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    flags = ("--log-every", 1, "--checkpoints.every", 40)
    assert small.shardlab("train", "plain_digits.py", "--runs", "whole", *flags) == 0
    run = small.only(folder / "whole")
    claimed = re.search(r"held-out loss under ([\d.]+) nats", EXAMPLES["plain_digits.py"])
    assert claimed is not None
    evals = [r.values for r in read(run / "records.jsonl") if r.kind == "eval"]
    assert 0 < evals[-1]["loss"] < float(claimed[1])
    shutil.copytree(run, folder / "half" / "plain-digits" / run.name)
    half = small.only(folder / "half")
    shutil.rmtree(half / "checkpoints" / "80")
    (half / "records.jsonl").unlink()
    for name in EXAMPLES:
        (folder / name).unlink()
    sys.modules.pop("plain_net", None)
    assert small.shardlab("train", half / "config.py", "--resume", half) == 0
    assert "resumed from step 40" in capsys.readouterr().out
    whole, resumed = small.losses(run), small.losses(half)
    assert resumed == {at: whole[at] for at in range(41, 81)}
    for name, array in small.arrays(run, 80).items():
        np.testing.assert_array_equal(small.arrays(half, 80)[name], array, err_msg=name)
    assert small.shardlab("train", half / "config.py", "--partitioner", "manual", "--runs", "none") == 2
    assert "The model is foreign" in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_the_linen_config_trains_as_its_rules_say() -> None:
    e = load(ROOT / "configs" / "foreign_linen.py")
    step = train_step(e, jax.devices())
    kernel = step.layouts["Block_0.attention.query.kernel"]
    assert (kernel.compute.text(), kernel.param.text()) == (
        "embed heads/tensor head_dim",
        "embed/fsdp heads/tensor head_dim",
    )
    assert isinstance(e.partitioner, Auto)
