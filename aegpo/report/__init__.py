"""Report: what an experiment's runs say. Who won, by how much, and how sure that is.

`recorded` reads the runs (`recorded_run` each), of several folders as `merging` allows, and `summary` computes every
number. `verdict`, `in_numbers`, `glance` and `tables` say them, `figures` draws them, and `page`, `terminal` and
`exports` show them. `profile` reports attention entropy.

Imports runs and the rooms above it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from aegpo.core.files import open_folder, write_atomically, write_json
from aegpo.report.exports import CSV_FILES, TEX_FILE, write_csvs, write_latex
from aegpo.report.page import page
from aegpo.report.plots import draw_plots
from aegpo.report.recorded import compared_to, read_study
from aegpo.report.summary import summarize
from aegpo.report.terminal import show
from aegpo.report.verdict import verdict


def write_report(folder: Path, console: Console) -> Path:
    """Writes the report of an experiment's runs and prints its tables.

    Runs that are missing or not finished are named in the report and take no part in its tables.

    Args:
        folder: the experiment's, OUT/NAME; every ARM/seed-S below it is read. Its file order.json,
            ``{"arms": [...], "seeds": [...]}``, says which runs belong to the experiment and in which order, and with
            the keys ``comparisons``, ``margin`` and ``target`` of the experiment file what is compared: by default
            every arm to the first. Without it every run belongs and arms are in alphabetical order.
        console: where the tables go.

    Returns:
        `folder`/report.html, one self-contained page. Its plots are in `folder`/report as PNG, its numbers in
        `folder`/report/summary.json.

    Raises:
        AegpoError: if there is no run, a run cannot be read or compared, or the folder cannot be written to.
    """
    return rebuild_report((folder,), folder, console)[0]


def rebuild_report(
    folders: Sequence[Path],
    out: Path,
    console: Console,
    reference: str | None = None,
    formats: Sequence[str] = ("html",),
    figures: Sequence[str] = (),
) -> tuple[Path, ...]:
    """Writes the report of runs that may be in several folders; with a page, prints its tables too.

    Args:
        folders: of one experiment, each as in `write_report`. Together they are compared as any of them asks.
        out: where report.html and report/ go.
        console: where the tables go.
        reference: the arm that all others are compared to; None: as the folders ask.
        formats: html, the page; latex, `out`/report/tables.tex; csv, the files that `exports` names.
        figures: kinds of files that plots are saved as in `out`/report: svg, pdf; the page's are PNG too.

    Returns:
        The files that were written, the page first.

    Raises:
        AegpoError: as `write_report`; and if the folders do not fit together, or there is no such arm.
    """
    study = read_study(*folders)
    study = study if reference is None else compared_to(study, reference)
    paged = "html" in formats
    open_folder(out, files=("report.html",) if paged else ())
    extras = open_folder(out / "report", files=("summary.json", TEX_FILE, *CSV_FILES))
    summary, written = summarize(study), list[Path]()
    kinds = (*(("png",) if paged else ()), *figures)
    plots = draw_plots(study, summary, extras, kinds) if kinds else ()
    if paged:
        write_json(extras / "summary.json", {**dataclasses.asdict(summary), "verdict": verdict(summary)})
        written.append(out / "report.html")
        write_atomically(written[0], page(study, summary, plots).encode())
        show(summary, written[0], console)
    written += [extras / f"{plot.name}.{kind}" for plot in plots for kind in figures]
    written += [write_latex(summary, extras)] if "latex" in formats else []
    written += write_csvs(study, summary, extras) if "csv" in formats else ()
    return tuple(written)
