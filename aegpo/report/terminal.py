"""The report's tables and verdict in the terminal; the verdict in numbers is on the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from aegpo.core.sheets import Sheet, print_sheet
from aegpo.core.terminals import plain, say
from aegpo.report.summary import Summary
from aegpo.report.tables import Table, cost_table, noise_table, reach_tables, score_tables, signals_table
from aegpo.report.verdict import plainly

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
    for number, sentence in enumerate(plainly(summary)):
        say(console, sentence, style="bold" if number == 0 else "")
    for note in summary.notes:
        say(console, f"missing: {note}", style="yellow")
    console.print(Text(f"report: {page}"), soft_wrap=True)


def print_table(table: Table, console: Console, note: bool = False) -> None:
    """Prints a table in the width there is, says which columns it left out and, if asked to, adds the note.

    Plainly, it has every column.
    """
    if plain(console):
        print_sheet(_sheet(table, note=table.note if note else ""), console)
        return
    left_out: list[str] = []
    for name in DISPENSABLE:
        if _sheet(table, left_out).fits(console.width):
            break
        left_out += [name] if name in table.columns[1:] else []
    print_sheet(_sheet(table, left_out), console)
    if left_out:
        console.print(Text(f"only on the page: {', '.join(left_out)}", style="dim"))
    if note and table.note:
        say(console, table.note, style="dim")
    console.print()


def _sheet(table: Table, left_out: Sequence[str] = (), note: str = "") -> Sheet:
    kept = [index for index, name in enumerate(table.columns) if index == 0 or name not in left_out]
    rows = tuple(tuple(row[index] for index in kept) for row in table.rows)
    return Sheet(table.title, tuple(table.columns[index] for index in kept), rows, note, boxed=False)
