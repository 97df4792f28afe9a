"""Price a split on pods that are not there: does it fit, what moves over which axis, where the time goes, what to change.

`--target` says which devices: cpu:8, tpu:v5e:4x4, tpu:v5p:8x8x16, tpu:v6e:16x16x2slices, gpu:h100:32x8. The step is traced for
them (predicted), compiled by their real compiler where it is installed (compiled), and timed by closed forms (modelled).
A second CONFIG, or `--against` with other overrides, gives the difference of two plans.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments import cli
from experiments.json_file import write_json
from sharding.errors import InputError
from sharding.finding import Limits

if TYPE_CHECKING:
    from experiments.config import Experiment
    from experiments.plans.planned import Plan
    from experiments.run_config import Origin


@dataclass(frozen=True)
class Flags:
    """Options of `shardlab plan`."""

    target: str = "cpu:8"
    """The devices: cpu:N, tpu:MACHINE:AxB or AxBxC, with xNslices behind it for several slices, gpu:MACHINE:HOSTSxDEVICES."""
    compile: Literal["both", "manual", "auto", "none"] = "both"
    """Under which partitioner the step is compiled, shardlab's (manual) or XLA's (auto); "none" predicts alone, in seconds."""
    rates: Literal["published", "measured"] = "published"
    """Whose figures the modelled time takes: the machine's public ones, or for cpu:N those measured here in a few seconds."""
    json: Path | None = None
    """Write the whole plan to this file as one JSON document."""
    html: Path | None = None
    """Write the plan as one page that needs no network and no script."""
    against: str = ""
    """What the second plan of a comparison changes, as overrides in one word: --against '--mesh.fsdp 8 --mesh.data 1', or
    '--target gpu:h100:8'. The plan is then told as the difference from this one."""
    warn: Limits = field(default_factory=Limits)
    """From what size on waste is told."""


def main(argv: list[str]) -> int:
    """Print the plan, or how two plans differ; 0, also where the step does not fit; 1 where it exceeds the config's budget."""
    argv = _joined(argv)
    second = argv[1] if len(argv) > 1 and not argv[1].startswith("-") else ""
    rest = argv[2:] if second else argv[1:]
    experiment, flags, origin = cli.read([*argv[:1], *rest], Flags)
    if flags.html:
        cli.check_file(flags.html, "--html")
    if second and flags.against:
        raise InputError(
            "plan takes a second CONFIG or --against, the changes to the first, not both. Leave one out."
        )
    made = _plan(origin, experiment, flags, flags.target)
    if second or flags.against:
        return _compared(made, _other([second, *rest] if second else [], origin, flags), flags)
    from experiments.plans.page import page
    from experiments.plans.tables import print_plan

    write_json(flags.json, made.to_json())
    _write(flags.html, page(made))
    print_plan(made)
    for said in made.over_budget:
        print(f"over budget: {said}")
    return 1 if made.over_budget else 0


def _joined(argv: list[str]) -> list[str]:
    """`--against WORDS` in one word: what it changes begins with -- and would be read as a flag."""
    at = argv.index("--against") if "--against" in argv[:-1] else -1
    return argv if at < 0 else [*argv[:at], f"--against={argv[at + 1]}", *argv[at + 2 :]]


def _plan(origin: Origin, experiment: Experiment, flags: Flags, target: str) -> Plan:
    from experiments.plans.planning import plan_for
    from sharding.price.target import parse_target

    there = parse_target(target)
    if flags.rates == "measured":
        from experiments.config import Devices
        from experiments.devices import start
        from experiments.plans.rates import measured

        _tell(f"measuring what this machine does as {target}")
        start(Devices("pretend", there.devices), keep_memory=False)
        there = measured(there)
    return plan_for(origin, experiment, there, flags.compile, flags.warn, _tell)


def _other(argv: list[str], origin: Origin, flags: Flags) -> Plan:
    """The plan that the first is compared with: of another config (`argv`), or of this one with what --against changes."""
    from experiments.run_config import Origin

    if argv:
        experiment, flags, origin = cli.read(argv, Flags)
        return _plan(origin, experiment, flags, flags.target)
    words, target = shlex.split(flags.against), flags.target
    if "--target" in words[:-1]:
        at = words.index("--target")
        target = words[at + 1]
        del words[at : at + 2]
    changed = Origin(origin.path, (*origin.overrides, *words))
    return _plan(changed, changed.experiment(), flags, target)


def _compared(first: Plan, second: Plan, flags: Flags) -> int:
    from experiments.plans.diff import difference, difference_page, print_difference

    told = difference(first, second)
    write_json(flags.json, told.to_json())
    _write(flags.html, difference_page(told))
    print_difference(told)
    return 0


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
