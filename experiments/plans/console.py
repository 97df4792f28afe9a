"""A terminal of 120 columns, or a pipe: lines, facts and tables of a plan, every row on one line when piped."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from experiments.progress import terminal
from experiments.tables import PIPED

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")
LABEL = 12
"""Columns of the word before a fact."""


class Sheet:
    """Prints from the top down; `piped` says that nobody's window limits a row."""

    def __init__(self) -> None:
        self.piped = not sys.stdout.isatty()
        width = PIPED if self.piped else shutil.get_terminal_size().columns
        self._console = terminal(width=width, highlight=False, soft_wrap=False, emoji=False, markup=False)
        self._table: Table | None = None

    def shown(self, rows: Sequence[T], most: int) -> Sequence[T]:
        """The rows that there is room for: all of them in a pipe."""
        return rows if self.piped or len(rows) <= most + 1 else rows[:most]

    def line(self, text: str = "", style: str = "") -> None:
        """Text as it is."""
        self._console.print(text, style=style or None, soft_wrap=self.piped)

    def fact(self, what: str, text: str, style: str = "") -> None:
        """`fits        yes. ...`, its further lines set in."""
        self._set_in(f"{what:<{LABEL}}", text, style)

    def point(self, text: str, style: str = "") -> None:
        """One of several sentences, set in."""
        self._set_in("  ", text, style)

    def _set_in(self, before: str, text: str, style: str) -> None:
        from rich.table import Table
        from rich.text import Text

        if self.piped:
            self._console.print(f"{before}{text}", soft_wrap=True)
            return
        row = Table.grid(padding=0)
        row.add_column(width=len(before))
        row.add_column(overflow="fold")
        row.add_row(Text(before, style="dim"), Text(text, style=style))
        self._console.print(row)

    def table(self, title: str, *columns: str) -> None:
        """Begin a table; a column whose head begins with > is flush right."""
        from rich.table import Table

        self.line(title, "bold")
        self._table = Table(box=None, pad_edge=False, header_style="dim")
        for column in columns:
            right, head = column.startswith(">"), column.removeprefix(">")
            head = head.replace("\n", " ") if self.piped else head
            self._table.add_column(head, justify="right" if right else "left", overflow="fold", no_wrap=right)

    def row(self, *cells: str, style: str = "") -> None:
        """A row of the table; cells that are left out are empty."""
        from rich.text import Text

        assert self._table is not None
        self._table.add_row(*(Text(cell) for cell in cells), style=style or None)

    def end(self) -> None:
        """Print the table."""
        assert self._table is not None
        self._console.print(self._table)
        self._console.print()
        self._table = None
