"""Writes a token file in one pass: tokens are streamed, the header comes last, a rename makes it visible."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path
from types import TracebackType

import numpy as np

from experiments.data.store.token_file import HEADER_BYTES, Header, token_dtype
from sharding.errors import InputError


class TokenWriter:
    """`with TokenWriter(path, vocab) as writer:` add tokens, end documents; leaving the block writes the file.

    Until then only hidden temporary files exist beside `path`; an exception removes them.
    """

    def __init__(self, path: Path, vocab: int):
        self.path, self.vocab, self.dtype = Path(path), vocab, token_dtype(vocab)
        self.tokens = self.documents = self.text_bytes = 0
        self._payload, self._index, self._text = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        self._temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115 (closed in __exit__)
        self._offsets = open(f"{self._temporary}.offsets", "w+b", buffering=1 << 16)  # noqa: SIM115 (as above)
        self._file.write(bytes(HEADER_BYTES))
        self._add_offset()

    def add(self, ids: np.ndarray, text: bytes) -> None:
        """Append token ids (n,), each below `vocab`, and the bytes of source text that they stand for."""
        if len(ids):
            if (top := int(ids.max())) >= self.vocab:
                raise InputError(
                    f"Token id {top} does not fit the vocabulary of {self.vocab} of {self.path}."
                )
            raw = np.ascontiguousarray(ids, dtype=self.dtype).data
            self._file.write(raw)
            self._payload.update(raw)
            self.tokens += len(ids)
        self._text.update(text)
        self.text_bytes += len(text)

    def end_document(self, separator: int) -> None:
        """Append the separator token, which stands for one 0 byte of text, and note where the next one begins."""
        self.add(np.array([separator]), b"\0")
        self.documents += 1
        self._add_offset()

    @property
    def payload_sha256(self) -> str:
        """sha256 of the tokens added so far, as they lie in the file."""
        return self._payload.hexdigest()

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            self._offsets.close()
            for leftover in (self._temporary, f"{self._temporary}.offsets"):
                Path(leftover).unlink(missing_ok=True)

    def _add_offset(self) -> None:
        raw = np.array([self.tokens], "<u8").tobytes()
        self._offsets.write(raw)
        self._index.update(raw)

    def _finish(self) -> None:
        if not self.tokens:
            raise InputError(f"Nothing to write to {self.path}: the corpus is empty.")
        digests = (h.hexdigest() for h in (self._payload, self._index, self._text))
        header = Header(
            self.dtype.itemsize, self.vocab, self.tokens, self.documents, self.text_bytes, *digests
        )
        self._file.write(bytes(header.offsets_at - HEADER_BYTES - header.payload_bytes))
        self._offsets.seek(0)
        shutil.copyfileobj(self._offsets, self._file, 1 << 20)
        self._file.seek(0)
        self._file.write(header.pack())
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable (POSIX: a rename is on disk once its directory is)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
