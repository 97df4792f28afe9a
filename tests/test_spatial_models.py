"""Models of images under spatial splits: the numbers of one device, closed forms of their traffic, and their data."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import convnet_digits, vit_digits
from experiments.config import Experiment
from experiments.data.digits import Digits
from experiments.data.fashion_mnist import FOLDER, FashionMNIST
from experiments.records import read
from models.convnet_config import ConvNetConfig
from models.local_config import LocalConfig
from models.vit_config import ViTConfig
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.ledger import Collective, collectives
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.spatial import spatial
from sharding.rules.tensor import tensor
from sharding.rules.zero2 import zero2
from tests.small import only as only_run
from tests.small import shardlab
from tests.support import ROWS, assert_same, batches, initial_params, make_step, model_configs, oracle, train
from tests.verified import Opened, judged, only

MODELS = {name: model_configs()[name] for name in ("convnet", "local", "vit")}
BOUND = 1e-5
"""As in `test_parity`."""
PARTITIONERS = [Manual(), Auto()]
FULL = context(order="contiguous")

CASES: dict[str, tuple[Rules, MeshShape]] = {
    "spatial": (spatial(), MeshShape(context=4)),
    "data spatial": (data() | spatial(), MeshShape(data=4, context=2)),
    "fsdp spatial tensor": (fsdp() | spatial() | tensor(), MeshShape(fsdp=2, context=2, tensor=2)),
    "zero2 tensor spatial": (zero2() | tensor() | spatial(), MeshShape(data=2, context=2, tensor=2)),
    "spatial within fsdp": (data() | fsdp() | spatial(), MeshShape(data=2, fsdp=2, context=2)),
}
QUICK = {("data spatial", Manual()), ("fsdp spatial tensor", Auto())}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("case", "partitioner"),
    [
        pytest.param(c, p, marks=() if (c, p) in QUICK else pytest.mark.slow, id=f"{c}-{type(p).__name__}")
        for c in CASES
        for p in PARTITIONERS
    ],
)
def test_models_of_images_compute_what_one_device_does(
    case: str, model: str, partitioner: Partitioner
) -> None:
    config, (rules, mesh) = MODELS[model], CASES[case]
    if model == "vit":  # its patches are a sequence, which is split as the rows are
        rules = rules | FULL
    step = make_step(config, rules, mesh, partitioner, accumulate=2 if case == "data spatial" else 1)
    found = train(step, initial_params(config), batches(config, 2))
    want = oracle(config, 2)
    assert_same(found, want, BOUND)


def small(e: Experiment, rules: Rules, **sizes: int) -> Experiment:
    """A config of the digits, shrunk until it is verified in seconds."""
    model: Any = e.model
    return replace(e, model=replace(model, **sizes), batch=16, rules=rules)


SIZES = {"embed": 8, "mlp": 16, "layers": 1}
TWO = MeshShape(data=2, context=2, tensor=2)
VERIFIED = {
    "convnet": (small(convnet_digits.config(), data() | spatial() | tensor(), **SIZES), TWO),
    "vit": (
        small(vit_digits.config(), vit_digits.config().rules, **SIZES, heads=2, kv_heads=2, head_dim=4),
        TWO,
    ),
    "local": (
        replace(small(convnet_digits.config(), data() | fsdp() | spatial()), model=LocalConfig(**SIZES)),
        MeshShape(data=2, fsdp=2, context=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "by"),
    [
        pytest.param(
            m,
            p,
            marks=() if (m == "local") == (p == Auto()) else pytest.mark.slow,
            id=f"{m}-{type(p).__name__}",
        )
        for m in VERIFIED
        for p in PARTITIONERS
    ],
)
def test_verify_agrees_on_images_in_double(model: str, by: Partitioner, opened: Opened) -> None:
    e, mesh = VERIFIED[model]
    made = judged(e, opened, mesh, by, x64=True)
    outcome = only(made)
    assert not outcome.departs, outcome
    assert 0 < outcome.worst["gradient"].error < 1e-13
    assert made.precision == "float64"


# what it sends


def traced(config: Any, rules: Rules, mesh: MeshShape) -> list[Collective]:
    """Every collective of one update."""
    step = make_step(config, rules, mesh)
    return collectives(
        jax.make_jaxpr(step.update)(step.abstract_state(), step.abstract_batch(ROWS)), mesh.sizes()
    )


def sent(found: list[Collective], kind: str) -> int:
    return sum(c.bytes for c in found if c.kind == kind)


@pytest.mark.parametrize("height", [8, 16, 32])
def test_the_convolutional_network_sends_its_halos_forward_and_backward(height: int) -> None:
    c = ConvNetConfig(height=height, width=16, embed=8, mlp=16, kernel=5, layers=2, stages=2)
    found = traced(c, data() | spatial(), MeshShape(data=4, context=2))
    rows = ROWS // 4
    enter = 4 * (c.kernel - 1) * rows * c.width * c.channels  # pixels have no gradient
    blocks = 2 * 4 * (c.kernel - 1) * rows * c.embed * c.layers * (c.width + c.width // 2)
    assert sent(found, "permute") == enter + blocks
    kinds = {(x.kind, x.axes) for x in found if x.shape != ()}
    # scores over context alone; gradients, each once, over both
    assert kinds == {
        ("permute", ("context",)),
        ("all-reduce", ("context",)),
        ("all-reduce", ("data", "context")),
    }
    scores = [x for x in found if x.axes == ("context",) and x.kind == "all-reduce"]
    assert [x.shape for x in scores] == [(rows, c.classes)]


def test_the_local_network_sends_no_gradient_of_what_is_not_shared() -> None:
    c = LocalConfig(height=16, width=8, embed=8, mlp=16, layers=2)
    found = traced(c, spatial(), MeshShape(context=4))
    assert sent(found, "permute") == 4 * 2 * ROWS * 8 * (c.channels + 2 * c.layers * c.embed)
    reduced = [x.shape for x in found if x.kind == "all-reduce" and x.shape != ()]
    assert {x.kind for x in found} == {"permute", "all-reduce"}
    # the scores, and the scales of the norms: all else is each position's own
    assert sorted(reduced) == sorted([(ROWS, c.classes), (c.embed,), (c.embed,), (c.embed,)])


def test_an_image_that_becomes_a_sequence_split_alike_moves_no_pixel() -> None:
    found = traced(MODELS["vit"], data() | spatial() | FULL, MeshShape(data=4, context=2))
    first = min(i for i, x in enumerate(found) if x.kind == "permute")
    assert all(x.op in ("attention", "ring") or "attention" in x.source or "ring" in x.source
               for x in found[first:] if x.kind == "permute")  # fmt: skip
    assert "all-gather" not in {x.kind for x in found}
    assert "all-to-all" not in {x.kind for x in found}


def test_a_sequence_left_whole_is_refused() -> None:
    config = MODELS["vit"]
    with pytest.raises(InputError, match="Chain a rule that splits length over context"):
        make_step(config, data() | spatial(), MeshShape(data=4, context=2))


# sizes that cannot be


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ConvNetConfig(kernel=0), "kernel=0"),
        (lambda: ConvNetConfig(height=9), "9 x 8 between 2 stages"),
        (lambda: LocalConfig(width=0), "width=0"),
        (lambda: ViTConfig(patch=3), "patches of 3 x 3"),
        (lambda: ViTConfig(kv_heads=3), "heads=4 and kv_heads=3"),
        (lambda: ViTConfig(mlp=0), "mlp=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


# data


def test_digits_as_images_are_the_features_row_by_row(tmp_path: Path) -> None:
    flat, images = (
        Digits(form=f).open(tmp_path).rows("train", 3, 1, 8, 0, 8) for f in ("features", "images")
    )
    assert images["pixels"].shape == (8, 8, 8, 1)
    np.testing.assert_array_equal(images["pixels"].reshape(8, 64), flat["features"])
    np.testing.assert_array_equal(images["labels"], flat["labels"])
    with pytest.raises(InputError, match="form='rows'"):
        Digits(form="rows").open(tmp_path)  # type: ignore[arg-type]


def test_fashion_mnist_reads_the_packages_files(tmp_path: Path) -> None:
    source = FashionMNIST.example(tmp_path)
    dataset = source.open(tmp_path)
    raw = gzip.decompress((tmp_path / FOLDER / "t10k-images-idx3-ubyte.gz").read_bytes())
    rows = dataset.gather("heldout", np.array([0, 7]))
    want = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28, 1)[[0, 7]] / np.float32(255)
    np.testing.assert_array_equal(rows["pixels"], want)
    assert (dataset.train_rows, dataset.heldout_rows) == (120, 30)


def test_without_the_package_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"apt-get install dataset-fashion-mnist.*dpkg-deb -x") as caught:
        FashionMNIST(root=str(tmp_path)).open(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("train-images-idx3-ubyte.gz", lambda b: b[: len(b) // 2]),
        ("train-images-idx3-ubyte.gz", lambda b: b"no gzip"),
        ("t10k-labels-idx1-ubyte.gz", lambda b: gzip.compress(gzip.decompress(b)[:-1])),
        ("t10k-labels-idx1-ubyte.gz", lambda b: gzip.compress(b"\0\0")),
        ("train-labels-idx1-ubyte.gz", lambda b: gzip.compress(b"\0\0\0\0" + gzip.decompress(b)[4:])),
        ("train-labels-idx1-ubyte.gz", lambda b: gzip.compress(b"\0\0\x08\x01\0\0\0\x01\x03")),
        ("train-labels-idx1-ubyte.gz", lambda b: gzip.compress(gzip.decompress(b)[:-1] + b"\x0a")),
    ],
)
def test_a_damaged_file_is_one_paragraph(name: str, spoil: Any, tmp_path: Path) -> None:
    source = FashionMNIST.example(tmp_path)
    path = tmp_path / FOLDER / name
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=r"damaged|do not belong together") as caught:
        source.open(tmp_path)
    assert "\n" not in str(caught.value)


# the configs learn what they say


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("convnet_digits", 0.97), ("vit_digits", 0.92)])
def test_a_config_reaches_the_accuracy_it_states(
    name: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(convnet_digits.__file__).with_name(f"{name}.py")
    assert shardlab("train", path, "--checkpoints.every", 0) == 0
    last = [r for r in read(only_run(tmp_path / "runs") / "records.jsonl") if r.kind == "eval"][-1]
    assert last.values["examples"] == 270
    assert last.values["correct"] >= least
