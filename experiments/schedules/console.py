"""A schedule in a terminal: the grid in colour, cut to the window's width; plain and whole when piped."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from experiments.plans.console import Sheet
from experiments.progress import terminal
from experiments.schedules.seen import Seen, backward, kept, percent
from sharding.pipeline.grid import Grid, Kind, Task

IDLE = "."

COLOURS: dict[Kind, str] = {"F": "cyan", "B": "yellow", "W": "green"}
"""Those that every terminal has; odd chunks have the brighter one."""


def print_seen(seen: Seen) -> None:
    """Print the grid, both clocks, the stash of every stage and the messages."""
    grid, sheet = seen.grid, Sheet()
    chunks = f", {grid.chunks} chunks of layers on each" if grid.chunks > 1 else ""
    sheet.line(f"{seen.name}: {seen.expression} on {grid.stages} stages{chunks}, {grid.ticks} ticks", "bold")
    _print_grid(grid)
    works = f"F forward; B {backward(seen)}" + ("; W weights" if grid.splits else "")
    sheet.line(
        f"{works}; {IDLE} idle; F3 is micro-batch 3{', F3.1 the same in chunk 1' if grid.chunks > 1 else ''}"
    )
    sheet.line()
    costs = seen.costs
    backwards = f"B {costs.inputs:g} and W {costs.weights:g}" + ("" if grid.splits else " in one task")
    sent = f"; a message {seen.message:g} between independent stages" if seen.message else ""
    sheet.fact("costs", f"F {costs.forward:g}, {backwards}; for one stage and micro-batch{sent}")
    for name, clock in seen.clocks:
        sheet.fact(
            name.partition(" ")[0],
            f"bubble {percent(clock.bubble)}: a step takes {clock.makespan:g}, of which {clock.work:g} are work",
        )
    sheet.fact("stash", f"{' '.join(map(str, seen.stash))} {kept(seen)}, at most, by stage")
    sheet.fact(
        "messages",
        f"{seen.messages.forward} forward, {seen.messages.backward} backward between stages in a step",
    )


def columns(grid: Grid) -> list[tuple[str, list[tuple[tuple[str, Task | None], ...]]]]:
    """[tick] -> (its number, [stage] -> (text, task) of each slot), all texts of a slot equally wide.

    A tick in which nobody does anything has one slot. The last slot of a tick is as wide as the tick's number needs.
    """
    made = []
    for tick, (row, kinds) in enumerate(zip(grid.cells, grid.slots, strict=True)):
        slots = [[_task(cell, kind) for cell in row] for kind in kinds] or [[None] * len(row)]
        widths = [max(len(str(task or IDLE)) for task in slot) for slot in slots]
        widths[-1] += max(0, len(str(tick)) - sum(widths) - len(widths) + 1)
        rows = [
            tuple((f"{slot[stage] or IDLE!s:<{wide}}", slot[stage]) for slot, wide in zip(slots, widths, strict=True))
            for stage in range(len(row))
        ]  # fmt: skip
        made.append((f"{tick:<{sum(widths) + len(widths) - 1}}", rows))
    return made


def _task(cell: Sequence[Task], kind: str) -> Task | None:
    return next((task for task in cell if task.kind == kind), None)


def _print_grid(grid: Grid) -> None:
    """One row a stage, time to the right, `|` between ticks."""
    from rich.text import Text

    piped = not sys.stdout.isatty()
    drawn, label = columns(grid), len(f"stage {grid.stages - 1}")
    room = shutil.get_terminal_size().columns - label - 2
    shown, taken = 0, 0
    while shown < len(drawn) and (piped or taken + len(drawn[shown][0]) <= room):
        taken += len(drawn[shown][0]) + 1
        shown += 1
    console = terminal(highlight=False, emoji=False, markup=False, soft_wrap=True)
    heads = " ".join(head for head, _ in drawn[:shown])
    console.print(Text(f"{'tick':<{label}}  {heads}".rstrip(), style="dim"))
    for stage in range(grid.stages):
        line = Text(f"{f'stage {stage}':<{label}}  ")
        for tick, (_, rows) in enumerate(drawn[:shown]):
            line.append("|" if tick else "", style="dim")
            for slot, (text, task) in enumerate(rows[stage]):
                line.append(" " if slot else "")
                fill = f"black on {'bright_' * (task.chunk % 2)}{COLOURS[task.kind]}" if task else "dim"
                line.append(text, style=fill)
        line.rstrip()
        console.print(line)
    if shown < len(drawn):
        console.print(
            f"{shown} of {len(drawn)} ticks: the window is too narrow for all. --svg, --html and a pipe have the others.",
            style="yellow",
        )
