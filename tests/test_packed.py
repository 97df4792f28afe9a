"""Packed documents: each token once an epoch, nothing of one document in another, and a model that sees them apart."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import models.transformer
from configs import quickstart
from experiments.assemble import check_data, one_device
from experiments.data import contract
from experiments.data.store import packed, packing, row_file
from experiments.data.store.packing import best_fit, pack, spread
from experiments.data.store.tokenizer import train_bpe
from experiments.data.store.windows import WindowDataset
from experiments.data.text import Text
from experiments.data.tokens import Tokens
from experiments.records import read
from models.transformer import Transformer
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.params import bind
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from sharding.rules.tensor2d import tensor2d
from sharding.rules.ulysses import ulysses
from tests.small import only, shardlab
from tests.support import (
    Trained,
    assert_same,
    departure,
    initial_params,
    make_step,
    model_configs,
    train,
    worst,
)

SIZES = st.lists(st.integers(1, 70), min_size=1, max_size=40)


def offsets_of(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype("<u8")


@given(sizes=SIZES, length=st.integers(1, 32))
def test_rows_hold_every_token_once_and_cut_only_what_is_longer_than_a_row(
    sizes: list[int], length: int
) -> None:
    offsets = offsets_of(sizes)
    rows = pack(offsets, length)
    source, segments, positions = spread(rows, np.arange(len(rows)), length)
    used = source[source >= 0]
    assert np.array_equal(np.sort(used), np.arange(offsets[-1]))
    pieces = []
    for row, segment, position in zip(source, segments, positions, strict=True):
        filled = int((segment > 0).sum())
        assert filled  # no row is empty
        assert (row[filled:] == -1).all()  # padding comes last
        assert not segment[filled:].any()
        assert not position[filled:].any()
        assert np.array_equal(np.unique(segment[:filled]), np.arange(1, segment.max() + 1))
        assert (np.diff(segment[:filled]) >= 0).all()
        for number in range(1, segment.max() + 1):
            here = segment == number
            assert np.array_equal(position[here], np.arange(here.sum()))
            assert (np.diff(row[here]) == 1).all()
            pieces.append((int(row[here][0]), int(here.sum())))
    expected = [(int(o) + cut, min(length, n - cut)) for o, n in zip(offsets, sizes, strict=False)
                for cut in range(0, n, length)]  # fmt: skip
    assert sorted(pieces) == sorted(expected)
    starts = [int(rows.starts[i]) for i in rows.first[:-1]]
    assert starts == sorted(
        starts
    )  # rows run through the file, so that the first held-out rows are its beginning


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_is_its_definition(lengths: list[int]) -> None:
    left: list[int] = []
    for size in sorted(lengths, reverse=True):
        fits = [r for r, room in enumerate(left) if room >= size]
        if fits:
            left[min(fits, key=lambda r: left[r])] -= size
        else:
            left.append(20 - size)
    row = best_fit(np.array(lengths), 20)
    held = np.bincount(row, np.array(lengths))
    assert sorted(20 - held) == sorted(left)
    assert held.max() <= 20


def test_best_fit_is_better_than_first_come() -> None:
    sizes = np.random.default_rng(0).integers(1, 65, 2000)
    made = best_fit(sizes, 64).max() + 1
    greedy, room = 1, 64
    for size in sizes:
        greedy, room = (greedy, room - size) if size <= room else (greedy + 1, 64 - size)
    fewest = -(-int(sizes.sum()) // 64)
    assert fewest <= made <= 1.02 * fewest < 1.2 * fewest < greedy


def corpus(folder: Path, documents: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(documents):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


TEXTS = st.lists(st.text(st.sampled_from("abcdé \n"), min_size=1, max_size=90), min_size=2, max_size=12)


@settings(max_examples=25)
@given(texts=TEXTS, length=st.integers(1, 40), seed=st.integers(0, 9))
def test_an_epoch_shows_each_document_alone_and_whole(
    texts: list[str], length: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    source = Text(path=str(corpus(folder / "text", texts)), length=length, documents="packed")
    dataset = source.open(folder / "cache")
    check_epoch(dataset, seed)
    again = source.open(folder / "other cache").rows("train", seed, 1, 3, 1, 3)
    whole = dataset.rows("train", seed, 1, 3, 0, 3)
    assert all(np.array_equal(again[name], whole[name][1:]) for name in whole)


def check_epoch(dataset: WindowDataset, seed: int) -> None:
    """Both sides show each piece of each document once, as a segment of its own, and nothing else but padding."""
    for split in ("train", "heldout"):
        file, held = dataset.files[split], Counter()
        bounds = zip(file.offsets[:-1], file.offsets[1:], strict=True)
        expected = Counter(
            file.tokens[a:b][cut : cut + dataset.length].tobytes()
            for a, b in bounds
            for cut in range(0, int(b - a), dataset.length)
        )
        rows = dataset.train_rows if split == "train" else dataset.heldout_rows
        epoch = dataset.rows(split, seed, 0, rows, 0, rows)
        for at in range(rows):
            row = {name: array[at] for name, array in epoch.items()}
            assert np.array_equal(row["weights"], (row["segments"] > 0).astype(np.float32))
            for number in range(1, row["segments"].max() + 1):
                here = row["segments"] == number
                labels, tokens = row["labels"][here], row["tokens"][here]
                assert np.array_equal(row["positions"][here], np.arange(len(labels)))
                assert np.array_equal(tokens[1:], labels[:-1])
                assert not (labels[:-1] == dataset.separator).any()  # it ends where its document does
                held[labels.astype(np.uint8).tobytes()] += 1
        assert held == expected
        share = 1 - float(epoch["weights"].mean(dtype=np.float64))
        assert dataset.facts[f"{split}_padding_share"] == pytest.approx(share, abs=1e-12)
        assert dataset.facts[f"{split}_rows"] == rows


def test_a_document_begins_and_ends_with_a_separator(tmp_path: Path) -> None:
    source = Text(path=str(corpus(tmp_path / "text", ["abc", "de", "f" * 9])), length=8, documents="packed")
    dataset = source.open(tmp_path / "cache")
    seen = {}
    sides: list[tuple[contract.Split, int]] = [
        ("train", dataset.train_rows),
        ("heldout", dataset.heldout_rows),
    ]
    for split, rows in sides:
        for row in range(rows):
            made = {k: v[0] for k, v in dataset.gather(split, np.array([row])).items()}
            for number in range(1, made["segments"].max() + 1):
                here = made["segments"] == number
                seen[bytes(made["labels"][here].tolist())] = bytes(made["tokens"][here].tolist())
    assert seen == {b"abc\0": b"\0abc", b"de\0": b"\0de", b"f" * 8: b"\0" + b"f" * 7, b"f\0": b"ff"}


TEXT_SOURCES = [
    n for n in contract.sources() if "documents" in {f.name for f in dataclasses.fields(contract.source_class(n))}
]  # fmt: skip


def test_every_source_of_text_has_the_choice() -> None:
    assert set(TEXT_SOURCES) == set(contract.sources()) - {"digits"} - {
        n for n in contract.sources() if "length" not in {f.name for f in dataclasses.fields(contract.source_class(n))}
    }  # fmt: skip
    assert len(TEXT_SOURCES) >= 7


@pytest.mark.parametrize("name", TEXT_SOURCES)
def test_each_source_of_text_keeps_the_contract_when_packed(name: str, tmp_path: Path) -> None:
    cls: Any = contract.source_class(name)
    source = dataclasses.replace(
        cls.example(tmp_path) if hasattr(cls, "example") else cls(), documents="packed"
    )
    dataset = source.open(tmp_path / "cache")
    contract.check(dataset)
    assert dataset.facts["documents"] == "packed"
    assert set(dataset.inputs) == {"tokens", "labels", "weights", "segments", "positions"}


def test_held_out_facts_are_of_the_labels_that_weigh(tmp_path: Path) -> None:
    texts = [f"document {n} " * (n % 13 + 1) for n in range(80)]
    dataset = Text(path=str(corpus(tmp_path / "text", texts)), length=48, documents="packed").open(tmp_path)
    rows = min(3, dataset.heldout_rows)
    made = dataset.gather("heldout", np.arange(rows))
    labels = made["labels"][made["weights"] > 0]
    facts = dataset.heldout_facts(rows)
    assert facts["tokens"] == facts["bytes"] == len(labels)
    counts = np.bincount(labels, minlength=256)
    p = counts[counts > 0] / counts.sum()
    assert facts["entropy_bits_per_byte"] == pytest.approx(-(p * np.log2(p)).sum())
    everything = dataset.heldout_facts(10**6)
    assert everything["bytes"] == dataset.facts["heldout_bytes"]
    assert everything["bytes_per_token"] == dataset.bytes_per_token_heldout == 1.0


def test_characters_that_the_end_of_a_row_cuts_are_counted_whole(tmp_path: Path) -> None:
    """Three bytes each, of which a small BPE makes two or three tokens: nearly every row ends within one."""
    letters = np.random.default_rng(0).integers(0x4E00, 0x5600, (40, 300))
    texts = ["".join(chr(c) + "\n" * (n % 40 == 39) for n, c in enumerate(row)) for row in letters.tolist()]
    folder, tokenizer = corpus(tmp_path / "text", texts), tmp_path / "bpe.json"
    tokenizer.write_text(train_bpe([t.encode() for t in texts], 300).json, encoding="utf-8")
    source = Text(path=str(folder), length=32, tokenizer=str(tokenizer), documents="packed")
    dataset = source.open(tmp_path / "cache")
    stored, rows = dataset.files["heldout"], dataset.heldout_rows
    (whole,) = dataset.heldout_labels(rows)
    assert np.array_equal(whole, stored.tokens)
    held = dataset.tokenizer.text(whole)
    assert sorted(held.decode().split("\0")[:-1]) == sorted(t for t in texts if t in held.decode())
    facts = dataset.heldout_facts(rows)
    assert (facts["tokens"], facts["bytes"]) == (stored.header.tokens, dataset.facts["heldout_bytes"])
    for name in ("unigram", "entropy", "xz"):
        assert facts[f"{name}_bits_per_byte"] == dataset.facts[f"heldout_{name}_bits_per_byte"]
    packed_apart = np.split(stored.tokens, np.arange(32, len(stored.tokens), 32))
    assert (
        sum(len(dataset.tokenizer.text(p)) for p in packed_apart) > facts["bytes"]
    )  # the fault that this is about


@settings(max_examples=15)
@given(seed=st.integers(0, 99), length=st.integers(8, 40), data=st.data())
def test_held_out_labels_are_those_of_the_rows(
    seed: int, length: int, data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("labels")
    draw = np.random.default_rng(seed)  # enough documents that several short ones are held out and share rows
    texts = [bytes(draw.integers(97, 123, size).tolist()).decode() for size in draw.integers(1, 50, 140)]
    source = Text(path=str(corpus(folder / "text", texts)), length=length, documents="packed")
    dataset = source.open(folder / "cache")
    assert isinstance(dataset, packed.PackedDataset)
    rows = data.draw(st.integers(1, dataset.heldout_rows))
    runs = dataset.heldout_labels(rows)
    held, _, _ = spread(dataset.packed["heldout"], np.arange(rows), length)
    at = np.unique(held[held >= 0])
    stretches = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
    assert len(runs) == len(stretches)
    tokens = dataset.files["heldout"].tokens
    assert all(np.array_equal(run, tokens[s]) for run, s in zip(runs, stretches, strict=True))


# the file of rows


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return dataclasses.replace(Tokens.example(tmp_path), documents="packed")


def test_rows_are_packed_once_and_found_again(
    tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokens.open(tmp_path / "cache").rows("train", 0, 0, 4, 0, 4)
    monkeypatch.setattr(row_file, "pack", lambda *_: pytest.fail("packed again"))
    again = tokens.open(tmp_path / "cache").rows("train", 0, 0, 4, 0, 4)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    made = sorted(p.name for p in (tmp_path / "cache" / "packed").iterdir())
    assert [name.partition("-")[0] for name in made] == ["heldout", "train"]
    assert all(name.endswith("-32.rows") for name in made)


def test_rows_of_a_corpus_lie_beside_its_tokens(tmp_path: Path) -> None:
    source = dataclasses.replace(Text.example(tmp_path), documents="packed")
    source.open(tmp_path / "cache")
    dataclasses.replace(source, length=16).open(tmp_path / "cache")
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    assert len(list(folder.glob("train-*.rows"))) == len(list(folder.glob("heldout-*.rows"))) == 2
    assert (folder / "train.tokens").is_file()


def flip(at: int) -> Callable[[bytes], bytes]:
    def damaged(raw: bytes) -> bytes:
        out = bytearray(raw)
        out[at] ^= 4
        return bytes(out)

    return damaged


DAMAGE: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("an empty file", lambda raw: b"", "header of the packed rows .* is corrupt"),
    ("a flipped bit in the header", flip(20), "header of the packed rows .* is corrupt"),
    ("one byte short", lambda raw: raw[:-1], "bytes, but .* rows of .* pieces make"),
    ("a flipped bit in a row", flip(-3), "corrupt: they hash to"),
    ("a flipped bit in a piece", flip(256 + 8), "corrupt: they hash to"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE, ids=[case[0] for case in DAMAGE])
def test_a_damaged_file_of_rows_is_refused(
    name: str, damage: Callable[[bytes], bytes], message: str, tokens: Tokens, tmp_path: Path
) -> None:
    tokens.open(tmp_path / "cache")
    (path,) = (tmp_path / "cache" / "packed").glob("train-*.rows")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        tokens.open(tmp_path / "cache")
    assert f"{path}" in str(caught.value)
    assert "Delete it" in str(caught.value)


def test_rows_of_other_documents_are_refused(tokens: Tokens, tmp_path: Path) -> None:
    for length in (16, 32):
        dataclasses.replace(tokens, length=length).open(tmp_path / "cache")
    long, short = sorted((tmp_path / "cache" / "packed").glob("train-*.rows"), reverse=True)
    short.write_bytes(long.read_bytes())
    with pytest.raises(InputError, match=r"rows of 32 tokens.*asked for version 1, 16 tokens"):
        dataclasses.replace(tokens, length=16).open(tmp_path / "cache")


def test_a_folder_that_cannot_be_written_is_named(tokens: Tokens, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "packed").touch()
    with pytest.raises(InputError, match=r"Cannot write the packed rows .*packed"):
        tokens.open(tmp_path / "cache")


def test_another_word_than_run_on_and_packed_is_refused(tokens: Tokens, tmp_path: Path) -> None:
    wrong: Any = "pack"
    with pytest.raises(InputError, match="documents are 'pack'; they are 'run on' or 'packed'"):
        dataclasses.replace(tokens, documents=wrong).open(tmp_path)
    run_on = dataclasses.replace(tokens, documents="run on").open(tmp_path)
    assert type(run_on) is WindowDataset


def _positions_run_on(rows: Any, indices: np.ndarray, length: int) -> Any:
    source, segments, positions = spread(rows, indices, length)
    return source, segments, np.broadcast_to(np.arange(length), positions.shape)


def _one_document_a_row(rows: Any, indices: np.ndarray, length: int) -> Any:
    source, segments, positions = spread(rows, indices, length)
    return source, np.minimum(segments, 1), positions


def _labels_of_the_next_piece(rows: Any, indices: np.ndarray, length: int) -> Any:
    source, segments, positions = spread(rows, indices, length)
    return np.where(source >= 0, np.roll(source, -1, axis=1), -1), segments, positions


@pytest.mark.parametrize("fault", [_positions_run_on, _one_document_a_row, _labels_of_the_next_piece])
def test_a_planted_fault_is_seen(fault: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = ["abc", "de", "f" * 9, "gh", "ijk", "lmno"]
    dataset = Text(path=str(corpus(tmp_path / "text", texts)), length=16, documents="packed").open(tmp_path)
    check_epoch(dataset, 0)
    monkeypatch.setattr(packed, "spread", fault)
    with pytest.raises(AssertionError):
        check_epoch(dataset, 0)


# the model

LENGTH = 16
SIZES_OF_41 = [int(n) for n in np.random.default_rng(3).integers(1, LENGTH + 1, 41)]
APART = dataclasses.replace(model_configs()["transformer"], length=LENGTH, documents="packed")
ALONE = dataclasses.replace(APART, documents="run on")
BOUND = 1e-5
"""float32, as in test_parity."""


def batch_of(source: np.ndarray, segments: np.ndarray, positions: np.ndarray, rows: int) -> dict[str, Any]:
    """A batch of random tokens, which are functions of the source, filled with empty rows up to `rows`."""
    fill = lambda x, value: np.concatenate([x, np.full((rows - len(x), LENGTH), value, x.dtype)])
    source, segments, positions = fill(source, -1), fill(segments, 0), fill(positions, 0)
    draw = np.random.default_rng(0)
    tokens, labels = draw.integers(0, APART.vocab, (2, sum(SIZES_OF_41))).astype(np.int32)
    weights = draw.uniform(0.1, 2.0, sum(SIZES_OF_41)).astype(np.float32)
    taken = lambda x: np.where(source < 0, np.zeros((), x.dtype), x[np.maximum(source, 0)])
    made = {"tokens": taken(tokens), "labels": taken(labels), "weights": taken(weights)}
    return made | {"segments": segments.astype(np.int32), "positions": positions.astype(np.int32)}


def packed_and_alone(rows: int = 32) -> tuple[dict[str, Any], dict[str, Any]]:
    """41 documents packed into rows, the last of which are empty, and the same a row each."""
    offsets = offsets_of(SIZES_OF_41)
    together = pack(offsets, LENGTH)
    first = np.arange(len(SIZES_OF_41) + 1, dtype="<u8")
    each = packing.Rows(first, offsets[:-1], np.diff(offsets).astype("<u4"))
    assert len(together) <= rows - 4  # a shard of four rows is empty
    made = [batch_of(*spread(r, np.arange(len(r)), LENGTH), max(rows, len(r))) for r in (together, each)]
    assert made[0]["segments"].max() >= 3
    return made[0], {k: x for k, x in made[1].items() if k not in ("segments", "positions")}


def test_a_document_has_the_same_logits_packed_and_alone() -> None:
    packed_batch, alone = packed_and_alone()
    params = {p: jnp.array(w) for p, w in initial_params(ALONE).items()}
    read = lambda config, b, *names: np.asarray(
        jax.jit(lambda *x: bind(config.build(), params).logits(*x))(*(jnp.array(b[n]) for n in names))
    )
    together = read(APART, packed_batch, "tokens", "segments", "positions")
    apart = read(ALONE, alone, "tokens")
    run_on = read(ALONE, packed_batch, "tokens")
    found = []
    for row, segments in enumerate(packed_batch["segments"]):
        for number in range(1, segments.max() + 1):
            here = segments == number
            tokens, length = packed_batch["tokens"][row, here], int(here.sum())
            (same,) = (
                r
                for r in range(41)
                if SIZES_OF_41[r] == length and np.array_equal(alone["tokens"][r, :length], tokens)
            )
            assert departure(together[row, here], apart[same, :length]) < BOUND
            found.append((int(here.argmax()), departure(run_on[row, here], apart[same, :length])))
    assert len(found) == 41
    assert all(
        (error > 1e-3) == (begin > 0) for begin, error in found
    )  # without segments all but the first differ


RULES: dict[str, tuple[Rules, MeshShape]] = {
    "data": (data(), MeshShape(data=8)),
    "data fsdp tensor sequence": (data() | fsdp() | tensor() | sequence(), MeshShape(data=2, fsdp=2, tensor=2)),
    "tensor, whole key heads": (tensor(kv_heads="whole"), MeshShape(tensor=8)),
    "tensor2d": (data() | tensor2d(), MeshShape(data=2, fsdp=2, tensor=2)),
    "context": (data() | context(), MeshShape(data=2, context=4)),
    "context in order, tensor": (context(order="contiguous") | tensor() | sequence(), MeshShape(context=4, tensor=2)),
    "ulysses": (fsdp() | ulysses(), MeshShape(fsdp=2, context=4)),
}  # fmt: skip


@functools.cache
def alone_on_one_device() -> Trained:
    """What one device makes of the documents a row each, without any segments: one update."""
    return train(make_step(ALONE), initial_params(ALONE), [packed_and_alone()[1]])


def check_split(rules: Rules, mesh: MeshShape | None, partitioner: Partitioner) -> None:
    """Packed rows on a mesh give loss, gradients and update of the documents alone on one device."""
    step = make_step(APART, rules, mesh, partitioner)
    found = train(step, initial_params(ALONE), [packed_and_alone()[0]])
    assert_same(found, alone_on_one_device(), BOUND)


def test_packed_rows_train_as_the_documents_alone_do() -> None:
    check_split(Rules(), None, Manual())


@pytest.mark.parametrize("case", RULES)
def test_packed_rows_on_a_mesh_train_as_the_documents_alone_do(case: str) -> None:
    check_split(*RULES[case], Manual())


SLOW = [c if c == "tensor2d" else pytest.param(c, marks=pytest.mark.slow) for c in RULES]


@pytest.mark.parametrize("case", SLOW)
def test_packed_rows_under_xlas_partitioner_train_as_the_documents_alone_do(case: str) -> None:
    check_split(*RULES[case], Auto())


def test_attention_across_documents_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    sees = models.transformer.attention
    monkeypatch.setattr(models.transformer, "attention", lambda q, k, v, segments: sees(q, k, v))
    with pytest.raises(AssertionError, match=r"departs|loss|grad_norm"):
        check_split(*RULES["data fsdp tensor sequence"], Manual())


def test_segments_of_another_shard_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = Transformer.apart
    shifted = lambda self, batch: (jnp.roll(apart(self, batch)[0], 1, axis=1), apart(self, batch)[1])
    monkeypatch.setattr(Transformer, "apart", shifted)
    with pytest.raises(AssertionError, match=r"departs|loss|grad_norm"):
        check_split(*RULES["data"], Manual())


def test_a_mixture_of_experts_keeps_documents_apart_too() -> None:
    config = dataclasses.replace(
        model_configs()["moe"], length=LENGTH, documents="packed", capacity=math.inf, balance=0.0
    )
    packed_batch, alone = packed_and_alone()
    on_a_mesh = make_step(config, data() | fsdp(), MeshShape(data=2, fsdp=2))
    made = [
        train(on_a_mesh, initial_params(config), [packed_batch]),
        train(make_step(dataclasses.replace(config, documents="run on")), initial_params(config), [alone]),
    ]
    assert made[0].metrics[0]["loss"] == pytest.approx(made[1].metrics[0]["loss"], rel=BOUND)
    error, leaf = worst(made[0].gradients[0], made[1].gradients[0])
    assert error < BOUND, leaf


# model and data that do not agree, and a run


@pytest.mark.parametrize(
    ("model", "text", "said"),
    [
        ("run on", "packed", "each document would see the ones before it in its row. Set model.documents to packed"),
        ("packed", "run on", "does not say where a document begins. Set data.documents to packed"),
    ],
)  # fmt: skip
def test_a_model_and_data_that_disagree_are_refused(model: Any, text: Any, said: str, tmp_path: Path) -> None:
    small = dataclasses.replace(ALONE, vocab=256, length=32, documents=model)
    source = dataclasses.replace(Text.example(tmp_path), documents=text)
    e = dataclasses.replace(quickstart.config(), model=small, data=source, batch=8)
    with pytest.raises(InputError) as caught:
        check_data(e, source.open(tmp_path / "cache"), one_device(e))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_refuses_another_word() -> None:
    wrong: Any = "pack"
    with pytest.raises(InputError, match=r"documents='pack', but they are 'run on' or 'packed'"):
        dataclasses.replace(ALONE, documents=wrong)


@pytest.mark.usefixtures("at_home")
def test_a_run_records_the_padding(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model.documents", "packed", "--data.documents", "packed", "--steps", "4")
    assert shardlab("train", "small.py", *words) == 0, capsys.readouterr().err
    (first, *_) = read(only(Path("runs")) / "records.jsonl")
    facts = first.details["data"]
    assert facts["documents"] == "packed"
    assert 0 < facts["train_padding_share"] < 0.5
    assert 0 <= facts["heldout_padding_share"] < 0.5
