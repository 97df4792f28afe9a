"""Records and events: round trips, torn lines at every byte, resumption, and what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.events import Events, read_events
from experiments.records import (
    Header,
    MissingRecords,
    Record,
    RecordError,
    Records,
    TornLineWarning,
    column,
    installed_versions,
    locate,
    read,
    scan,
    utc_now,
    validate,
)

ROOT = Path(__file__).resolve().parent.parent
HEADER = Header(
    run="synthetic-run",
    config_hash="0123abcd",
    seed=3,
    versions=installed_versions(),
    device={"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1},
    mesh={"data": 2, "fsdp": 4},
    details={"name": "synthetic", "data": {"xz_bits_per_byte": 2.5}},
)
NOW = "2026-01-02T03:04:05.000006Z"
TEXT = st.text().filter(lambda s: s not in ("NaN", "Infinity", "-Infinity"))
LEAF = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT
VALUE = st.recursive(
    LEAF, lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXT, v, max_size=4), max_leaves=8
)
VALUES = st.dictionaries(TEXT, VALUE, min_size=1, max_size=4)
slow_disk = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def same(a: object, b: object) -> bool:
    """Equality where NaN equals NaN and -0.0 differs from 0.0."""
    if isinstance(a, float) and isinstance(b, float):
        return repr(a) == repr(b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def write_steps(path: Path, steps: range, header: Header = HEADER, loss: float = 1.0) -> None:
    with Records(path, header) as records:
        for step in steps:
            records.write("step", "measured", {"loss": loss}, step=step)


@slow_disk
@given(values=VALUES, details=VALUES, step=st.none() | st.integers(0, 2**40))
def test_what_is_written_is_read(tmp_path: Path, values: dict, details: dict, step: int | None) -> None:
    path = tmp_path / f"{os.urandom(8).hex()}.jsonl"
    with Records(path, replace(HEADER, details=details)) as records:
        records.write("bench", "modelled", values, step=step)
    (found,) = read(path)
    assert same(found.values, values)
    assert same(found.details, details)
    assert (found.kind, found.provenance, found.step) == ("bench", "modelled", step)
    assert (found.run, found.config_hash, found.seed) == (HEADER.run, HEADER.config_hash, HEADER.seed)
    assert (found.versions, found.device, found.mesh) == (HEADER.versions, HEADER.device, HEADER.mesh)
    assert path.read_bytes().isascii()


@slow_disk
@given(data=st.data(), values=st.lists(VALUES, min_size=1, max_size=4))
def test_any_truncation_leaves_the_whole_lines(
    tmp_path: Path, data: st.DataObject, values: list[dict]
) -> None:
    path = tmp_path / f"{os.urandom(8).hex()}.jsonl"
    with Records(path, HEADER) as records:
        for step, value in enumerate(values):
            records.write("step", "measured", value, step=step)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    lines = whole[:cut].count(b"\n")
    found = scan(path)
    assert [r.step for r in found.records] == list(range(max(lines - 1, 0)))
    assert all(same(r.values, values[r.step or 0]) for r in found.records)
    assert bool(found.torn) == (not whole[:cut].endswith(b"\n") and cut > 0)

    with Records(path, HEADER) as records:
        assert records.torn == found.torn
        records.write("step", "measured", {"again": 1}, step=len(found.records))
    after = read(path)
    assert [r.step for r in after] == list(range(len(found.records) + 1))
    assert all(same(r.values, values[r.step or 0]) for r in after[:-1])


def test_a_torn_line_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_steps(path, range(3))
    path.write_bytes(path.read_bytes()[:-1])  # whole JSON, but its newline is missing
    with pytest.warns(TornLineWarning, match="torn line"):
        found = read(path)
    assert [r.step for r in found] == [0, 1]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_steps(path, range(3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2][:20] + b"\n", *lines[3:]]))
    with pytest.raises(RecordError, match="line 3 is not JSON"):
        read(path)
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(RecordError, match="line 1 speaks of run 'synthetic-run', but no header"):
        read(path)
    path.write_bytes(lines[0].replace(b'"schema":1', b'"schema":2'))
    with pytest.raises(RecordError, match="line 1 is of schema 2"):
        read(path)
    path.write_bytes(lines[0] + b'{"kind":"step","run":"synthetic-run"}\n')
    with pytest.raises(RecordError, match="line 2 is JSON but no record"):
        read(path)
    path.write_bytes(lines[0] + b"[1]\n")
    with pytest.raises(RecordError, match="line 2 is JSON but no record"):
        read(path)


def test_a_killed_writer_loses_nothing_it_had_written(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    script = (
        "import sys; from tests.test_records import HEADER, Records\n"
        "records = Records(sys.argv[1], HEADER)\n"
        "for step in range(10**9):\n"
        "    records.write('step', 'measured', {'loss': 1.0}, step=step)\n"
        "    print(step, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        said += [int(line) for line in process.stdout if line.endswith(b"\n")]
    steps = [r.step for r in scan(path).records]
    assert steps[: len(said)] == said
    with Records(path, HEADER) as records:  # and it can go on
        records.write("step", "measured", {"loss": 1.0}, step=len(steps))
    assert len(read(path)) == len(steps) + 1


def test_resumption_supersedes_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_steps(path, range(0, 60, 10), loss=1.0)
    write_steps(
        path, range(30, 50, 10), loss=2.0
    )  # taken up again at step 20, ended before it reached step 50
    assert [(r.step, r.values["loss"]) for r in read(path)] == [
        (0, 1.0),
        (10, 1.0),
        (20, 1.0),
        (30, 2.0),
        (40, 2.0),
    ]
    Records(path, HEADER).close()  # opened again but nothing written: what stands still holds
    assert [r.step for r in read(path)] == [0, 10, 20, 30, 40]
    Records(
        path, replace(HEADER, resumed_step=10)
    ).close()  # the header says where, even before the first new step
    assert [r.step for r in read(path)] == [0, 10]


@pytest.mark.parametrize(
    "files", [("run/records.jsonl", "copy/records.jsonl"), ("all/long.jsonl", "all/branch.jsonl")]
)
def test_a_copy_that_went_on_is_not_read_with_its_original(files: tuple[str, str], tmp_path: Path) -> None:
    """One run in two folders would be drawn as one curve, of which no folder holds the numbers."""
    first, copy = (tmp_path / name for name in files)
    for path in (first, copy):
        path.parent.mkdir(exist_ok=True)
    write_steps(first, range(0, 40, 10), loss=1.0)
    copy.write_bytes(first.read_bytes())
    assert read([first, copy]) == read(first)  # a copy alone says nothing new
    write_steps(copy, range(30, 50, 10), loss=2.0)
    for paths in ([first, copy], [copy, first]):
        with pytest.raises(RecordError, match="both hold step 30 of the run") as error:
            read(paths)
        assert str(first) in str(error.value)
        assert str(copy) in str(error.value)


def test_resumption_on_another_mesh_is_told_per_record(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_steps(path, range(2))
    write_steps(path, range(2, 4), replace(HEADER, mesh={"tensor": 8}, config_hash="other"))
    assert [tuple(r.mesh) for r in read(path)] == [
        ("data", "fsdp"),
        ("data", "fsdp"),
        ("tensor",),
        ("tensor",),
    ]
    with pytest.raises(RecordError, match="seed 3, and was opened to go on with seed 4"):
        Records(path, replace(HEADER, seed=4))


def test_newest_is_per_kind_and_provenance_and_stepless_records_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with Records(path, HEADER) as records:
        records.write("step", "measured", {"seconds": 1.0}, step=1)
        records.write("step", "modelled", {"seconds": 2.0}, step=1)
        records.write("eval", "measured", {"loss": 3.0}, step=1)
        records.write("step", "measured", {"seconds": 4.0}, step=1)
        for _ in range(2):
            records.write("sweep", "measured", {"seconds": 5.0})
    assert [r.values for r in read(path)] == [
        {"seconds": 2.0}, {"loss": 3.0}, {"seconds": 4.0}, {"seconds": 5.0}, {"seconds": 5.0},
    ]  # fmt: skip
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    assert len(read([path, copy, path])) == 5


def test_runs_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    write_steps(path, range(4))
    write_steps(path, range(2), replace(HEADER, run="second", seed=9))
    assert [(r.run, r.seed, r.step) for r in read(path)][3:5] == [("synthetic-run", 3, 3), ("second", 9, 0)]


def test_threads_do_not_interleave(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with Records(path, HEADER) as records:
        threads = [
            threading.Thread(
                target=lambda n=n: [records.write("bench", "measured", {"n": n}) for _ in range(50)]
            )
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(r.values["n"] for r in scan(path).records) == sorted([0, 1, 2, 3] * 50)


def test_numpy_numbers_become_plain(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    values = {
        "a": np.float32(0.5),
        "b": np.arange(3),
        "c": np.float64("nan"),
        "d": np.bool_(True),
        "e": (1, 2),
    }
    with Records(path, HEADER) as records:
        records.write("bench", "measured", values, step=np.int64(7))
    line = json.loads(path.read_text().splitlines()[1])
    assert line["values"] == {"a": 0.5, "b": [0, 1, 2], "c": "NaN", "d": True, "e": [1, 2]}
    (found,) = read(path)
    assert math.isnan(found.values["c"])
    assert found.step == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "run"}, "the header's"),
        ({"kind": ""}, "kind is a word"),
        ({"provenance": "guessed"}, "'guessed'; it is one of measured, compiled, modelled"),
        ({"step": -1}, "whole number from 0"),
        ({"step": 1.5}, "whole number from 0"),
        ({"values": {}}, "no values"),
        ({"values": {1: 2}}, "keys are strings"),
        ({"values": {"x": {"y": object()}}}, r"\['x'\]\['y'\] is a object"),
        ({"values": {"x": "NaN"}}, "stands for a float"),
        ({"time": "yesterday"}, "time 'yesterday'"),
        ({"header": replace(HEADER, run="")}, "run = ''"),
        ({"header": replace(HEADER, config_hash="")}, "config_hash = ''"),
        ({"header": replace(HEADER, seed=1.0)}, "the seed 1.0"),
        (
            {"header": replace(HEADER, versions={"python": "3"})},
            "lacks the version of jax, flax, optax, orbax, numpy",
        ),
        ({"header": replace(HEADER, device={"platform": "cpu"})}, "it needs platform and kind"),
        ({"header": replace(HEADER, mesh={"data": 0})}, "axis names to sizes"),
        ({"header": replace(HEADER, resumed_step=-2)}, "resumed_step = -2"),
        ({"header": replace(HEADER, time="")}, "time ''"),
    ],
)
def test_what_is_incomplete_is_refused(change: dict, message: str) -> None:
    good = Record("step", "measured", {"loss": 1.0}, replace(HEADER, time=NOW), step=1, time=utc_now())
    validate(good)
    with pytest.raises(RecordError, match=message):
        validate(replace(good, **change))


def test_a_column_of_mixed_provenance_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with Records(path, HEADER) as records:
        records.write("step", "measured", {"seconds": 1.0, "note": "x"}, step=1)
        records.write("step", "measured", {"seconds": math.inf}, step=2)
        records.write("step", "modelled", {"seconds": 2.0}, step=1)
    found = read(path)
    with pytest.raises(RecordError, match=r"mixes records of different provenance: measured .* modelled"):
        column(found, "seconds")
    assert column(found[:2], "seconds").numbers == [1.0, math.inf]
    assert column(found[2:], "seconds").provenance == "modelled"
    with pytest.raises(RecordError, match=r"needs a number from every record.* holds 'x'"):
        column(found[:1], "note")
    with pytest.raises(RecordError, match="holds None; its values are note, seconds"):
        column(found[:1], "loss")
    with pytest.raises(MissingRecords):
        column([], "seconds")


def test_locate(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_steps(tmp_path / "runs" / name / "records.jsonl", range(1))
    write_steps(tmp_path / "loose.jsonl", range(1))
    a, b, loose = (
        tmp_path / "runs/a/records.jsonl",
        tmp_path / "runs/b/records.jsonl",
        tmp_path / "loose.jsonl",
    )
    assert locate([a, tmp_path / "runs" / "a"]) == [a]
    assert locate([tmp_path / "runs"]) == [a, b] == locate([f"{tmp_path}/runs/*"])
    assert locate([f"{tmp_path}/*.jsonl"]) == [loose] == locate([tmp_path])
    for absent in (tmp_path / "no", f"{tmp_path}/no*", f"{tmp_path}/runs/a/*.json"):
        with pytest.raises(MissingRecords, match="no records at"):
            locate([absent])


def test_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Events(path, HEADER) as events:
        events.write("start", command="synthetic")
        with events.timed("save_end", step=20):
            pass
        with pytest.raises(OSError, match="full"), events.timed("save_end", step=40):
            raise OSError("full")
    with Events(path, replace(HEADER, resumed_step=10)) as events:  # no event is superseded
        events.write("restore", 1.5, step=10)
        with pytest.raises(RecordError, match="needs a name"):
            events.write("")
    found = read_events(path)
    assert [e.name for e in found] == ["start", "save_end", "save_end", "restore"]
    assert found[0].seconds is None
    assert found[0].details == {"command": "synthetic"}
    assert found[1].seconds is not None
    assert found[1].seconds >= 0
    assert found[1].details == {"step": 20}
    assert found[2].details == {"step": 40, "error": "OSError('full')"}
    assert found[3].seconds == 1.5
    assert found[3].header.run == HEADER.run


def test_only_the_standard_library_is_imported() -> None:
    script = (
        "import sys; before = set(sys.modules); import experiments.records, experiments.events\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names) - "
        "{'experiments'}\n"
        "assert not new, new"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
