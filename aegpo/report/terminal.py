"""The report's tables and verdict in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from aegpo.report.summary import Summary
from aegpo.report.tables import Table, cost_table, noise_table, reach_tables, score_tables, signals_table
from aegpo.report.verdict import verdict

# What a terminal that is too narrow does without, in this order; the page has it all.
DISPENSABLE = (
    "seeds",
    "detectable",
    "of these signals",
    "margin",
    "CI also prompts",
    "s in all",
    "trained edges",
    "relative",
    "base",
    "forwards",
    "seconds",
    "steps",
    "p equal",
    "forwards per step",
    "entropy",
)


def show(summary: Summary, page: Path, console: Console) -> None:
    """Prints the final tables, the verdict and where the page is."""
    tables = [*score_tables(summary), cost_table(summary), *reach_tables(summary)] if summary.scores else []
    tables += [signals_table(summary)] if summary.signals else []
    tables += [noise_table(summary)] if summary.noise else []
    for table in tables:
        print_table(table, console)
    for number, sentence in enumerate(verdict(summary)):
        console.print(Text(sentence, style="bold" if number == 0 else ""))
    for note in summary.notes:
        console.print(Text(f"missing: {note}", style="yellow"))
    console.print(Text(f"report: {page}"), soft_wrap=True)


def print_table(table: Table, console: Console, note: bool = False) -> None:
    """Prints as many columns as the terminal has room for, says which it left out and, if asked to, adds the note."""
    left_out: list[str] = []
    endless = console.options.update(width=10_000)  # to measure what a table needs, not what it can be squeezed into
    for name in (*DISPENSABLE, None):
        shown = _rich(table, left_out)
        if name is None or console.measure(shown, options=endless).maximum <= console.width:
            break
        left_out += [name] if name in table.columns[1:] else []
    console.print(shown)
    if left_out:
        console.print(Text(f"only on the page: {', '.join(left_out)}", style="dim"))
    if note and table.note:
        console.print(Text(table.note, style="dim"))
    console.print()


def _rich(table: Table, left_out: Sequence[str]) -> RichTable:
    title = Text(table.title, style="bold")
    shown = RichTable(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1)
    )
    kept = [index for index, name in enumerate(table.columns) if index == 0 or name not in left_out]
    for index in kept:
        shown.add_column(Text(table.columns[index]), justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(row[index]) for index in kept))
    return shown
