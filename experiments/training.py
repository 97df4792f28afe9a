"""One run, from its config to its folder: devices, data, step, state, loop, and what is left behind."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments import assemble, devices
from experiments.config import Experiment, config_hash, to_json
from experiments.events import Events
from experiments.record_schema import Header, installed_versions
from experiments.records import Records
from experiments.run_config import Origin, differences, write_run_config
from sharding.errors import InputError

FREE = (
    "name",
    "mesh",
    "rules",
    "partitioner",
    "devices",
    "accumulate",
    "log_every",
    "evaluate",
    "checkpoints",
    "sample",
)
"""Parts of a config that may differ when a run goes on: they change how, not what, is trained."""


@dataclass(frozen=True)
class Result:
    """What a run left: its folder, the updates made, why it stopped early ("" if it did not), last losses, seconds."""

    folder: str
    step: int
    stopped: str
    loss: float | None
    heldout_loss: float | None
    heldout_bits_per_byte: float | None
    step_seconds_median: float | None
    seconds: float
    sample: str


def train(
    experiment: Experiment, origin: Origin, resume: str, runs: Path, processes: devices.Processes
) -> Result:
    """Run an experiment into a new folder of `runs`, or go on with one (`resume`: "never", "latest" or a folder).

    Raises InputError for whatever cannot be served; nothing of an existing run is lost then.
    """
    began = time.perf_counter()
    folder, resumed = _folder(experiment, resume, runs)
    found = devices.start(experiment.devices, processes)
    devices.cache_compilations(str(assemble.CACHE / "jax"))
    import jax

    from experiments.checkpoints import CheckpointStore
    from experiments.loop import run
    from experiments.progress import Progress

    step = assemble.train_step(experiment, found)
    dataset = experiment.data.open(assemble.CACHE / "data")
    assemble.check_data(experiment, dataset, step)
    first = jax.process_index() == 0
    folder = _same_folder(folder, jax.process_count())
    meta = {
        "config_hash": config_hash(experiment),
        "experiment": to_json(experiment),
        "seed": experiment.seed,
        "corpus": dataset.facts.get("sha256"),
        "versions": installed_versions(),
    }
    with (
        Progress(experiment.steps, shows=first) as show,
        CheckpointStore(folder / "checkpoints", experiment.checkpoints.keep) as store,
    ):
        for note in store.notes:
            show.line(note, "yellow")
        state, start = _state(experiment, step, store, meta, resumed, show)
        if first and not resumed:
            write_run_config(folder, origin, experiment)
            command = shlex.join(["shardlab", "train", str(origin.path), *origin.overrides])
            (folder / "command.txt").write_text(command + "\n")
        header = _header(experiment, folder, found, step, dataset, start if resumed else None)
        names = (
            ("records.jsonl", "events.jsonl")
            if first
            else tuple(f"process{jax.process_index()}-{n}.jsonl" for n in ("records", "events"))
        )
        with Records(folder / names[0], header) as records, Events(folder / names[1], header) as events:
            report = _reporter(experiment, step, records, events, show, found)
            _introduce(experiment, found, folder, dataset, show, first)
            events.write("start", time.perf_counter() - began, step=start)
            report.start(start)
            outcome = run(experiment, step, dataset, state, start, store, meta, report)
            text = ""
            if outcome.stopped:
                events.write("stopped", step=outcome.step, reason=outcome.stopped)
            elif experiment.sample.tokens:
                text = _write_sample(
                    experiment, step, outcome.state["params"], dataset, show, folder, first, events
                )
            events.write("end", time.perf_counter() - began, step=outcome.step)
        result = _result(folder, outcome, time.perf_counter() - began, text)
        if first:
            _leave(folder, experiment, dataset, result, show)
    return result


def _folder(experiment: Experiment, resume: str, runs: Path) -> tuple[Path, bool]:
    """The run's folder and whether it is one to go on with."""
    if resume != "never":
        return (_latest(experiment, runs) if resume == "latest" else Path(resume)), True
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = runs / experiment.name / f"{stamp}-{config_hash(experiment)[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"The run folder {folder} cannot be written ({error.strerror}). Make it writable, or give another place with --runs."
        ) from None
    return folder, False


def _latest(experiment: Experiment, runs: Path) -> Path:
    """The newest run of this name that has a checkpoint."""
    found = [
        f for f in sorted((runs / experiment.name).glob("*-*")) if any((f / "checkpoints").glob("[0-9]*"))
    ]
    if not found:
        raise InputError(
            f"There is no run to resume: {runs / experiment.name} has no run with a checkpoint. Train first, or give the "
            f"run's folder with --resume FOLDER."
        )
    return found[-1]


def _same_folder(folder: Path, processes: int) -> Path:
    """Several processes agree on the folder that process 0 chose."""
    if processes == 1:
        return folder
    import numpy as np
    from jax.experimental import multihost_utils

    told = np.zeros(1024, np.uint8)
    raw = os.fsencode(folder.absolute())[:1024]
    told[: len(raw)] = np.frombuffer(raw, np.uint8)
    agreed = Path(os.fsdecode(bytes(np.asarray(multihost_utils.broadcast_one_to_all(told))).rstrip(b"\0")))
    if agreed != folder.absolute() and not any(folder.iterdir()):
        folder.rmdir()
    return agreed


