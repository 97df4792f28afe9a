"""One run, from its config to its folder: devices, data, step, state, loop, and what is left behind."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from experiments import assemble, devices, run_folder
from experiments.config import Experiment, config_hash, to_json
from experiments.data.contract import Dataset
from experiments.events import Events
from experiments.json_file import write_json
from experiments.record_schema import Header, installed_versions
from experiments.records import Records, read
from experiments.run_config import Origin, write_run_config
from sharding.errors import InputError

if TYPE_CHECKING:
    from experiments.checkpoints import CheckpointStore
    from experiments.explanation import Explanation
    from experiments.loop import Outcome
    from experiments.progress import Progress
    from sharding.step import TrainStep


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


@dataclass(frozen=True)
class Run:
    """A run that was checked and can begin: everything but its folder and its state."""

    experiment: Experiment
    origin: Origin
    devices: Sequence[Any]
    step: TrainStep
    dataset: Dataset
    text: Mapping[str, Any]  # what is known without a model of the text that is evaluated
    told: Explanation
    process: int
    began: float

    @property
    def first(self) -> bool:
        """Whether this is process 0, which prints and writes for all."""
        return self.process == 0

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of the run."""
        return {
            "config_hash": config_hash(self.experiment),
            "experiment": to_json(self.experiment),
            "seed": self.experiment.seed,
            "corpus": self.dataset.facts.get("sha256"),
            "data": {k: v for k, v in self.dataset.facts.items() if k in run_folder.IDENTITY},
            "versions": installed_versions(),
        }


def train(
    experiment: Experiment, origin: Origin, resume: str, runs: Path, processes: devices.Processes
) -> Result:
    """Run an experiment into a new folder of `runs`, or go on with one (`resume`: "never", "latest" or a folder).

    Raises InputError for whatever cannot be served: no folder is left by a run that could not begin, and nothing of an
    existing run is lost.
    """
    began = time.perf_counter()
    folder = run_folder.to_resume(experiment, resume, runs)
    if folder is None:
        run_folder.check_writable(runs)
    with devices.together(processes):
        run = _checked(experiment, origin, processes, began)
        if folder is None:
            place = run_folder.new(experiment, runs, makes=run.first)
        else:
            place = contextlib.nullcontext(run_folder.agreed(folder))
        from experiments.progress import Progress

        with place as folder, Progress(experiment.steps, shows=run.first) as show:
            return _run(run, folder, resume != "never", show)


def _checked(experiment: Experiment, origin: Origin, processes: devices.Processes, began: float) -> Run:
    """Start the backend and find everything that a run needs; InputError for all that does not fit together."""
    if experiment.devices.kind == "pretend":  # before they are started, however many they are
        experiment.mesh.resolve(experiment.devices.count)
    found = devices.start(experiment.devices, processes)
    devices.cache_compilations(str(assemble.CACHE / "jax"))
    import jax

    from experiments.evaluate import check_sample, evaluated
    from experiments.explanation import explain_step

    step = assemble.train_step(experiment, found)
    dataset = experiment.data.open(assemble.CACHE / "data")
    assemble.check_data(experiment, dataset, step)
    check_sample(step, dataset, experiment.sample)
    text = evaluated(dataset, experiment.batch, experiment.evaluate.batches)
    told = explain_step(experiment, step)
    return Run(experiment, origin, found, step, dataset, text, told, jax.process_index(), began)


def _run(run: Run, folder: Path, resumed: bool, show: Progress) -> Result:
    from experiments import loop
    from experiments.checkpoints import CheckpointStore

    prefix = "" if run.first else f"process{run.process}-"
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(CheckpointStore(folder / "checkpoints", run.experiment.checkpoints.keep))
        for note in store.notes:
            show.line(note, "yellow")
        for finding in run.told.findings:  # before anything is compiled: now it costs least to stop
            show.line(f"{finding.kind}: {finding.text()}", "red" if finding.severity == "error" else "yellow")
        state, start = _state(run, store, resumed)
        if run.first:
            _describe(run, folder, resumed)
        header = _header(run, folder, start if resumed else None)
        records = stack.enter_context(Records(folder / f"{prefix}records.jsonl", header))
        events = stack.enter_context(Events(folder / f"{prefix}events.jsonl", header))
        if run.first:
            _introduce(run, folder, show)
        if resumed:
            show.line(f"resumed from step {start} of {store.folder}")
        events.write("start", time.perf_counter() - run.began, step=start)
        report = _reporter(run, records, events, show)
        report.start(start)
        outcome = loop.run(run.experiment, run.step, run.dataset, state, start, store, run.meta(), report)
        text = ""
        if outcome.stopped:
            events.write("stopped", step=outcome.step, reason=outcome.stopped)
        elif run.experiment.sample.tokens:
            text = _write_sample(run, outcome.state["params"], folder, events, show)
        events.write("end", time.perf_counter() - run.began, step=outcome.step)
    result = _result(run, records.path, folder, outcome, text)
    if run.first:
        _leave(run, folder, result, show)
    return result


