"""Reading text as a stream of UTF-8 pieces, and cutting one long text into passages."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from sharding.errors import InputError

PIECE_BYTES = 1 << 20


def read_pieces(path: Path, encoding: str) -> Iterator[bytes]:
    """The text of `path` as UTF-8, in pieces that end after a newline, or after 1 MiB where no newline comes.

    Raises InputError that names file and byte offset for a byte that is not valid in `encoding` and for NUL.
    """
    try:
        with _open(path) as file:
            yield from _cut_at_newlines(_decoded(path, file, encoding))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"The compressed file {path} is damaged ({error}). Install or copy it again."
        ) from error
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error


def passages(pieces: Iterable[bytes], target: int) -> Iterator[bytes]:
    """Cut a text into passages of `target` to 2 * `target` bytes (the last may be shorter).

    A passage ends at the first blank line after `target` bytes, else at the first line end, else between two
    characters. Joined, the passages are the text.
    """
    rest = b""
    for piece in pieces:
        rest += piece
        while len(rest) >= 2 * target:
            cut = _passage_end(rest, target)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _passage_end(text: bytes, target: int) -> int:
    for mark in (b"\n\n", b"\n"):
        if (at := text.find(mark, target - 1, 2 * target)) >= 0:
            return at + len(mark)
    cut = 2 * target
    while cut < len(text) and text[cut] & 0xC0 == 0x80:  # a continuation byte: not between two characters
        cut += 1
    return cut


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix in (".gz", ".dz") else open(path, "rb")


def _decoded(path: Path, file, encoding: str) -> Iterator[bytes]:
    """Blocks of the file as UTF-8, each a whole number of characters, checked for NUL."""
    decoder = _decoder(encoding)
    read = written = 0
    while True:
        pending = len(decoder.getstate()[0])
        block = file.read(PIECE_BYTES)
        try:
            text = decoder.decode(block, final=not block).encode("utf-8")
        except UnicodeError as error:
            start = getattr(error, "start", 0)
            bad = getattr(error, "object", b"")[start : start + 1]
            raise InputError(
                f"{path} is not {encoding} text: byte {bad.hex() or '?'} at offset {read - pending + start} "
                f"({getattr(error, 'reason', error)}). Name its encoding, convert it, or leave it out with a "
                "narrower pattern such as 'FOLDER/**/*.txt'."
            ) from error
        if (nul := text.find(b"\0")) >= 0:
            raise InputError(
                f"{path} holds a NUL byte at offset {written + nul} of its text: NUL separates documents, so text "
                "may not contain it. It is probably no text file: leave it out with a narrower pattern such as "
                "'FOLDER/**/*.txt'."
            )
        if text:
            yield text
        if not block:
            return
        read += len(block)
        written += len(text)


def _decoder(encoding: str) -> codecs.IncrementalDecoder:
    """What turns bytes in `encoding` into text; InputError for one that is unknown, or that is not of text."""
    try:
        # Python keeps base64, rot13, zip and the like in one table with encodings, and knows which are of text.
        if getattr(codecs.lookup(encoding), "_is_text_encoding", True):
            return codecs.getincrementaldecoder(encoding)("strict")
    except (LookupError, ValueError):  # unknown, or a NUL in its name
        pass
    raise InputError(f"There is no text encoding {encoding!r}; try 'utf-8', 'latin-1' or 'cp1252'.")


def _cut_at_newlines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same text cut after newlines, so that a tokenizer sees whole lines; a block without one passes whole."""
    rest = b""
    for block in blocks:
        block = rest + block
        cut = block.rfind(b"\n") + 1 or len(block)
        yield block[:cut]
        rest = block[cut:]
    if rest:
        yield rest
