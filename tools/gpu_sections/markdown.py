"""Rows as section `gpu` of tools/BENCHMARKS.md: a table for each run of rows that say the same things."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import RECORD, write_section

COMMON = ("device", "cores", "torch", "cuda", "python", "date", "commit", "dry")
TITLE = "gpu"
WIDE, FEW = 8, 4  # a few rows with more columns than that stand upright

Rows = Sequence[Mapping[str, Any]]


def write(path: Path, into: Path = RECORD) -> None:
    """Writes the section from a file of rows.

    Raises:
        SystemExit: if the rows are of --dry, or there are none.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows or any(row["dry"] for row in rows):
        raise SystemExit(f"{path} has rows of --dry, or none: nothing that was measured on a GPU")
    write_section(into, TITLE, rendered(rows))


def rendered(rows: Rows) -> list[str]:
    """The section's lines."""
    lines = []
    for machine, here in groupby(rows, key=_machine):
        lines += [f"`python tools/gpu.py`, {machine}.", ""]
        for name, of_section in groupby(here, key=lambda row: str(row["section"])):
            lines += _section(name, list(of_section)) if name != "machine" else []
    return lines


def _machine(row: Mapping[str, Any]) -> str:
    told = (f"{row['cores']} cores", f"Python {row['python']}", f"torch {row['torch']}", f"CUDA {row['cuda']}")
    return ", ".join([str(row["date"]), str(row["device"]), *told, f"commit {row['commit']}"])


def _section(name: str, rows: Rows) -> list[str]:
    lines = []
    said = [{key: value for key, value in row.items() if key not in ("section", *COMMON)} for row in rows]
    for names, alike in groupby(said, key=list[str]):
        keys, table = tuple(names), list(alike)
        if keys == ("section_seconds",):
            lines += [f"Section `{name}` took {table[0]['section_seconds']} s.", ""]
        elif len(keys) <= WIDE or len(table) > FEW:
            lines += [f"`{name}`:", "", _line(keys), _rule(len(keys))]
            lines += [*(_line([_cell(row[key]) for key in keys]) for row in table), ""]
        else:
            lines += [f"`{name}`:", "", _line(["", *(_cell(row.get("what", "")) for row in table)])]
            lines += [_rule(1 + len(table))]
            lines += [_line([key, *(_cell(row[key]) for row in table)]) for key in keys if key != "what"] + [""]
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return f"| --- |{' ---: |' * (columns - 1)}"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "/")
