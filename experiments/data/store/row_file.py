"""A file of packed rows beside a token file: packed once, mapped afterwards, little-endian, nothing in it is executed.

0     256 bytes  header, which ends in its own sha256; it names the documents' offsets that were packed
256   (rows + 1) uint64 first, (pieces) uint64 starts, (pieces) uint32 lengths: see `packing.Rows`
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import uuid
from pathlib import Path

import numpy as np

from experiments.data.store.packing import Rows, pack
from experiments.data.store.token_file import CHEAP_BYTES, TokenFile, sha256_of
from experiments.data.store.token_writer import sync_folder
from sharding.errors import InputError

MAGIC = b"SHRDROWS"
VERSION = 1
HEADER_BYTES = 256
_FORMAT = struct.Struct("<8sIIQQ32s32s")
_SEAL_AT = HEADER_BYTES - 32


def packed_rows(file: TokenFile, length: int, folder: Path) -> tuple[Rows, str]:
    """The documents of `file` in rows of `length` tokens, packed into a file of `folder` when it is not there yet, and the
    sha256 of these rows.

    Packing is a pure function of the documents' offsets and the length, which the file's name says. Processes that
    arrive together each pack and the last one's file, which is the same, stays. InputError for a folder that cannot be
    written and for a damaged file.
    """
    offsets = file.header.offsets_sha256
    path = Path(folder) / f"{file.path.stem}-{offsets[:16]}-{length}.rows"
    if not path.is_file():
        _write(path, pack(file.offsets, length), length, bytes.fromhex(offsets))
    return _open(path, length, bytes.fromhex(offsets))


def _write(path: Path, rows: Rows, length: int, offsets: bytes) -> None:
    body = rows.first.tobytes() + rows.starts.tobytes() + rows.lengths.tobytes()
    digest = hashlib.sha256(body).digest()
    head = _FORMAT.pack(MAGIC, VERSION, length, len(rows), len(rows.starts), offsets, digest)
    head = head.ljust(_SEAL_AT, b"\0")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            out.write(head + hashlib.sha256(head).digest() + body)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"Cannot write the packed rows {path}: {error.strerror or error}. They take {len(body):,} bytes: check the "
            f"folder's permissions and the free space."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _open(path: Path, length: int, offsets: bytes) -> tuple[Rows, str]:
    """Map `path` after checking seal, size and what was packed; the body is hashed where that is cheap."""
    again = "Delete it: it is packed anew."
    with path.open("rb") as file:
        raw = file.read(HEADER_BYTES)
    if len(raw) < HEADER_BYTES or hashlib.sha256(raw[:_SEAL_AT]).digest() != raw[_SEAL_AT:]:
        raise InputError(
            f"The header of the packed rows {path} is corrupt: its checksum does not match. {again}"
        )
    magic, version, packed, rows, count, of, digest = _FORMAT.unpack_from(raw)
    if (magic, version, packed, of) != (MAGIC, VERSION, length, offsets):
        raise InputError(
            f"The packed rows {path} are of another kind: version {version}, rows of {packed} tokens, documents "
            f"{of.hex()[:16]}...; asked for version {VERSION}, {length} tokens, {offsets.hex()[:16]}.... {again}"
        )
    size, expected = path.stat().st_size, HEADER_BYTES + 8 * (rows + 1) + 12 * count
    if size != expected:
        raise InputError(
            f"The packed rows {path} have {size} bytes, but {rows} rows of {count} pieces make {expected}. {again}"
        )
    body = np.memmap(path, np.uint8, "r", HEADER_BYTES, (expected - HEADER_BYTES,))
    if len(body) <= CHEAP_BYTES and (found := sha256_of(body)) != digest.hex():
        raise InputError(
            f"The packed rows {path} are corrupt: they hash to sha256 {found[:16]}..., the header says "
            f"{digest.hex()[:16]}.... {again}"
        )
    first, starts, lengths = np.split(body, [8 * (rows + 1), 8 * (rows + 1 + count)])
    return Rows(first.view("<u8"), starts.view("<u8"), lengths.view("<u4")), digest.hex()
