"""Commands on what was recorded: the report."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aegpo.core.terminals import console


class Format(StrEnum):
    """What a report is written as."""

    HTML = "html"
    LATEX = "latex"
    CSV = "csv"


class Figures(StrEnum):
    """What plots are saved as beside the page."""

    SVG = "svg"
    PDF = "pdf"


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER",
            help="folder of an experiment, OUT/NAME; several with arms or seeds of one experiment make one report",
            show_default=False,
        ),
    ],
    reference: Annotated[
        str | None, typer.Option(metavar="ARM", help="compare every arm to this one; default: as the file asks")
    ] = None,
    formats: Annotated[
        list[Format], typer.Option("--format", help="the page, tables for LaTeX, or numbers as CSV; may be repeated")
    ] = [Format.HTML],  # noqa: B006
    figures: Annotated[list[Figures], typer.Option(help="also save every plot as this; may be repeated")] = [],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option(help="where report.html and report/ go; default: FOLDER, if it is one", show_default=False),
    ] = None,
) -> None:
    """Rebuild the report of runs that are there, or merge folders into one report. Loads no model."""
    from aegpo.commands.report import ReportRequest, report

    names = tuple(each.value for each in formats), tuple(each.value for each in figures)
    report(ReportRequest(tuple(folders), out, reference, *names), console())
