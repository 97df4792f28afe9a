"""Corpus -> folder of two token files and their facts, written once, appearing all at once.

    train.tokens   heldout.tokens   facts.json   [tokenizer.json]

The folder is built under another name and renamed, so a killed build leaves nothing that looks finished and two
processes that build the same one cannot mix: the first rename wins and the other adopts it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.data.store.corpus import Corpus
from experiments.data.store.statistics import TextStatistics
from experiments.data.store.token_writer import TokenWriter, sync_folder
from experiments.data.store.tokenizer import BPETokenizer, Tokenizer
from sharding.errors import InputError

SPLITS = ("train", "heldout")
Progress = Callable[[int], None]  # called with the bytes of text read so far


def cached(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> Path:
    """The folder under `cache` for this state of the corpus's files, built when it is not there.

    Processes that arrive together wait for the one that builds (a lock file); where the file system has no
    locks, each builds its own and the first one is kept.
    """
    key = corpus.key(tokenizer.fingerprint)
    folder = Path(cache) / f"{corpus.name}-{key}"
    if not folder.is_dir():
        with _lock(folder.with_name(f".{folder.name}.lock")) as locked:
            if locked:  # nobody else is building: what lies under a building name is a killed process's
                for stale in folder.parent.glob(f".{folder.name}.building-*"):
                    shutil.rmtree(stale, ignore_errors=True)
            if not folder.is_dir():
                prepare(corpus, tokenizer, folder)
    return folder


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Tokenize `corpus` into `folder` in one streaming pass and return its facts.

    Raises InputError for an empty corpus, bad text or a full disk; `folder` then does not exist. When another
    process finished the same folder in the meantime, that one stays.
    """
    building = folder.with_name(f".{folder.name}.building-{uuid.uuid4().hex}")
    try:
        building.mkdir(parents=True)
        facts = _write(corpus, tokenizer, building, progress)
        if isinstance(tokenizer, BPETokenizer):
            _write_text(building / "tokenizer.json", tokenizer.json)
        _write_text(building / "facts.json", json.dumps(facts, indent=2, sort_keys=True) + "\n")
        sync_folder(building)
        _publish(building, folder)
    except OSError as error:
        raise InputError(
            f"Cannot write the token files of {corpus.name} to {folder}: {error.strerror or error}. They take about "
            f"{corpus.bytes_on_disk:,} bytes: check the path, its permissions and the free space."
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return facts


def _publish(building: Path, folder: Path) -> None:
    """Give the finished folder its name; when another process was first, its folder stays."""
    try:
        os.rename(building, folder)
    except OSError:
        if not (folder / "facts.json").is_file():
            raise
    sync_folder(folder.parent)


def _write(corpus: Corpus, tokenizer: Tokenizer, folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Stream the corpus through the tokenizer into both token files; returns the facts."""
    statistics = {"train": TextStatistics(), "heldout": TextStatistics(compress="xz")}
    whole, seen, changed = hashlib.sha256(), 0, 0
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(TokenWriter(folder / f"{split}.tokens", tokenizer.vocab))
            for split in SPLITS
        }
        for document in corpus.documents():
            writer, counts = writers[document.split], statistics[document.split]
            for piece in document.pieces():
                ids = tokenizer.encode(piece)
                writer.add(ids, piece)
                if document.split == "heldout" and tokenizer.text(ids) != piece:
                    changed += len(piece)
                counts.add(piece)
                whole.update(piece)
                seen += len(piece)
                if progress:
                    progress(seen)
            writer.end_document(tokenizer.separator)
            counts.add(b"\0")
            whole.update(b"\0")
        _require_both_sides(corpus, writers)
    facts = _facts(corpus, tokenizer, writers, statistics, whole.hexdigest())
    return facts | {"heldout_changed_bytes": changed}


def _require_both_sides(corpus: Corpus, writers: dict[str, TokenWriter]) -> None:
    for split, writer in writers.items():
        if not writer.documents:
            raise InputError(
                f"The corpus {corpus.name} is empty on its {split} side: {len(corpus.files)} files, "
                f"{corpus.bytes_on_disk} bytes in all, {len(corpus.skipped)} of them skipped as unreadable. "
                "Give it more text: a training side and a held-out side are both needed."
            )


def _facts(
    corpus: Corpus,
    tokenizer: Tokenizer,
    writers: dict[str, TokenWriter],
    statistics: dict[str, TextStatistics],
    sha256: str,
) -> dict[str, Any]:
    """What is known of the corpus. Bytes are of text with one 0 byte at the end of each document.

    `heldout_..._bits_per_byte` are of the whole held-out side. What a run evaluates may be the first rows of it only:
    `train_byte_counts` are there to say the same of those rows. `heldout_changed_bytes`, of the pieces of text that the
    tokenizer gives back otherwise than it got them (in lower case, say), keep a run from telling bits per byte.
    """
    train, heldout = (statistics[s] for s in SPLITS)
    facts: dict[str, Any] = {
        "name": corpus.name,
        "licence": corpus.licence,
        "sha256": sha256,
        "files": len(corpus.files) - len(corpus.skipped),
        "skipped_files": sorted(corpus.skipped),
        "split_by": corpus.split_by,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": hashlib.sha256(tokenizer.fingerprint.encode()).hexdigest(),
        "vocab": tokenizer.vocab,
        "train_byte_counts": train.counts.tolist(),
    }
    facts |= {f"heldout_{name}": value for name, value in heldout.facts(train.counts).items()}
    for split, writer in writers.items():
        facts[f"{split}_bytes"] = writer.text_bytes
        facts[f"{split}_tokens"] = writer.tokens
        facts[f"{split}_{'files' if len(corpus.files) > 1 else 'passages'}"] = writer.documents
        facts[f"{split}_payload_sha256"] = writer.payload_sha256
    return facts


def _write_text(path: Path, text: str) -> None:
    """Write and fsync; the folder's rename makes it visible."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `path`; yields whether there is one (some file systems have none)."""
    try:
        import fcntl
    except ImportError:  # not POSIX
        yield False
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise InputError(
            f"Cannot write to the cache folder {path.parent}: {error.strerror or error}. Work in a folder that is writable."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
