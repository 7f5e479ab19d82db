"""The report's tables and verdict in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from aegpo.report.summary import Summary
from aegpo.report.tables import Table, cost_table, reach_table, score_tables
from aegpo.report.wording import verdict

NARROW = 120  # columns below which the tables leave out what the page has
_LEFT_OUT = ("seeds", "CI also prompts", "p (Holm)", "of these probe", "s in all", "trained edges")


def show(summary: Summary, page: Path, console: Console) -> None:
    """Prints the final tables, the verdict and where the page is."""
    tables = [*score_tables(summary), cost_table(summary), reach_table(summary)] if summary.scores else []
    for table in tables:
        console.print(_rich(table, console.width))
    for number, sentence in enumerate(verdict(summary)):
        console.print(Text(sentence, style="bold" if number == 0 else ""))
    for note in summary.notes:
        console.print(Text(f"missing: {note}", style="yellow"))
    console.print(Text(f"report: {page}"), soft_wrap=True)


def _rich(table: Table, width: int) -> RichTable:
    kept = [i for i, name in enumerate(table.columns) if width >= NARROW or name not in _LEFT_OUT]
    title = Text(table.title, style="bold")
    shown = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index in kept:
        shown.add_column(Text(table.columns[index]), justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*(Text(row[index]) for index in kept))
    return shown
