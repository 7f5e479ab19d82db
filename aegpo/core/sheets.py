"""Tables of text that fit the terminal, whatever its width: nothing is cut, and no word is broken that has room.

A table that is too wide is laid out another way, the first that fits: cells wrapped at words, another table that says
the same in fewer columns, rows and columns exchanged, columns in several blocks one below the other, or a list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from aegpo.core.terminals import plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

NONE = "-"  # a cell that says nothing
_TALLEST_NUMBERS, _TALLEST_TEXT = 3, 8  # lines of a row; taller ones are hard to read across: our choice
_SEAM = 3  # columns of the terminal between two of a table


@dataclass(frozen=True)
class Sheet:
    """A table of text; the first column names the rows. Printed, it takes the width there is."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    numbers: bool = True  # all columns but the first hold numbers, which stand to the right
    sections: tuple[int, ...] = ()  # rows before which there is a line
    narrow: Sheet | None = None  # the same in fewer columns
    boxed: bool = True  # with a line between columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """As wide as there is room for."""
        yield from self.laid_out(options.max_width)
        if self.note:
            yield Text(self.note, style="table.caption")

    def fits(self, width: int) -> bool:
        """True if no cell needs to be wrapped."""
        return self._needs(self._most()) <= width

    def facts(self) -> Iterator[str]:
        """A line for each cell that says something: ``ROW, COLUMN: CELL``."""
        if self.title:
            yield self.title
        for name, *cells in self.rows:
            for column, cell in zip(self.columns[1:], cells, strict=True):
                if cell not in ("", NONE):
                    yield f"{name}, {column}: {' '.join(cell.split())}"
        if self.note:
            yield self.note

    def laid_out(self, width: int) -> Iterator[RenderableType]:
        """What is printed, but for the note, in so many columns of the terminal."""
        if self._fits_wrapped(width):
            yield self._table(self._widths(width))
        elif self.narrow is not None:
            yield from self.narrow.laid_out(width)
        elif self.numbers and self._transposed().fits(width):
            yield from self._transposed().laid_out(width)
        elif (blocks := self._blocks(width)) is not None:
            yield from (block._table(block._widths(width)) for block in blocks)
        else:
            yield from self._listed()

    # --- widths ------------------------------------------------------------------------------------------------------

    def _column(self, index: int) -> list[str]:
        return [self.columns[index], *(row[index] for row in self.rows)]

    def _most(self) -> list[int]:
        """Of each column, the longest line."""
        return [max(map(_longest_line, self._column(index))) for index in range(len(self.columns))]

    def _least(self) -> list[int]:
        """Of each column, the longest word."""
        return [max(map(_longest_word, self._column(index))) for index in range(len(self.columns))]

    def _needs(self, widths: Sequence[int]) -> int:
        return sum(widths) + _SEAM * (len(widths) - 1) + (4 if self.boxed else 0)

    def _widths(self, width: int) -> list[int]:
        """The width of each column: what it needs, less what the widest can do without by wrapping at words."""
        widths, least = self._most(), self._least()
        while self._needs(widths) > width:
            loose = [index for index in range(len(widths)) if widths[index] > least[index]]
            if not loose:
                break
            widths[max(loose, key=widths.__getitem__)] -= 1
        return widths

    def _fits_wrapped(self, width: int) -> bool:
        if self._needs(self._least()) > width:
            return False
        widths, tallest = self._widths(width), _TALLEST_NUMBERS if self.numbers else _TALLEST_TEXT
        cells = [cell for row in (self.columns, *self.rows) for cell in zip(row, widths, strict=True)]
        return self.fits(width) or all(_lines(text, limit) <= tallest for text, limit in cells)

    # --- layouts -----------------------------------------------------------------------------------------------------

    def _table(self, widths: Sequence[int]) -> RichTable:
        table = RichTable(title=Text(self.title) if self.title else None, title_justify="left")
        if not self.boxed:
            table.box, table.show_edge, table.pad_edge, table.title_style = box.SIMPLE_HEAD, False, False, "bold"
        for index, (name, width) in enumerate(zip(self.columns, widths, strict=True)):
            justify = "right" if self.numbers and index else "left"
            table.add_column(Text(name), justify=justify, overflow="fold", width=width)  # type: ignore[arg-type]
        for index, row in enumerate(self.rows):
            table.add_row(*(Text(cell) for cell in row), end_section=index + 1 in self.sections)
        return table

    def _transposed(self) -> Sheet:
        columns = (self.columns[0], *(row[0] for row in self.rows))
        rows = tuple((name, *(row[index] for row in self.rows)) for index, name in enumerate(self.columns) if index)
        return replace(self, columns=columns, rows=rows, sections=())

    def _blocks(self, width: int) -> list[Sheet] | None:
        """The columns in several tables, each with the rows' names; None where one column alone has no room."""
        chosen: list[list[int]] = []
        for index in range(1, len(self.columns)):
            if chosen and self._of([0, *chosen[-1], index]).fits(width):
                chosen[-1].append(index)
            elif self._of([0, index])._fits_wrapped(width):
                chosen.append([index])
            else:
                return None
        blocks = [self._of([0, *each]) for each in chosen]
        return [replace(block, title=block.title if place == 0 else "") for place, block in enumerate(blocks)]

    def _of(self, kept: Sequence[int]) -> Sheet:
        rows = tuple(tuple(row[index] for index in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[index] for index in kept), rows=rows)

    def _listed(self) -> Iterator[RenderableType]:
        if self.title:
            yield Text(self.title, style="table.title")
        for name, *cells in self.rows:
            yield Text(name, style="bold", overflow="fold")
            for column, cell in zip(self.columns[1:], cells, strict=True):
                if cell not in ("", NONE):
                    yield Padding(Text(f"{column}: {cell}", overflow="fold"), (0, 0, 0, 2))


def print_sheet(sheet: Sheet, console: Console) -> None:
    """Prints a table; plainly, a line for each fact."""
    if not plain(console):
        console.print(sheet)
        return
    for line in sheet.facts():
        console.print(Text(line), soft_wrap=True)


def _longest_line(text: str) -> int:
    return max((cell_len(line) for line in text.splitlines()), default=0)


def _longest_word(text: str) -> int:
    return max((cell_len(word) for word in text.split()), default=0)


def _lines(text: str, width: int) -> int:
    """How many lines a text takes that is wrapped at words."""
    count, used = 1, 0
    for word in text.split():
        size = cell_len(word)
        if used and used + 1 + size > width:
            count, used = count + 1, size
        else:
            used += size + bool(used)
    return count
