"""The quickstart, shrunk until it trains in a second, for tests that need a whole run.

Its text is a package of Python's standard library. Three environment variables reach into its data: SLOW makes every
batch take so many seconds, so that a run can be stopped at a known step, ROWS_LOG names a file for the rows read, and
FACTS_LOG one for the questions what is known of the held-out text.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from experiments import cli
from experiments.records import Record, read

ROOT = Path(__file__).resolve().parent.parent

CONFIG = """
import dataclasses
import json
import os
import time
from dataclasses import replace

from configs.quickstart import config as quickstart
from experiments.config import Checkpoints, Evaluate
from experiments.data.text import Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched(Text):
    def open(self, cache):
        dataset = super().open(cache)
        rows = dataset.rows

        def watched(split, seed, step, batch, start, stop):
            if split == "train":
                time.sleep(float(os.environ.get("SLOW", "0")))
                if log := os.environ.get("ROWS_LOG"):
                    with open(log, "a") as file:
                        file.write(json.dumps([step, start, stop]) + "\\n")
            return rows(split, seed, step, batch, start, stop)

        facts = dataset.heldout_facts

        def asked(rows):
            if log := os.environ.get("FACTS_LOG"):
                with open(log, "a") as file:
                    file.write(f"{rows}\\n")
            return facts(rows)

        dataset.rows, dataset.heldout_facts = watched, asked
        return dataset


def config():
    e = quickstart()
    sizes = dict(layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64, length=32)
    return replace(
        e,
        name="small",
        model=replace(e.model, **sizes),
        data=Watched(path="corpus", length=32),
        optimizer=replace(e.optimizer, peak=1e-2, warmup=2),
        batch=16,
        steps=8,
        log_every=1,
        evaluate=Evaluate(every=4, batches=2),
        checkpoints=Checkpoints(every=4, keep=3),
        sample=replace(e.sample, tokens=4),
    )
"""


def place(folder: Path) -> Path:
    """A working directory with small.py and its corpus; the path of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.py").write_text(CONFIG)
    shutil.copytree(
        Path(json.__file__).parent, folder / "corpus", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder / "small.py"


def shardlab(*words: object) -> int:
    """Run the command in this process, in the working directory it has."""
    return cli.main([str(w) for w in words])


def start(folder: Path, *words: object, **environment: object) -> subprocess.Popen[str]:
    """Start the command in a process of its own, standard output and error in one pipe."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in environment.items()}}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", *map(str, words)],
        cwd=folder,
        env=given,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def until(process: subprocess.Popen[str], text: str) -> str:
    """What a process prints up to a line that contains `text`; an AssertionError when it ends before."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"no {text!r} in what was printed:\n{said}")


def only(folder: Path) -> Path:
    """The one run folder below a folder."""
    (run,) = sorted(folder.glob("*/*-*"))
    return run


def steps(run: Path) -> dict[int, Record]:
    """The step records of a run, by step."""
    return {r.step: r for r in read(run / "records.jsonl") if r.kind == "step" and r.step is not None}


def losses(run: Path) -> dict[int, float]:
    """Step -> training loss as recorded (17 digits: equal numbers are equal bits)."""
    return {step: record.values["loss"] for step, record in steps(run).items()}


def arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, read by tensorstore itself and not by the code under test."""
    import tensorstore

    base = f"file://{run.absolute()}/checkpoints/{step}/state/|ocdbt:"
    store = tensorstore.KvStore.open(base).result()
    names = {key.decode().rpartition("/")[0] for key in store.list().result() if key.endswith(b".zarray")}
    assert names, f"no arrays below {base}"

    def read_one(name):
        return tensorstore.open({"driver": "zarr", "kvstore": f"{base}{name}/"}).result().read()

    return {name: np.asarray(read_one(name).result()) for name in sorted(names)}