def _state(
    experiment: Experiment, step: Any, store: Any, meta: dict[str, Any], resumed: bool, show: Any
) -> tuple[Any, int]:
    """The state to start from and the updates it has had."""
    if not resumed:
        return step.init(experiment.seed), 0
    newest = store.latest()
    if newest is None:
        raise InputError(
            f"{store.folder} has no complete checkpoint to resume from. Start a new run without --resume."
        )
    was = store.meta(newest)
    if "experiment" in was:
        changed = [
            d
            for d in differences(was["experiment"], meta["experiment"])
            if d.split(" ")[0].split(".")[0].rstrip(":") not in FREE
        ]
        if changed:
            raise InputError(
                f"The run in {store.folder.parent} was made by another config: {'; '.join(changed)}. Only what does not "
                f"change the numbers trained may differ on resuming ({', '.join(FREE)}). Undo the change or start a new run."
            )
    if was.get("corpus") != meta["corpus"]:
        raise InputError(
            f"The run in {store.folder.parent} was trained on a corpus with checksum {was.get('corpus')}, but the data now has "
            f"{meta['corpus']}. Bring the old files back, or start a new run."
        )
    state, _ = store.restore(newest, step.abstract_state())
    if newest >= experiment.steps:
        raise InputError(
            f"The run in {store.folder.parent} is finished: {newest} of {experiment.steps} steps are done."
        )
    show.line(f"resumed from step {newest} of {store.folder}")
    return state, newest


def _header(
    experiment: Experiment, folder: Path, found: Sequence[Any], step: Any, dataset: Any, resumed: int | None
) -> Header:
    import jax

    return Header(
        run=folder.name,
        config_hash=config_hash(experiment),
        seed=experiment.seed,
        versions=installed_versions(),
        device={
            "platform": found[0].platform,
            "kind": f"pretend {found[0].platform}"
            if experiment.devices.kind == "pretend"
            else found[0].device_kind,
            "count": len(found),
            "processes": jax.process_count(),
        },
        mesh={a: n for a, n in step.split.layouts.sizes.items() if n > 1},
        details={
            "name": experiment.name,
            "rules": repr(experiment.rules),
            "partitioner": repr(experiment.partitioner),
            "parameters": sum(s.size for s in step.tree.values()),
            "data": dict(dataset.facts),
            "cores": os.cpu_count(),
        },
        resumed_step=resumed,
    )


def _reporter(
    experiment: Experiment, step: Any, records: Records, events: Events, show: Any, found: Sequence[Any]
) -> Any:
    from experiments.explanation import forward_flops
    from experiments.peaks import peak
    from experiments.reporting import Reporter, Work

    size = 1
    for n in step.abstract_batch(experiment.batch)["labels"].shape:
        size *= n
    dtype = getattr(experiment.model, "dtype", "float32")
    rate = None if experiment.devices.kind == "pretend" else peak(found[0].device_kind, dtype)
    work = Work(size, 3 * forward_flops(step, experiment.batch), None if rate is None else rate * len(found))
    schedule: Any = experiment.optimizer
    return Reporter(experiment, work, records, events, show, schedule.schedule(experiment.steps), found[0])


def _introduce(
    experiment: Experiment, found: Sequence[Any], folder: Path, dataset: Any, show: Any, first: bool
) -> None:
    if not first:
        return
    from experiments.explanation import explain
    from experiments.tables import human, print_explanation

    print_explanation(
        explain(replace(experiment, devices=replace(experiment.devices, count=len(found))), len(found)),
        full=False,
    )
    facts = dataset.facts
    sizes = ", ".join(
        f"{k.replace('_', ' ')} {human(v, 'B' if 'bytes' in k else '', 1000)}"
        for k, v in facts.items()
        if k in ("train_bytes", "heldout_bytes", "train_tokens")
    )
    show.line(f"data {facts.get('name')}: {sizes or f'{dataset.train_rows} rows'}; run folder {folder}")


def _write_sample(
    experiment: Experiment,
    step: Any,
    params: Any,
    dataset: Any,
    show: Any,
    folder: Path,
    first: bool,
    events: Events,
) -> str:
    from experiments.evaluate import sample

    with events.timed("sample"):
        length = step.abstract_batch(experiment.batch)["tokens"].shape[1]
        text = sample(step, params, dataset, experiment.sample, experiment.batch, length, experiment.seed)
    if first:
        show.line("sample:", "bold")
        show.line(text)
        (folder / "sample.txt").write_text(text)
    return text


def _result(folder: Path, outcome: Any, seconds: float, text: str) -> Result:
    from statistics import median

    from experiments.records import read

    mine = folder / "records.jsonl"
    records = read(mine) if mine.exists() else []
    steps = [r for r in records if r.kind == "step"]
    evals = [r for r in records if r.kind == "eval"]
    times = [r.values["step_seconds"] for r in steps if r.values.get("step_seconds")]
    last = evals[-1].values if evals else {}
    return Result(
        folder=str(folder),
        step=outcome.step,
        stopped=outcome.stopped,
        loss=steps[-1].values["loss"] if steps else None,
        heldout_loss=last.get("loss"),
        heldout_bits_per_byte=last.get("bits_per_byte"),
        step_seconds_median=median(times) if times else None,
        seconds=seconds,
        sample=text,
    )


def _leave(folder: Path, experiment: Experiment, dataset: Any, result: Result, show: Any) -> None:
    """The pictures and the last lines of a run."""
    from experiments.report import write_report

    (folder / "result.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
    show.line(f"report {write_report(folder, experiment, dict(dataset.facts), result)}")
    facts = dataset.facts
    if result.heldout_bits_per_byte is not None and facts.get("unigram_bits_per_byte"):
        show.line(
            f"held-out text: {result.heldout_bits_per_byte:.3f} bits/byte by the model, "
            f"{facts['unigram_bits_per_byte']:.3f} by its bytes' frequencies, {facts['xz_bits_per_byte']:.3f} by xz"
        )
    if result.stopped:
        show.line(
            f"stopped by {result.stopped} after step {result.step}, saved. Go on with: "
            f"shardlab train {folder / 'config.py'} --resume {folder}",
            "bold",
        )
