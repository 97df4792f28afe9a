"""A seeded shuffle without state: where row p of an epoch lies, computed and not stored.

A keyed Feistel network permutes 0..a*a with a = ceil(sqrt(n)) (the generalized network of Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002, with equal factors); a result outside 0..n is encrypted again until
it falls inside (cycle walking, ibid.), which keeps it a permutation of 0..n. Memory and time are O(rows asked
for), whatever n is. This is mixing for training, not cryptography.
"""

from __future__ import annotations

import math

import numpy as np

from sharding.errors import InputError

ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea, Flood 2014), elementwise on uint64: a bijection with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def round_keys(seed: int, epoch: int) -> np.ndarray:
    """(ROUNDS,) uint64 keys. Seed and epoch are mixed one after the other, so (1, 2) and (2, 1) differ."""
    key = np.array([seed & _MASK], dtype=np.uint64)
    for word in (seed >> 64, epoch):
        key = mix(key + np.uint64(_GOLDEN)) ^ np.uint64(word & _MASK)
    return mix(mix(key) + np.uint64(_GOLDEN) * np.arange(1, ROUNDS + 1, dtype=np.uint64))


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Images (int64, same shape) of `positions` (each in 0..n) under the permutation of 0..n of (seed, epoch)."""
    if not 0 < n < 1 << 62:
        raise InputError(f"Cannot shuffle {n} rows: the count must be positive and below 2**62.")
    out = np.asarray(positions).astype(np.uint64)
    if out.size and (np.min(positions) < 0 or out.max() >= n):
        raise InputError(f"Positions {np.min(positions)}..{out.max()} lie outside an epoch of {n} rows.")
    side, keys = math.isqrt(n - 1) + 1, round_keys(seed, epoch)
    out = _encrypt(out, side, keys)
    while (outside := out >= n).any():
        out[outside] = _encrypt(out[outside], side, keys)
    return out.astype(np.int64)


def epoch_order(seed: int, numbers: np.ndarray, n: int) -> np.ndarray:
    """Row of the dataset (int64) for each global row number r: epoch r // n, position r % n, permuted."""
    numbers = np.asarray(numbers, dtype=np.int64)
    out, epochs = np.empty_like(numbers), numbers // n
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permute(numbers[here] % n, n, seed, int(epoch))
    return out


def _encrypt(x: np.ndarray, side: int, keys: np.ndarray) -> np.ndarray:
    """Eight rounds (left, right) -> (right, left + F(right) mod side); each is invertible, whatever F is."""
    a = np.uint64(side)
    left, right = x // a, x % a
    for key in keys:
        left, right = right, (left + mix(right ^ key) % a) % a
    return left * a + right
