"""The checker on arrays and work: planted waste is found with its numbers, clean splits are left alone, commands tell it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from configs import quickstart
from experiments.explanation import explain
from models.mlp_config import MLPConfig
from sharding.axes import MeshShape
from sharding.check import Traced, findings, traced
from sharding.errors import InputError
from sharding.finding import Limits
from sharding.flow import Flow
from sharding.ledger import PRODUCTS, product_flops, subjaxprs, user_frames
from sharding.rule import Rule, Rules, also, first_dim, if_free, rule
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.hsdp import hsdp
from sharding.rules.replicated import replicated
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from sharding.rules.zero1 import zero1
from sharding.rules.zero2 import zero2
from sharding.step import TrainStep
from tests.checked import ALL, WIDE, found, inside, line_of, step_of
from tests.small import ROOT, place, shardlab
from tests.support import model_configs, shrunk

# arrays that stay whole by accident


def test_an_array_of_which_no_dim_divides_is_named_with_the_change() -> None:
    (one,) = found(data() | fsdp(), MLPConfig(features=4090, embed=514, mlp=512), data=2, fsdp=4)
    held = 4 * 4090 * 514 * 4  # parameter, gradient and two moments, float32
    assert (one.kind, one.path, one.axes, one.rules) == ("replicated array", "enter", ("fsdp",), ("fsdp()",))
    assert one.sources == (line_of(fsdp),)
    assert (one.has, one.needs) == (held, held // 4)
    assert "32.1 MiB on each device where 8.02 MiB would do" in one.says
    assert one.change == "Make features a multiple of 4 (4090 -> 4092), or set mesh axis fsdp to 2."


def test_the_change_is_right_and_the_limit_counts_wasted_bytes() -> None:
    odd = MLPConfig(features=4090, embed=514, mlp=512)
    for mended, mesh in ((replace(odd, features=4092), (2, 4)), (odd, (4, 2))):
        assert not found(data() | fsdp(), mended, data=mesh[0], fsdp=mesh[1])
    wasted = 3 * 4090 * 514 * 4
    for bytes_, number in ((wasted, 1), (wasted + 1, 0)):
        assert len(found(data() | fsdp(), odd, Limits(bytes=bytes_), data=2, fsdp=4)) == number


def test_zero1_wastes_only_the_optimizers_state() -> None:
    odd = MLPConfig(features=4095, embed=515, mlp=512)
    (one,) = found(zero1(), odd, data=4)
    assert (one.path, one.has, one.needs) == ("enter", 2 * 4095 * 515 * 4, 2 * 4095 * 515)
    assert "set mesh axis" not in one.change, "no smaller axis divides either"
    assert "Its optimizer state takes" in one.says


@rule
def forgets_keys(axis: str = "tensor") -> Rule:
    """Megatron by somebody who thought of the query heads only."""
    split = {"mlp": axis, "heads": axis, "vocab": axis}
    return Rule(compute=split, activation=split)


@rule
def no_vocabulary(axis: str = "tensor") -> Rule:
    """Megatron with replicated embeddings, on purpose."""
    split = {"mlp": axis, "heads": axis, "kv_heads": axis}
    return Rule(compute=split, activation=split)


@rule
def polite(axis: str = "fsdp") -> Rule:
    """Splits features at rest where nobody else does."""
    return Rule(param={"mlp": if_free(axis), "head_dim": if_free(axis)}, activation={"batch": also("fsdp")})


@rule
def all_but_embeddings(axis: str = "fsdp") -> Rule:
    """A function that leaves arrays out on purpose."""
    place = first_dim(axis)
    return Rule(
        param=lambda ask: {} if "vocab" in ask.names else place(ask), activation={"batch": also(axis)}
    )


def test_a_rule_that_forgets_a_name_is_told_which() -> None:
    told = [f for f in found(data() | forgets_keys(), WIDE, data=2, tensor=2) if f.kind == "replicated array"]
    assert [f.path for f in told] == ["layers.attention.k", "layers.attention.v"]
    assert told[0].sources == (line_of(forgets_keys),)
    assert (told[0].has, told[0].needs) == (4 * 2 * 512 * 4 * 32 * 4, 4 * 2 * 512 * 4 * 32 * 2)
    assert "splits its neighbours out, q" in told[0].says
    assert told[0].change.startswith("Add 'kv_heads' to the rule (it divides by 2)")
    for rules, mesh in ((forgets_keys() | replicated("kv_heads"), 2), (forgets_keys(), 8)):
        told = found(rules, WIDE, tensor=mesh)  # said to be on purpose; 4 key heads cannot be split 8 ways
        assert "replicated array" not in {f.kind for f in told}


def test_a_rule_that_gave_way_is_told_what_to_do() -> None:
    told = found(data() | tensor() | polite(), WIDE, data=2, tensor=2, fsdp=2)
    assert [f.path for f in told] == ["layers.mlp.gate_up", "layers.mlp.down"]
    assert (told[1].has, told[1].needs) == (4 * 2 * 384 * 512 * 4, 4 * 2 * 192 * 512 * 4)
    assert f"left mlp whole, which tensor() ({line_of(tensor)}) splits over tensor" in told[1].says
    assert "also('fsdp')" in told[1].change


@pytest.mark.parametrize(
    ("rules", "mesh"),
    [
        (data(), {"data": 8}),
        (no_vocabulary(), {"tensor": 4}),
        (all_but_embeddings(), {"fsdp": 4}),
        (zero1(), {"data": 8}),
        (zero2() | tensor(), {"data": 4, "tensor": 2}),
    ],
    ids=repr,
)
def test_what_is_whole_on_purpose_is_left_alone(rules: Rules, mesh: dict[str, int]) -> None:
    model = replace(WIDE, vocab=1001 if "embeddings" in repr(rules) else 256, embed=512)
    assert not [f for f in found(rules, model, ALL, **mesh) if f.kind == "replicated array"]


# work


def test_products_that_every_device_repeats_are_found_with_their_share() -> None:
    c = MLPConfig(features=64, embed=128, mlp=256, layers=2, classes=10)
    (one,) = found(data() | tensor(), c, data=2, tensor=4)
    # three products a matrix (forward, and two backward but for the features' gradient), 8 rows on a device
    same = 2 * 8 * (2 * 64 * 128 + 3 * 128 * 10)
    split = 2 * 8 * 3 * 2 * 2 * 128 * 256 // 4
    assert (one.kind, one.unit, one.severity, one.axes) == ("repeated work", "FLOPs", "warning", ("tensor",))
    assert (one.has, one.needs) == (same, same // 4)
    assert f"{100 * same / (same + split):.0f} % of its products" in one.says
    assert one.path.startswith(str(ROOT / "models" / "mlp.py:"))
    assert f"tensor() ({line_of(tensor)})" in one.says
    assert "embed = 128" in one.change
    share = (same - same // 4) / (same + split)
    for work, number in ((share - 0.001, 1), (share + 0.001, 0)):
        assert len(found(data() | tensor(), c, Limits(work=work), data=2, tensor=4)) == number


@rule
def only_at_rest(axis: str = "fsdp") -> Rule:
    """Splits parameters and no batch: the devices of the axis do all the same."""
    return Rule(param=first_dim(axis))


def test_an_axis_that_splits_no_work_is_an_error() -> None:
    (one,) = found(data() | only_at_rest(), WIDE, data=2, fsdp=4)
    assert (one.kind, one.severity, one.path) == ("idle axis", "error", "fsdp")
    assert one.needs == one.has // 4
    assert f"only_at_rest() ({line_of(only_at_rest)}) splits no product of the step over it" in one.says
    assert "also('fsdp')" in one.change


# no false alarm

SPLITS: list[tuple[Rules, dict[str, int]]] = [
    (Rules(), {}),
    (data(), {"data": 4}),
    (fsdp(), {"fsdp": 8}),
    (hsdp(), {"data": 2, "fsdp": 4}),
    (zero1(), {"data": 4}),
    (zero2(), {"data": 8}),
    (tensor(), {"tensor": 4}),
    (data() | fsdp() | tensor(), {"data": 2, "fsdp": 2, "tensor": 2}),
    (data() | fsdp() | tensor() | sequence(), {"data": 2, "fsdp": 2, "tensor": 2}),
    (tensor() | sequence(), {"tensor": 4}),
    (zero1() | tensor(), {"data": 4, "tensor": 2}),
    (zero2() | tensor() | sequence(), {"data": 2, "tensor": 4}),
    (data() | sequence("context"), {"data": 2, "context": 4}),
    (fsdp() | sequence("context") | tensor(), {"fsdp": 2, "context": 2, "tensor": 2}),
]


IMAGES = ("convnet", "local", "vit")


def models() -> dict[str, Any]:
    """Every shipped model, shrunk, and the transformer as an accelerator has it."""
    made = model_configs()
    scanned = shrunk(made["transformer"], loop="scan", unembed="tied", remat="dots", dtype="bfloat16")
    return {**made, "transformer-scanned": scanned}


def by_line(jaxpr: Any, times: int, outer: str) -> Counter[str]:
    """FLOPs of the products that each line of the model asks for."""
    found: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        at = next((w for w, ours in user_frames(eqn) if not ours), outer)
        if eqn.primitive.name in PRODUCTS:
            found[at] += product_flops(eqn) * times
        for body in subjaxprs(eqn.params):
            found += by_line(body, times * eqn.params.get("length", 1), at)
    return found


@pytest.mark.parametrize(
    ("rules", "mesh", "name"),
    [
        # Every split on the richest model and every model under some splits; the rest are slow only because they are many.
        pytest.param(
            *split,
            name,
            marks=[] if name == "transformer-scanned" or (at + by) % 4 == 0 else pytest.mark.slow,
        )
        for at, split in enumerate(SPLITS)
        for by, name in enumerate(models())
    ],
    ids=repr,
)
def test_shipped_rules_on_shipped_models_waste_nothing_but_what_flops_prove(
    name: str, rules: Rules, mesh: dict[str, int]
) -> None:
    model = models()[name]

    def look() -> tuple[TrainStep, Traced, Any]:
        step = step_of(rules, model, **mesh)
        seen = traced(step, 16)
        return step, seen, jax.make_jaxpr(step.evaluation)(seen.state["params"], seen.batch)

    if name in ("mlp", "convnet", "local") and "sequence" in repr(rules):  # models without lengths
        with pytest.raises(InputError, match="is used by no array"):
            inside(look)
        return
    step, seen, local = inside(look)
    told = findings(step, seen, ALL)
    # A router scores tokens for all experts alike: whole over the axis that splits each expert's matrices, and told so.
    assert all(f.path.endswith("router") for f in told if f.kind == "replicated array")
    # Only this: the loss of a token is summed over the vocabulary's axis before the length is split by it again, and a table
    # of positions that lies at rest by one axis is gathered and then cut by another.
    moves = [f for f in told if f.kind == "wasteful move"]
    assert all(
        f.path.endswith(("cross_entropy", "unembed", "add")) and f.has <= 2 * 4 * 16 * 8 * 2 for f in moves
    ), moves
    assert not moves or "sequence()" in repr(rules) or {f.path.rpartition(" ")[2] for f in moves} == {"add"}
    # The oracle: the products of one line on all devices against those of the whole model there.
    devices = math.prod(mesh.values())
    wholes = by_line(seen.forward.jaxpr, 1, "")
    split = Flow(local, step.split.layouts.sizes)
    here, once = Counter(), Counter()
    for p in split.products:
        here[p.source] += p.flops * devices
        once[p.source] += p.flops * devices // math.prod(mesh[a] for a in p.repeats)
    # Where positions are summed away, each device scores the sum of its own and one device the sum of all: more, not again.
    partial = {line for line in once if once[line] > wholes[line]}
    assert not partial or (name == "vit" and "sequence" in repr(rules) and len(partial) == 1)
    assert {**once, **{line: wholes[line] for line in partial}} == wholes
    repeated = {line for line in here if here[line] > wholes[line]} - partial
    assert bool(repeated) == any(f.kind in ("repeated work", "idle axis") for f in told)
    assert repeated == set() or "sequence('context')" in repr(rules) or name in ("mlp", "moe", *IMAGES)


# the command line


def test_explain_tells_findings_and_what_each_collective_is_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", ROOT / "configs" / "digits_mlp.py", "--rules", "data | tensor", "--mesh.data", "2", "--mesh.fsdp", "1",
             "--mesh.tensor", "4", "--devices.kind", "pretend", "--devices.count", "8"]  # fmt: skip
    assert shardlab(*words, "--json", tmp_path / "told.json") == 0
    said, told = capsys.readouterr().out, json.loads((tmp_path / "told.json").read_text())
    (one,) = told["findings"]
    assert one["kind"] == "repeated work"
    assert one["says"] in said
    assert one["change"] in said
    assert str(ROOT) not in json.dumps(told)
    for row in told["sources"]:
        file, _, line = row["source"].rpartition(":")
        assert (ROOT / file).read_text().splitlines()[int(line) - 1].strip()
        assert row["rules"]
    total = sum(c["bytes_sent_per_device"] for c in told["collectives"])
    assert sum(row["bytes_sent_per_device"] for row in told["sources"]) == total
    assert {(r["op"], r["kind"]) for r in told["sources"]} >= {
        ("einsum", "all-reduce"),
        ("gradient", "all-reduce"),
    }
    assert shardlab(*words, "--warn.work", "0.99") == 0
    assert "repeated work" not in capsys.readouterr().out


def test_a_run_says_what_it_wastes_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place(tmp_path)
    monkeypatch.setattr(
        "sharding.step.TrainStep.init",
        lambda *_: (_ for _ in ()).throw(InputError("stopped before it compiles")),
    )
    context = ["--mesh.tensor", "1", "--mesh.context", "2", "--rules", "data | fsdp | sequence('context')"]
    assert shardlab("train", "small.py", *context) == 2
    said = capsys.readouterr()
    assert "stopped before it compiles" in said.err
    assert "repeated work" in said.out + said.err
    assert "attention takes length whole" in " ".join((said.out + said.err).split())


def test_explain_refuses_the_slices_that_a_run_refuses() -> None:
    e = replace(quickstart.config(), mesh=MeshShape(data=2, fsdp=2, tensor=2, slices=3))
    with pytest.raises(InputError, match="cannot be laid over 3 slices"):
        explain(e, 8)
    assert explain(replace(e, mesh=replace(e.mesh, slices=4)), 8).devices == 8
