"""Report: what an experiment's runs say. Who won, by how much, and how sure that is.

`recorded` reads the runs (`recorded_run` each), `summary` computes every number, `verdict` and `tables` say them,
`figures` draws them, and `page` and `terminal` show them. `profile` reports attention entropy.

Imports runs and the rooms above it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from aegpo.core.files import open_folder, write_atomically, write_json
from aegpo.report.page import page
from aegpo.report.plots import draw_plots
from aegpo.report.recorded import read_study
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
    study = read_study(folder)
    open_folder(folder, files=("report.html",))
    extras = open_folder(folder / "report", files=("summary.json",))
    summary = summarize(study)
    plots = draw_plots(study, summary, extras)
    write_json(extras / "summary.json", {**dataclasses.asdict(summary), "verdict": verdict(summary)})
    path = folder / "report.html"
    write_atomically(path, page(study, summary, plots).encode())
    show(summary, path, console)
    return path
