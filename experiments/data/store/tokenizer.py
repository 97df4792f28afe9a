"""Tokenizers: bytes (vocab 256, the default), or a byte-pair encoding from a `tokenizers` JSON file.

A document is ended by one separator token. For bytes it is byte 0; text therefore may not contain NUL bytes,
and a source that finds one refuses the file by name. For BPE it is the file's end-of-text token, and text that
happens to spell that token is encoded as ordinary text, so that no document can forge a boundary.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sharding.errors import InputError

END = "<|endoftext|>"
KNOWN_ENDS = (END, "<|end_of_text|>", "<|endofdocument|>", "</s>", "<eos>", "[SEP]")
SEPARATOR_SIGN = "\u2404"  # how a separator reads in decoded text


class Tokenizer(abc.ABC):
    """Text to ids and back. `vocab` ids, `separator` among them; `fingerprint` changes when the ids would."""

    name: str
    vocab: int
    separator: int
    fingerprint: str

    @abc.abstractmethod
    def encode(self, text: bytes) -> np.ndarray:
        """Token ids (n,) of a piece of UTF-8 text without NUL bytes; no separator is added."""

    @abc.abstractmethod
    def text(self, ids: np.ndarray) -> bytes:
        """The bytes that ids (n,) of the vocabulary stand for, one 0 byte for each separator."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 read as U+FFFD, separators as U+2404."""
        text = self.text(self.check_ids(ids))
        return text.decode("utf-8", errors="replace").replace("\0", SEPARATOR_SIGN)

    def check_ids(self, ids: Iterable[int]) -> np.ndarray:
        """The ids as an array (n,); InputError when one is outside the vocabulary."""
        out = ids if isinstance(ids, np.ndarray) else np.array([int(i) for i in ids], np.int64)
        if len(bad := out[(out < 0) | (out >= self.vocab)]):
            raise InputError(f"Token id {bad[0]} is outside the {self.name} vocabulary of {self.vocab}.")
        return out


class ByteTokenizer(Tokenizer):
    """One token a byte."""

    name, vocab, separator, fingerprint = "bytes", 256, 0, "bytes"

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def text(self, ids: np.ndarray) -> bytes:
        return ids.astype(np.uint8).tobytes()


class BPETokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, read from its JSON text."""

    name = "bpe"

    def __init__(self, source: str, origin: str):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise InputError(
                f"{origin} is not a tokenizer file of the `tokenizers` library: {error}"
            ) from error
        ends = [self._tokenizer.token_to_id(token) for token in KNOWN_ENDS]
        if not (known := [i for i in ends if i is not None]):
            raise InputError(
                f"The tokenizer {origin} has no end-of-text token to separate documents: none of "
                f"{', '.join(KNOWN_ENDS)}. Add one of them to its added tokens."
            )
        self._tokenizer.encode_special_tokens = True  # text that spells a special token stays text
        self._tokenizer.no_truncation()  # a file made for another model's inputs may ask for both: no text is cut off,
        self._tokenizer.no_padding()  # and no token is made that no text stands behind
        self.json = source
        self.separator = known[0]
        self.vocab = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(source.encode()).hexdigest()

    def encode(self, text: bytes) -> np.ndarray:
        ids = self._tokenizer.encode(text.decode("utf-8"), add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)

    def text(self, ids: np.ndarray) -> bytes:
        """As in the base; of a character that an end of `ids` or a separator cuts, the bytes are those of U+FFFD."""
        ends = np.flatnonzero(ids == self.separator)
        runs = (run.tolist() for run in np.split(ids, np.sort(np.concatenate([ends, ends + 1]))))
        texts = [self._tokenizer.decode(run, skip_special_tokens=False) for run in runs]
        return b"\0".join(text.encode() for text in texts[::2])


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """`"bytes"`, or the path of a tokenizer JSON file."""
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if not path.is_file():
        raise InputError(
            f"There is no tokenizer at {path}: give 'bytes', or the path of a tokenizer.json of the `tokenizers` "
            "library (`shardlab tokenize SOURCE --train-bpe 4096 --out DIR` trains one)."
        )
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The tokenizer {path} cannot be read as UTF-8 text ({error}). Give a tokenizer.json of the `tokenizers` "
            "library."
        ) from error
    return BPETokenizer(source, str(path))


def train_bpe(pieces: Iterable[bytes], vocab: int) -> BPETokenizer:
    """Train a byte-level BPE of at most `vocab` ids (256 bytes, the separator, merges) on UTF-8 pieces.

    The pieces are streamed; pass the training split only, or held-out text leaks into the vocabulary.
    """
    if vocab < 257:
        raise InputError(
            f"A byte-level BPE needs at least 257 tokens (256 bytes and a separator), asked: {vocab}."
        )
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for piece in pieces:
            yield piece.decode("utf-8")

    tokenizer.train_from_iterator(texts(), trainer)
    return BPETokenizer(tokenizer.to_str(), "the trained tokenizer")
