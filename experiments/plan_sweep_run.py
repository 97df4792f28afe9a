"""Price a sweep of plans: each point's step is traced and its seconds modelled. Nothing is compiled or run.

A point that cannot be laid out (a batch that has fewer rows than a pod has parts for it) ends its line and says why; a line
that cannot be laid out on any pod of a machine is a mistake, and refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from experiments.assemble import one_device, untouched
from experiments.config import config_hash
from experiments.explanation import counted
from experiments.plan_sweep import PlanPoint, PlanSweep
from experiments.plans.estimate import estimate, on_target, priced
from experiments.record_schema import Header, installed_versions
from sharding.errors import InputError

if TYPE_CHECKING:
    from sharding.price.target import Target
    from sharding.price.timing import Modelled

PRODUCTS, MEMORY = "products", "memory traffic"
"""What limits a step that no collective does."""


@dataclass(frozen=True)
class Work:
    """What one row of the model's batch is, wherever it is split."""

    tokens: int
    """Tokens of a row."""
    parameters: int
    """Of the model."""


def work(sweep: PlanSweep) -> Work:
    """Tokens of a row and parameters of the sweep's model."""

    def seen() -> Work:
        step = one_device(sweep.base)
        return Work(counted(step.abstract_batch(1)), sum(s.size for s in step.tree.values()))

    return untouched(seen)


def price(sweep: PlanSweep, point: PlanPoint, tokens: int) -> dict[str, Any]:
    """The values of a point's record of kind "pod", as `docs/records.md` describes them. tokens: of one row."""
    machine = point.target.machine
    values: dict[str, Any] = {
        "mode": point.mode,
        "split": point.line.split,
        "target": point.target.text,
        "machine": f"{machine.platform}:{machine.name}",
        "machine_kind": machine.device_kind,
        "devices": point.target.devices,
        "global_batch": point.batch,
        "accumulate": point.accumulate,
        "tokens_per_step": point.batch * tokens,
        "rules": repr(point.line.rules),
        "mesh": {a: n for a, n in point.line.mesh.sizes().items() if n != 1},
    }
    experiment = sweep.experiment(point)
    try:
        made = estimate(experiment, point.target)
    except InputError as error:
        return values | {"refused": str(error)}
    told, capacity, needs = made.modelled, machine.memory, made.predicted.memory.total
    if told.step is None:
        raise InputError(f"The point {point} has no modelled time. It lacks {'; '.join(told.missing)}.")
    parts, bare = limits(told, point.target), at_once(point.target)
    of_bytes = limits(priced(made.predicted, on_target(experiment, point.target), bare), bare)
    return values | {
        "step_seconds": told.step,
        "compute_seconds": told.compute,
        "collective_seconds": told.collectives,
        "mfu": told.mfu,
        "predicted_bytes": needs,
        "capacity_bytes": capacity,
        "fits": capacity is None or needs <= capacity,
        "limit": next(iter(parts)),
        "parts": parts,
        "latency": {
            what: s - of_bytes.get(what, 0.0) for what, s in parts.items() if what not in (PRODUCTS, MEMORY)
        },
        "missing": list(told.missing),
    }


def limits(told: Modelled, target: Target) -> dict[str, float]:
    """Modelled seconds of a step by what they wait for, the most first.

    "products"; "memory traffic"; or axes and the network that their collectives use: "fsdp, the ICI links". A collective on
    both networks counts with each for the seconds that it takes there.
    """
    found: dict[str, float] = {PRODUCTS: 0.0}
    for op in told.ops:
        what = PRODUCTS if op.limit == "arithmetic" else MEMORY
        found[what] = found.get(what, 0.0) + (op.seconds or 0.0)
    for moved in told.moved:
        axes = " and ".join(moved.axes)
        for network, seconds in (
            (target.machine.inside, moved.inside),
            (target.machine.across, moved.across),
        ):
            if seconds:
                what = f"{axes}, {network.name}"
                found[what] = found.get(what, 0.0) + seconds
    return dict(sorted(found.items(), key=lambda part: -part[1]))


def at_once(target: Target) -> Target:
    """The target with networks in which a step of a collective takes what its bytes take, and nothing else."""
    machine = target.machine
    inside = replace(machine.inside, latency=0.0, start=0.0)
    across = replace(machine.across, latency=0.0, start=0.0)
    return replace(target, machine=replace(machine, inside=inside, across=across))


def check_lines(points: Iterable[dict[str, Any]]) -> None:
    """InputError, with what was said of it, for a line without any modelled point on a machine."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for values in points:
        lines.setdefault((values["split"], values["machine"]), []).append(values)
    for (split, machine), each in lines.items():
        if all("refused" in v for v in each):
            raise InputError(
                f"The split {split!r} cannot be laid out on any pod of {machine}. On {each[0]['target']}: {each[0]['refused']}"
            )


def header(sweep: PlanSweep, run: str, of: Work) -> Header:
    """What is constant for a sweep of plans: traced, on no device; the mesh is left empty, as it spans several."""
    most = max(target.devices for target in sweep.pods())
    return Header(
        run=run,
        config_hash=config_hash(cast(Any, sweep)),
        seed=sweep.base.seed,
        versions=installed_versions(),
        device={"platform": "none", "kind": "traced", "count": most, "processes": 1},
        mesh={},
        details={
            "name": sweep.name,
            "parameters": of.parameters,
            "tokens_per_row": of.tokens,
            "rows": sweep.rows,
        },
    )


def cells(points: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The table's head and one row a point, as texts."""
    yield ("mode", "split", "target", "devices", "rows", "step ms", "tokens/s/device", "MFU", "GiB", "limit")
    for p in points:
        about = (p["mode"], p["split"], p["target"], str(p["devices"]), str(p["global_batch"]))
        if "refused" in p:
            yield (*about, "-", "-", "-", "-", "cannot be laid out")
            continue
        rate = p["tokens_per_step"] / p["step_seconds"] / p["devices"]
        share = p["parts"][p["limit"]] / p["step_seconds"]
        mostly = ", latency" if p["latency"].get(p["limit"], 0.0) > p["parts"][p["limit"]] / 2 else ""
        yield (
            *about,
            f"{1000 * p['step_seconds']:.1f}",
            f"{rate:,.0f}",
            f"{p['mfu']:.0%}",
            f"{p['predicted_bytes'] / 2**30:.1f}{'' if p['fits'] else ' does not fit'}",
            f"{p['limit']} ({share:.0%}{mostly})",
        )
