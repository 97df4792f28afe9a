"""A token file: header, tokens, document offsets; memory-mapped, little-endian, nothing in it is executed.

0     256 bytes  header (see `Header`), which ends in its own sha256
256   tokens     uint8, uint16 or uint32, one document after the other
...   zeros up to a multiple of 8, then (documents + 1) uint64: where each document begins, and the end
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from pathlib import Path

import numpy as np

from sharding.errors import InputError

MAGIC = b"SHRDTOKS"
VERSION = 1
HEADER_BYTES = 256
CHEAP_BYTES = 64 << 20  # payloads up to this size are hashed at every open (about 0.05 s)
_FORMAT = struct.Struct("<8sIIIIQQQ32s32s32s")
_SEAL_AT = HEADER_BYTES - 32
_DTYPES = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}


def token_dtype(vocab: int) -> np.dtype:
    """The narrowest dtype that holds ids 0..vocab."""
    if not 0 < vocab <= 1 << 31:
        raise InputError(f"A vocabulary of {vocab} tokens cannot be stored: need 1..2**31.")
    return _DTYPES[1 if vocab <= 1 << 8 else 2 if vocab <= 1 << 16 else 4]


@dataclasses.dataclass(frozen=True)
class Header:
    """`text_bytes` and `text_sha256` are of the source text: the documents as UTF-8, each ended by one 0 byte."""

    itemsize: int
    vocab: int
    tokens: int
    documents: int
    text_bytes: int
    payload_sha256: str
    offsets_sha256: str
    text_sha256: str

    @property
    def dtype(self) -> np.dtype:
        return _DTYPES[self.itemsize]

    @property
    def payload_bytes(self) -> int:
        return self.tokens * self.itemsize

    @property
    def offsets_at(self) -> int:
        """Byte at which the offsets begin: after the payload, aligned to 8."""
        return HEADER_BYTES + -(-self.payload_bytes // 8) * 8

    @property
    def file_bytes(self) -> int:
        return self.offsets_at + 8 * (self.documents + 1)

    def pack(self) -> bytes:
        """The 256 bytes of the header."""
        digests = (bytes.fromhex(d) for d in (self.payload_sha256, self.offsets_sha256, self.text_sha256))
        numbers = (self.vocab, 0, self.tokens, self.documents, self.text_bytes)
        head = _FORMAT.pack(MAGIC, VERSION, self.itemsize, *numbers, *digests).ljust(_SEAL_AT, b"\0")
        return head + hashlib.sha256(head).digest()


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """An open token file. `tokens` and `offsets` are read-only memory maps: only what is indexed is read."""

    path: Path
    header: Header
    tokens: np.ndarray  # (tokens,) uint8, uint16 or uint32
    offsets: np.ndarray  # (documents + 1,) uint64

    def verify(self) -> None:
        """Hash payload and offsets, whatever their size; InputError when they differ from the header."""
        for what, array, expected in (
            ("tokens", self.tokens, self.header.payload_sha256),
            ("document offsets", self.offsets, self.header.offsets_sha256),
        ):
            if (found := sha256_of(array)) != expected:
                raise InputError(
                    f"Token file {self.path} is corrupt: its {what} hash to sha256 {found[:16]}..., the header "
                    f"says {expected[:16]}.... Delete the folder {self.path.parent} and build it again."
                )


def open_token_file(path: Path) -> TokenFile:
    """Map `path` after checking magic, version, header seal and length; small payloads are hashed as well.

    Raises InputError with path, numbers and what to do for a missing, foreign, truncated or corrupt file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"There is no token file at {path}. Write one with `shardlab tokenize SOURCE --out DIR`."
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _unpack(path, file.read(HEADER_BYTES), size)
    tokens = np.memmap(path, header.dtype, "r", HEADER_BYTES, (header.tokens,))
    offsets = np.memmap(path, "<u8", "r", header.offsets_at, (header.documents + 1,))
    opened = TokenFile(path, header, tokens, offsets)
    if header.payload_bytes <= CHEAP_BYTES:
        opened.verify()
    return opened


def _unpack(path: Path, raw: bytes, size: int) -> Header:
    """The header of a file of `size` bytes that begins with `raw`."""
    again = f"Delete the folder {path.parent} and build it again."
    if raw[:8] != MAGIC:
        raise InputError(
            f"{path} is not a token file: it begins with {raw[:8]!r}, not {MAGIC!r}. "
            "Token files are written by `shardlab tokenize SOURCE --out DIR`."
        )
    if len(raw) < HEADER_BYTES:
        raise InputError(
            f"Token file {path} is truncated: {size} bytes, the header alone has {HEADER_BYTES}. {again}"
        )
    _, version, itemsize, vocab, _, tokens, documents, text_bytes, *digests = _FORMAT.unpack_from(raw)
    if version != VERSION:
        raise InputError(
            f"Token file {path} has format version {version}; this code reads {VERSION}. {again}"
        )
    if hashlib.sha256(raw[:_SEAL_AT]).digest() != raw[_SEAL_AT:] or itemsize not in _DTYPES or not tokens:
        raise InputError(f"The header of token file {path} is corrupt: its checksum does not match. {again}")
    header = Header(itemsize, vocab, tokens, documents, text_bytes, *(d.hex() for d in digests))
    if size != header.file_bytes:
        kind = "truncated" if size < header.file_bytes else "too long"
        raise InputError(
            f"Token file {path} is {kind}: {size} bytes on disk, but {tokens} tokens of {itemsize} bytes and "
            f"{documents} documents make {header.file_bytes}. {again}"
        )
    return header


def sha256_of(array: np.ndarray, block: int = 1 << 24) -> str:
    """sha256 of a flat array's bytes, read in blocks, so that a map larger than memory is no trouble."""
    digest = hashlib.sha256()
    for at in range(0, len(array), block):
        digest.update(np.ascontiguousarray(array[at : at + block]).data)
    return digest.hexdigest()
