"""The prefetcher: order, bound, exceptions, prompt end, and an honest account of waiting."""

from __future__ import annotations

import threading
import time

import pytest

from experiments.data.prefetch import Prefetcher
from sharding.errors import InputError


def test_every_step_in_order() -> None:
    with Prefetcher(lambda step: step * step, 3, 40, ahead=4) as batches:
        assert list(batches) == [(step, step * step) for step in range(3, 40)]


def test_an_empty_range_ends_at_once() -> None:
    with Prefetcher(lambda step: step, 5, 5) as batches:
        assert list(batches) == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_than_ahead_batches_are_made_in_advance(ahead: int) -> None:
    made: list[int] = []
    full = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if len(made) == ahead:
            full.set()
        return step

    with Prefetcher(make, 0, 100, ahead=ahead) as batches:
        assert full.wait(10)
        time.sleep(0.05)
        assert made == list(range(ahead))
        next(batches)
        deadline = time.monotonic() + 10
        while len(made) < ahead + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert made == list(range(ahead + 1))


def test_an_exception_is_raised_at_its_own_step() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise InputError("the third batch is bad")
        return step

    seen = []
    with Prefetcher(make, 0, 9, ahead=5) as batches, pytest.raises(InputError, match="third") as caught:
        seen += (batch for _, batch in batches)
    assert seen == [0, 1]
    assert any(entry.name == "make" for entry in caught.traceback)


def test_batches_before_the_exception_are_delivered() -> None:
    with Prefetcher(lambda step: 1 // (3 - step), 0, 9, ahead=9) as batches:
        assert [next(batches)[0] for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ZeroDivisionError):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)


def test_a_stop_iteration_of_the_worker_does_not_pass_for_the_end() -> None:
    with (
        Prefetcher(lambda step: next(iter([])), 0, 9) as batches,
        pytest.raises(RuntimeError, match="step 0 raised StopIteration"),
    ):
        next(batches)


def test_close_ends_the_thread_though_it_waits_for_room() -> None:
    before = set(threading.enumerate())
    batches = Prefetcher(lambda step: step, 0, 10**9, ahead=2)
    next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 1
    assert not set(threading.enumerate()) - before
    batches.close()  # twice does no harm


def test_close_does_not_wait_for_ever_for_a_batch_that_hangs() -> None:
    release = threading.Event()
    batches = Prefetcher(lambda step: release.wait(30), 0, 9)
    began = time.monotonic()
    batches.close(timeout_s=0.05)
    assert time.monotonic() - began < 5
    release.set()


def test_leaving_the_block_by_an_exception_closes() -> None:
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), Prefetcher(lambda step: step, 0, 10**9):
        raise KeyboardInterrupt
    assert not set(threading.enumerate()) - before


def test_waiting_is_counted() -> None:
    def slow(step: int) -> int:
        time.sleep(0.03)
        return step

    with Prefetcher(slow, 0, 4) as batches:
        list(batches)
        assert batches.waits >= 4
        assert batches.waited_s > 0.08


def test_a_fast_worker_is_not_waited_for() -> None:
    with Prefetcher(lambda step: step, 0, 20, ahead=20) as batches:
        time.sleep(0.2)
        list(batches)
        assert batches.waits == 0
        assert batches.waited_s == 0


def test_at_least_one_batch_ahead() -> None:
    with pytest.raises(InputError, match="asked: 0"):
        Prefetcher(lambda step: step, 0, 1, ahead=0)
