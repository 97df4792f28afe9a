"""The stateless shuffle is a permutation, pinned, and independent of who asks for which part."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.store.shuffle import epoch_order, permute
from sharding.errors import InputError

seeds = st.integers(0, 2**64 + 5)
sizes = st.integers(1, 3000)


@given(n=sizes, seed=seeds, epoch=st.integers(0, 2**40))
def test_each_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@settings(max_examples=40)
@given(n=sizes, seed=seeds, start=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 300), max_size=5))
def test_disjoint_slices_concatenate_to_the_whole(n: int, seed: int, start: int, cuts: list[int]) -> None:
    numbers = np.arange(start, start + 300)
    whole = epoch_order(seed, numbers, n)
    edges = [0, *sorted(cuts), 300]
    parts = [epoch_order(seed, numbers[a:b], n) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), whole)


@given(n=st.integers(100, 3000), processes=st.integers(1, 8), seed=seeds)
def test_the_order_does_not_depend_on_how_processes_share_a_batch(n: int, processes: int, seed: int) -> None:
    batch = 8 * processes
    numbers = 5 * batch + np.arange(batch)
    by_process = [epoch_order(seed, numbers[p::processes], n) for p in range(processes)]
    woven = np.stack(by_process, axis=1).reshape(-1)
    assert np.array_equal(woven, epoch_order(seed, numbers, n))


def test_the_order_is_pinned() -> None:
    """A run's data order is a promise: these numbers may change only together with the promise."""
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == [5, 7, 9, 0, 8, 1, 6, 3, 4, 2]
    assert permute(np.arange(3), 10**12, seed=7, epoch=3).tolist() == [
        513836558662,
        973803016280,
        890217550156,
    ]


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    n = 1000
    orders = [permute(np.arange(n), n, s, e) for s, e in ((0, 0), (0, 1), (1, 0), (1, 2), (2, 1))]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.15  # 5 standard deviations of chance
        for b in orders[:i]:
            assert np.count_nonzero(a == b) < 12  # one is expected


def test_every_place_is_equally_likely() -> None:
    n, draws = 12, 1500
    table = np.array([permute(np.arange(n), n, seed, 0) for seed in range(draws)])
    for position in range(n):
        counts = np.bincount(table[:, position], minlength=n)
        chi2 = float(((counts - draws / n) ** 2 / (draws / n)).sum())
        assert chi2 < 40  # 11 degrees of freedom: above 40 once in 28,000


def test_a_step_of_a_huge_epoch_costs_only_its_rows() -> None:
    rows = epoch_order(3, np.arange(64) + 10**15, 10**17)
    assert len(set(rows.tolist())) == 64
    assert rows.max() > 10**16


@pytest.mark.parametrize(("positions", "n"), [([0], 0), ([5], 5), ([-1], 5)])
def test_positions_outside_the_epoch_are_refused(positions: list[int], n: int) -> None:
    with pytest.raises(InputError):
        permute(np.array(positions), n, 0, 0)
