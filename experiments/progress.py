"""One informative line per log interval: with colour and a progress bar in a terminal, plain lines when piped."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console


def terminal(**options: Any) -> Console:
    """A rich Console on standard output that raises BrokenPipeError when its reader is gone, as `print` does."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            raise BrokenPipeError  # rich would exit with 1; the command line has a code for this

    return Terminal(**options)


class Progress:
    """Shows a run of `steps` steps. Only process 0 (`shows`) prints; the others stay quiet."""

    def __init__(self, steps: int, shows: bool = True):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._shows = shows
        self._terminal = sys.stdout.isatty() and shows
        self.console = terminal(highlight=False, soft_wrap=True, quiet=not shows)
        self._bar = None
        if self._terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[eta]}"),
            )
            self._bar = Bar(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("", total=steps, eta="")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def line(self, text: str, style: str = "") -> None:
        """Print one line; without markup, so that any text is shown as it is."""
        if self._shows:
            self.console.print(text, style=style or None, markup=False, emoji=False)
            if not self._terminal:
                sys.stdout.flush()

    def reached(self, step: int, eta: str = "") -> None:
        """Move the bar to `step` updates done; it appears with the first call, below what was printed before."""
        if self._bar:
            self._bar.start()
            self._bar.update(self._task, completed=step, eta=f"eta {eta}" if eta[:1].isdigit() else eta)


def clock(seconds: float) -> str:
    """Seconds as 3.2s, 1m05s or 2h07m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
