"""`aegpo report` as a user gives it: which folders it takes, what it writes, and what it says where it cannot."""

from __future__ import annotations

import pytest
from studies import AEGPO, GRPO, World, write_experiment
from typer.testing import CliRunner

from aegpo.commands.cli import app
from aegpo.commands.report import ReportRequest, report
from aegpo.core.terminals import console
from aegpo.errors import AegpoError


@pytest.fixture
def folder(tmp_path):
    return write_experiment(tmp_path / "runs" / "ablation", (GRPO, AEGPO), world=World(training_steps=10, prompts=12))


def test_it_rebuilds_the_page_in_the_folder_and_says_where_everything_is(folder):
    done = CliRunner().invoke(app, ["report", str(folder), "--format", "html", "--format", "csv", "--figures", "svg"])
    assert done.exit_code == 0, done.output
    assert f"report: {folder / 'report.html'}" in done.output
    assert f"wrote: {folder / 'report' / 'scores.csv'}" in done.output
    assert f"wrote: {folder / 'report' / 'gains.svg'}" in done.output
    assert (folder / "report.html").exists()


def test_without_the_page_no_tables_are_printed(folder):
    done = CliRunner().invoke(app, ["report", str(folder), "--format", "latex", "--reference", "aegpo"])
    assert done.output == f"wrote: {folder / 'report' / 'tables.tex'}\n"
    assert r"grpo & aegpo & " in (folder / "report" / "tables.tex").read_text()


@pytest.mark.parametrize(
    ("below", "message"),
    [
        ("..", r"has whole experiments; name one, .*: .*ablation"),
        ("grpo", r"has runs of one arm; a report is of an experiment: name .*ablation$"),
        ("grpo/seed-0", r"has runs of one arm; a report is of an experiment: name .*ablation$"),
        ("grpo/seed-0/images", "no run in .*images: it has no ARM/seed-S/manifest.json"),
        ("absent", "no folder .*absent'; name one that runs wrote to"),
    ],
)
def test_a_folder_above_or_below_the_one_that_is_meant_is_told(folder, below, message):
    with pytest.raises(AegpoError, match=message):
        report(ReportRequest(((folder / below).resolve(),)), console())


def test_several_folders_need_a_place_for_their_report(folder):
    with pytest.raises(AegpoError, match="--out: 2 folders make one report; name the folder that it goes to"):
        report(ReportRequest((folder, folder)), console())
