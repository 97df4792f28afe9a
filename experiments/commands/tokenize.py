"""Write text as token files, with bytes or a byte-pair encoding.

SOURCE is a file, a folder, a quoted pattern such as 'notes/**/*.md', or the name of a text source of
experiments/data (stdlib, gcide, ...). DIR receives train.tokens, heldout.tokens, facts.json and, for a BPE,
tokenizer.json; a config reads it with `data=Tokens(folder="DIR")`. With --verify, SOURCE is such a folder and
every byte of it is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from experiments.json_file import write_json
from experiments.progress import terminal
from sharding.errors import InputError

if TYPE_CHECKING:
    from experiments.data.store.corpus import Corpus
    from experiments.data.store.tokenizer import Tokenizer


def main(argv: list[str]) -> int:
    """Run `shardlab tokenize`. Returns 0; raises InputError for bad input."""
    options = _parse(argv)
    if options.json:
        cli.check_file(options.json, "--json")
    if not options.source:
        raise InputError(
            "SOURCE is empty. Give a file, a folder ('.' is this one), a pattern or the name of a text source."
        )
    if options.verify:
        facts = _verify(Path(options.source))
    else:
        facts = _tokenize(options)
    write_json(options.json, facts)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "shardlab tokenize",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="file, folder, pattern or name of a text source")
    parser.add_argument("--out", metavar="DIR", help="folder to write; it must not exist yet")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--tokenizer", metavar="FILE.json", help="a tokenizer file of the `tokenizers` library"
    )
    which.add_argument(
        "--train-bpe", metavar="N", type=int, help="train a BPE of N tokens on the training side"
    )
    parser.add_argument(
        "--encoding", metavar="NAME", default="utf-8", help="of the text files (default utf-8)"
    )
    parser.add_argument("--licence", metavar="TEXT", default="not stated", help="recorded in the facts")
    parser.add_argument(
        "--verify", action="store_true", help="check the folder SOURCE instead of writing one"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="also write the result as one JSON document"
    )
    options = parser.parse_args(argv)
    if not options.verify and not options.out:
        parser.error("--out DIR is needed (or --verify to check the folder SOURCE)")
    return options


def _tokenize(options: argparse.Namespace) -> dict[str, Any]:
    from experiments.data.store.prepare import prepare
    from experiments.data.store.tokenizer import load_tokenizer

    out = Path(options.out).expanduser()
    if out.exists():
        raise InputError(
            f"--out {out} exists already; token files are never overwritten. Name another or remove it."
        )
    corpus = _corpus(options)
    if options.train_bpe is not None:
        tokenizer = _train(corpus, options.train_bpe)
    else:
        tokenizer = load_tokenizer(options.tokenizer or "bytes")
    with _progress("tokenizing", corpus) as progress:
        facts = prepare(corpus, tokenizer, out, progress)
    for split in ("train", "heldout"):
        print(
            f"{out / split}.tokens: {facts[f'{split}_tokens']:,} tokens of {facts[f'{split}_bytes']:,} bytes"
        )
    print(f"vocab {facts['vocab']}, split by {facts['split_by']}, sha256 {facts['sha256'][:16]}...")
    print(
        f"held-out bits per byte: unigram {facts['heldout_unigram_bits_per_byte']:.3f}, "
        f"own entropy {facts['heldout_entropy_bits_per_byte']:.3f}, xz {facts['heldout_xz_bits_per_byte']:.3f}"
    )
    if changed := facts["heldout_changed_bytes"]:
        print(
            f"the tokenizer does not give its text back: {changed:,} of {facts['heldout_bytes']:,} held-out bytes lie in "
            "pieces that come back changed. A run on these tokens says its loss in nats per token, no bits per byte."
        )
    return {**facts, "folder": str(out)}


def _corpus(options: argparse.Namespace) -> Corpus:
    """The corpus that SOURCE names: a path when there is one, else a text source of experiments/data."""
    from experiments.data.contract import sources
    from experiments.data.text import Text

    name = options.source
    if not Path(name).expanduser().exists() and name.isidentifier():
        named = {stem: cls for stem, cls in sources().items() if hasattr(cls, "corpus") and stem != "text"}
        if name not in named:
            raise InputError(
                f"There is no text at {name!r}, and no text source of that name: {', '.join(named)}."
            )
        return named[name]().corpus()
    return Text(path=name, encoding=options.encoding, licence=options.licence).corpus()


def _train(corpus: Corpus, vocab: int) -> Tokenizer:
    from experiments.data.store.tokenizer import train_bpe

    with _progress("training the BPE", corpus) as progress:

        def pieces() -> Iterator[bytes]:
            seen = 0
            for document in corpus.documents():
                for piece in document.pieces() if document.split == "train" else ():
                    seen += len(piece)
                    progress(seen)
                    yield piece

        return train_bpe(pieces(), vocab)


def _verify(folder: Path) -> dict[str, Any]:
    from experiments.data.store.windows import WindowDataset

    dataset = WindowDataset(folder, length=1)
    dataset.verify()
    print(f"{folder}: both token files are whole ({dataset.facts['train_tokens']:,} training tokens)")
    return {**dataset.facts, "folder": str(folder), "verified": "both files"}


@contextlib.contextmanager
def _progress(what: str, corpus: Corpus) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; piped, a plain line each 5 seconds. The total is the size on disk, where files are plain."""
    packed = any(file.path.suffix in (".gz", ".dz") for file in corpus.files)
    total = None if packed else corpus.bytes_on_disk
    if sys.stderr.isatty():
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=terminal(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda seen: bar.update(task, completed=seen)
        return
    last = time.monotonic()

    def line(seen: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 5:
            last = time.monotonic()
            print(
                f"{what}: {seen:,} bytes" + (f" of {total:,}" if total else ""), file=sys.stderr, flush=True
            )

    yield line
