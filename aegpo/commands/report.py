"""`aegpo report`: the report of runs that are there, rebuilt; of several folders as of one. Loads no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.errors import AegpoError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class ReportRequest:
    """What the command line asked for."""

    folders: tuple[Path, ...]
    out: Path | None = None  # None: the one folder
    reference: str | None = None
    formats: tuple[str, ...] = ("html",)
    figures: tuple[str, ...] = ()


def report(request: ReportRequest, console: Console) -> tuple[Path, ...]:
    """Writes what was asked for, prints the tables and where the other files are.

    Raises:
        AegpoError: if the folders have no runs, do not fit together, or cannot be written to.
    """
    from aegpo.report import rebuild_report

    for folder in request.folders:
        _check(folder)
    if request.out is None and len(request.folders) > 1:
        raise AegpoError(f"--out: {len(request.folders)} folders make one report; name the folder that it goes to")
    out = request.folders[0] if request.out is None else request.out
    formats, figures = _once(request.formats), _once(request.figures)
    written = rebuild_report(request.folders, out, console, request.reference, formats, figures)
    for path in written[1:] if "html" in formats else written:  # the page was told with the tables
        console.print(f"wrote: {path}", soft_wrap=True, markup=False, highlight=False)
    return written


def _once(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _check(folder: Path) -> None:
    """Refuses a folder that is above or below the one that is meant, and says which that is."""
    if not folder.is_dir():
        raise AegpoError(f"no folder {str(folder)!r}; name one that runs wrote to, as runs/NAME")
    if any(folder.glob("*/seed-*/manifest.json")):
        return
    levels = {"seed-*/manifest.json": folder.parent, "manifest.json": folder.parent.parent}
    for pattern, experiment in levels.items():
        if any(folder.glob(pattern)):
            raise AegpoError(f"{folder} has runs of one arm; a report is of an experiment: name {experiment}")
    below = sorted({path.parents[2] for path in folder.glob("*/*/seed-*/manifest.json")})
    if below:
        names = ", ".join(map(str, below))
        raise AegpoError(f"{folder} has whole experiments; name one, or parts of one that fit together: {names}")
    raise AegpoError(f"no run in {folder}: it has no ARM/seed-S/manifest.json; name a folder a run wrote to")
