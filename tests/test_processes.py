"""Several processes over gloo: the same numbers as one process, each reads its own rows, one of them speaks."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest

from experiments.records import read
from tests.small import arrays, losses, only, start

STEPS, BATCH = 8, 16


def meeting_place(processes: int) -> tuple[object, ...]:
    """Flags that name a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ("--processes.coordinator", f"127.0.0.1:{port}", "--processes.count", processes)


def launch(home: Path, name: str, processes: int, *words: object) -> tuple[Path, list[str]]:
    """Train with so many processes into runs `name`; the run folder and what each printed."""
    meeting = meeting_place(processes) if processes > 1 else ()
    running = [
        start(
            home, "train", "small.py", "--runs", name, *words, *meeting, *(("--processes.index", i) if meeting else ()),
            ROWS_LOG=home / f"{name}-rows{i}", FACTS_LOG=home / f"{name}-facts{i}",
        )
        for i in range(processes)
    ]  # fmt: skip
    said = []
    try:
        for process in running:
            said.append(process.communicate(timeout=120)[0])
    finally:
        for process in running:
            process.kill()
    assert [p.returncode for p in running] == [0] * processes, "\n\n".join(said)
    return only(home / name), said


def rows(home: Path, name: str, process: int) -> list[tuple[int, int, int]]:
    """(step, start, stop) of every training read of a process."""
    return [tuple(json.loads(line)) for line in (home / f"{name}-rows{process}").read_text().splitlines()]


MESH = ("--rules", "data | fsdp", "--mesh.tensor", 1)
TWO = (*MESH, "--devices.count", 2, "--mesh.data", 1, "--mesh.fsdp", 2)
FOUR = (*MESH, "--devices.count", 4, "--mesh.data", 2, "--mesh.fsdp", 2)


@pytest.fixture(scope="module")
def pair(home: Path) -> tuple[Path, Path, list[str]]:
    """One process with two devices, and two processes with one each."""
    alone, _ = launch(home, "alone", 1, *TWO)
    both, said = launch(home, "both", 2, *TWO)
    return alone, both, said


def test_two_processes_of_one_device_are_one_process_of_two_bit_for_bit(pair: tuple[Path, Path, list[str]]):
    alone, both, _ = pair
    assert losses(both) == losses(alone)
    assert len(losses(both)) == STEPS
    there, here = arrays(alone, STEPS), arrays(both, STEPS)
    assert list(there) == list(here)
    for name, array in there.items():
        np.testing.assert_array_equal(here[name], array, err_msg=name)


def test_each_process_reads_its_own_rows_only(pair: tuple[Path, Path, list[str]], home: Path):
    half = BATCH // 2
    for process in (0, 1):
        read_rows = rows(home, "both", process)
        assert read_rows == [(step, process * half, (process + 1) * half) for step in range(STEPS)]
    together = {(step, row) for step, first, last in rows(home, "alone", 0) for row in range(first, last)}
    assert together == {(step, row) for step in range(STEPS) for row in range(BATCH)}


def test_only_process_0_speaks_and_their_records_do_not_collide(pair: tuple[Path, Path, list[str]]):
    _, both, said = pair
    assert "step 8/8" in said[0]
    assert "sample:" in said[0]
    quiet = [
        line
        for line in said[1].splitlines()
        if line.startswith(("step", "held", "data", "report", "run folder"))
    ]
    assert quiet == []
    assert (both / "config.py").is_file()
    assert [p.name for p in both.parent.iterdir()] == [both.name], "one folder for both"
    mine, theirs = read(both / "records.jsonl"), read(both / "process1-records.jsonl")
    assert {r.header.device["processes"] for r in mine} == {2}
    assert [r.values["loss"] for r in mine if r.kind == "step"] == [
        r.values["loss"] for r in theirs if r.kind == "step"
    ]


def test_one_process_alone_measures_the_held_out_text_and_tells_the_others(
    pair: tuple[Path, Path, list[str]], home: Path
):
    alone, both, _ = pair
    assert [(home / f"both-facts{i}").exists() for i in (0, 1)] == [True, False]
    (one,) = {json.dumps(r.header.details["evaluated"]) for r in read(alone / "records.jsonl")}
    assert "xz_bits_per_byte" in one
    for process in ("", "process1-"):
        told = read(both / f"{process}records.jsonl")
        assert {json.dumps(r.header.details["evaluated"]) for r in told} == {one}
        assert all("bits_per_byte" in r.values for r in told if r.kind == "eval")


@pytest.mark.slow
def test_two_processes_of_two_devices_agree_with_one_of_four_to_rounding(home: Path):
    alone, _ = launch(home, "alone4", 1, *FOUR, "--sample.tokens", 0)
    both, _ = launch(home, "both4", 2, *FOUR, "--sample.tokens", 0)
    there, here = losses(alone), losses(both)
    assert list(here) == list(there)
    np.testing.assert_allclose(list(here.values()), list(there.values()), rtol=2e-5)


@pytest.mark.parametrize(
    "faulty", [0, pytest.param(1, marks=pytest.mark.slow)]
)  # 1: gloo gives up after 30 s
def test_when_one_process_cannot_go_on_none_waits_for_it(home: Path, faulty: int):
    """The data of one process are not there: it says so and leaves, and the others do not hang in a collective."""
    meeting = (*TWO, "--runs", f"faulty{faulty}", *meeting_place(2), "--processes.index")
    given = {faulty: ("--data.path", "gone")}
    running = [start(home, "train", "small.py", *meeting, i, *given.get(i, ())) for i in (0, 1)]
    try:
        said = [process.communicate(timeout=60)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert running[faulty].returncode == 2
    assert "shardlab: There is no text at 'gone'" in said[faulty]
    assert running[1 - faulty].returncode != 0
