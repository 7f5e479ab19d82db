"""Bars as rows that fit the terminal: what says least is left out first, bar and time left never."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

_BAR, _LEAST_BAR, _LEAST_LABEL = 24, 8, 8  # columns of the terminal
_BELOW = 2  # lines of the terminal that are left free: the cursor's, and one for what is printed next


@dataclass(frozen=True)
class BarRow:
    """One bar."""

    label: str
    done: int
    total: int | None  # None: not known yet
    eta: str
    numbers: tuple[str, ...] = ("",)  # from the longest to the shortest that will do; one is shown

    @property
    def count(self) -> str:
        """``3/40``."""
        return f"{self.done}/{'?' if self.total is None else self.total}"


@dataclass(frozen=True)
class BarRows:
    """Bars one below the other."""

    rows: Sequence[BarRow]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """As many as the terminal has lines for; of the others it is said how many they are."""
        room = max(1, console.height - _BELOW)
        shown = self.rows if len(self.rows) <= room else self.rows[: max(1, room - 1)]
        if shown:
            yield _grid(shown, options.max_width)
        if len(shown) < len(self.rows):
            yield Text(f"and {len(self.rows) - len(shown)} more")


def _grid(rows: Sequence[BarRow], width: int) -> Table:
    label, count, eta = (
        max(len(text) for text in texts)
        for texts in ([row.label for row in rows], [row.count for row in rows], [f"eta {row.eta}" for row in rows])
    )
    left = width - count - eta - 3  # for label and bar, with a space between columns
    bar = max(_LEAST_BAR, min(_BAR, left - label))
    numbers = [_level(row, left - label - bar - 1) for row in rows]
    grid = Table.grid(padding=(0, 1), pad_edge=False)
    grid.add_column(width=max(_LEAST_LABEL, min(label, left - bar)), overflow="fold")
    grid.add_column(width=bar)
    grid.add_column(width=count, justify="right", no_wrap=True)
    grid.add_column(width=eta, no_wrap=True)
    if any(numbers):
        grid.add_column(no_wrap=True)
    for row, text in zip(rows, numbers, strict=True):
        drawn = ProgressBar(total=row.total, completed=row.done, width=bar, pulse=row.total is None)
        numbered = [Text(text)] if any(numbers) else []
        grid.add_row(Text(row.label), drawn, Text(row.count), Text(f"eta {row.eta}"), *numbered)
    return grid


def _level(row: BarRow, room: int) -> str:
    """The most that there is room for."""
    return next((text for text in row.numbers if len(text) <= room), "")