def _state(run: Run, store: CheckpointStore, resumed: bool) -> tuple[Any, int]:
    """The state to start from and the updates it has had."""
    if not resumed:
        return run.step.init(run.experiment.seed), 0
    newest = store.latest()
    if newest is None:
        raise InputError(f"{store.folder} has no complete checkpoint. Start a new run without --resume.")
    run_folder.check_same(store.folder.parent, store.meta(newest), run.meta())
    if newest >= run.experiment.steps:
        raise InputError(
            f"The run in {store.folder.parent} is finished: {newest} of {run.experiment.steps} steps are done. There "
            f"is nothing to resume; start a new run without --resume."
        )
    return store.restore(newest, run.step.abstract_state())[0], newest


def _describe(run: Run, folder: Path, resumed: bool) -> None:
    """The config that can be run again, and the commands by which the run was started and taken up, as typed."""
    if not resumed:
        write_run_config(folder, run.origin, run.experiment)
    with open(folder / "command.txt", "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(run.origin.command("train") + "\n")


def _header(run: Run, folder: Path, resumed: int | None) -> Header:
    import jax

    device = run.devices[0]
    pretend = run.experiment.devices.kind == "pretend"
    return Header(
        run=run_folder.run_id(folder),
        config_hash=config_hash(run.experiment),
        seed=run.experiment.seed,
        versions=installed_versions(),
        device={
            "platform": device.platform,
            "kind": f"pretend {device.platform}" if pretend else device.device_kind,
            "count": len(run.devices),
            "processes": jax.process_count(),
        },
        mesh=run.told.mesh,
        details={
            "name": run.experiment.name,
            "rules": run.told.rules,
            "partitioner": run.told.partitioner,
            "parameters": run.told.parameters,
            "bytes_per_device": run.told.bytes_per_device,
            "data": dict(run.dataset.facts),
            "evaluated": dict(run.text),
            "cores": os.cpu_count(),
        },
        resumed_step=resumed,
    )


def _reporter(run: Run, records: Records, events: Events, show: Progress) -> Any:
    from experiments.evaluate import unit
    from experiments.peaks import peak
    from experiments.reporting import Reporter, Work

    e = run.experiment
    dtype = getattr(e.model, "dtype", "float32")
    rate = None if e.devices.kind == "pretend" else peak(run.devices[0].device_kind, dtype)
    together = None if rate is None else rate * len(run.devices)
    work = Work(run.told.tokens, 3 * run.told.forward_flops, together, unit(run.dataset))
    schedule = e.optimizer.schedule(e.steps)
    mine = next(d for d in run.devices if d.process_index == run.process)
    return Reporter(e.steps, work, run.text, records, events, show, schedule, e.log_every, mine)


def _introduce(run: Run, folder: Path, show: Progress) -> None:
    from experiments.tables import print_explanation
    from sharding.finding import human

    print_explanation(run.told, full=False)
    facts = run.dataset.facts
    sizes = [
        f"{human(facts[k], 'B' if 'bytes' in k else '', 1000)} {k.replace('_', ' ')}"
        for k in ("train_bytes", "train_tokens", "heldout_bytes")
        if facts.get(k)
    ]
    show.line(f"data {facts.get('name')}: {', '.join(sizes) or f'{run.dataset.train_rows} training rows'}")
    if "no_bits_per_byte" in run.text:
        show.line(f"no bits per byte: {run.text['no_bits_per_byte']}", "yellow")
    show.line(f"run folder {_near(folder)}")


def _write_sample(run: Run, params: Any, folder: Path, events: Events, show: Progress) -> str:
    from experiments.evaluate import sample

    with events.timed("sample"):
        e, length = run.experiment, run.step.abstract_batch(run.experiment.batch)["tokens"].shape[1]
        text = sample(run.step, params, run.dataset, e.sample, length, e.seed)
    if run.first:
        (folder / "sample.txt").write_text(text, encoding="utf-8")  # first: who prints may find no reader
        show.line("sample:", "bold")
        show.line(text)
    return text


def _result(run: Run, mine: Path, folder: Path, outcome: Outcome, text: str) -> Result:
    records = read(mine)
    steps = [r.values for r in records if r.kind == "step"]
    evals = [r.values for r in records if r.kind == "eval"]
    times = [v["step_seconds"] for v in steps if v.get("step_seconds")]
    last = evals[-1] if evals else {}
    return Result(
        folder=str(_near(folder)),
        step=outcome.step,
        stopped=outcome.stopped,
        loss=steps[-1]["loss"] if steps else None,
        heldout_loss=last.get("loss"),
        heldout_bits_per_byte=last.get("bits_per_byte"),
        step_seconds_median=median(times) if times else None,
        seconds=time.perf_counter() - run.began,
        sample=text,
    )


def _leave(run: Run, folder: Path, result: Result, show: Progress) -> None:
    """The pictures and the last lines of a run."""
    from experiments.evaluate import unit
    from experiments.report import write_report

    write_json(folder / "result.json", asdict(result))
    report = write_report(folder, run.experiment, run.dataset.facts, run.text, result, unit(run.dataset))
    show.line(f"report {_near(report)}")
    if result.stopped:
        at = _near(folder)
        onward = f"shardlab train {shlex.quote(str(at / 'config.py'))} --resume {shlex.quote(str(at))}"
        last = result.step == run.experiment.steps
        what = "which was the last" if last else f"saved. Go on with: {onward}"
        show.line(f"stopped by {result.stopped} after step {result.step}, {what}", "bold")


def _near(path: Path) -> Path:
    """The path as seen from the working directory, where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
