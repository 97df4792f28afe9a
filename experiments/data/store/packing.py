"""Documents of many lengths into rows of one length, with as little padding as best fit leaves. No files here.

A document longer than a row is cut into pieces of a row's length and a rest; no other document is cut. The pieces are
packed by best fit in order of decreasing length: each goes into the fullest row that has room for it (Johnson et al.
1974; for language models Ding et al. 2024, arXiv:2404.10830).
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, insort
from collections import deque

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which stretches of a token file make up each row.

    Row r holds pieces `first[r] .. first[r + 1]`, in the order of the file, one after the other from its beginning; piece
    p is tokens `starts[p] .. starts[p] + lengths[p]`. Rows are in the order in which their first pieces lie in the file.
    """

    first: np.ndarray  # (rows + 1,) uint64
    starts: np.ndarray  # (pieces,) uint64
    lengths: np.ndarray  # (pieces,) uint32

    def __len__(self) -> int:
        return len(self.first) - 1


def pack(offsets: np.ndarray, length: int) -> Rows:
    """Rows of `length` tokens that hold every token of every document once; `offsets` (documents + 1,) as in a token
    file. A pure function of its arguments; memory and time grow with the documents, not with their tokens.
    """
    starts, lengths = pieces(np.asarray(offsets, np.int64), length)
    row = best_fit(lengths, length)
    by_row = np.lexsort((starts, row))
    starts, lengths, row = starts[by_row], lengths[by_row], row[by_row]
    heads = np.flatnonzero(np.diff(row, prepend=-1))  # the first piece of each row
    counts = np.diff(heads, append=len(row))
    order = np.argsort(starts[heads], kind="stable")
    at = _ranges(heads[order], counts[order])
    first = np.concatenate([[0], np.cumsum(counts[order])])
    return Rows(first.astype("<u8"), starts[at].astype("<u8"), lengths[at].astype("<u4"))


def pieces(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of the documents that `offsets` bound, each cut after every `length` tokens; int64 (pieces,)."""
    sizes = np.diff(offsets)
    counts = -(-sizes // length)
    within = _ranges(np.zeros_like(counts), counts) * length
    return np.repeat(offsets[:-1], counts) + within, np.minimum(np.repeat(sizes, counts) - within, length)


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """Number of the row (int64, of each piece) by best fit of decreasing lengths (each in 1..room); ties by order."""
    row = np.empty(len(lengths), np.int64)
    full = lengths == room
    made = int(full.sum())
    row[full] = np.arange(made)
    rest = np.flatnonzero(~full)
    rest = rest[np.argsort(-lengths[rest], kind="stable")]
    rooms: list[int] = []  # what is left in some open row, ascending, each figure once
    open_rows: dict[int, deque[int]] = {}
    for piece, size in zip(rest.tolist(), lengths[rest].tolist(), strict=True):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            number, left = made, room - size
            made += 1
        else:
            fit = rooms[at]
            number, left = open_rows[fit].popleft(), fit - size
            if not open_rows[fit]:
                del open_rows[fit], rooms[at]
        row[piece] = number
        if left:
            if left not in open_rows:
                open_rows[left] = deque()
                insort(rooms, left)
            open_rows[left].append(number)
    return row


def spread(rows: Rows, indices: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows `indices` (n,) token by token: (source, segments, positions), each int64 (n, length).

    `source` is the token of the file, -1 where a row is padding; `segments` counts a row's pieces from 1 and is 0 in
    padding; `positions` counts from 0 within each piece.
    """
    indices = np.asarray(indices, np.int64)
    first, last = (rows.first[i].astype(np.int64) for i in (indices, indices + 1))
    counts = last - first
    piece = _ranges(first, counts)
    starts, lengths = rows.starts[piece].astype(np.int64), rows.lengths[piece].astype(np.int64)
    of_row = np.repeat(np.arange(len(indices)), counts)
    before = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    begins = before - np.repeat(before[np.cumsum(counts) - counts], counts)  # where in its row a piece begins
    position = _ranges(np.zeros_like(lengths), lengths)
    at = (np.repeat(of_row, lengths), np.repeat(begins, lengths) + position)
    source = np.full((len(indices), length), -1, np.int64)
    segments, positions = np.zeros_like(source), np.zeros_like(source)
    source[at] = np.repeat(starts, lengths) + position
    segments[at] = np.repeat(_ranges(np.ones_like(counts), counts), lengths)
    positions[at] = position
    return source, segments, positions


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ... `count` times, for each pair, one after the other: int64 (sum of counts,)."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
