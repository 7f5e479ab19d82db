"""Commands that make a folder: whether they can is found out before a model is loaded; a profile replaces its own."""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from aegpo.commands.cli import app, main
from aegpo.commands.export import ExportRequest, export
from aegpo.errors import AegpoError
from aegpo.report import write_report

MADE = Path(__file__).parents[1] / "data" / "run-0.1.0"
RUN = "small/aegpo/seed-0"
COMMANDS = {
    "sample": ["--prompt", "two red circles", "--out"],
    "export": ["--full", "--to"],
    "evaluate": ["--out"],
    "profile-entropy": ["--out"],
}
PROFILE = ("profile-entropy", "small.yaml", "--arm", "aegpo", "--validate", "--out", "profile")


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    shutil.copytree(MADE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def error_of(capsys, monkeypatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["aegpo", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_target_that_cannot_be_made_is_told_before_the_model_is_loaded(command, capsys, monkeypatch):
    shutil.rmtree("weights")  # so that loading the model would be another error
    Path("taken").write_text("mine")
    Path("link").symlink_to("elsewhere")
    option = COMMANDS[command][-1]
    for target, words in {
        "taken": "is a file, and nothing is overwritten",
        "small": "is there already",
        "link": "is a link, to elsewhere",
        ".": "is where you are",
        "/proc": "is a mount point",
        "x" * 256: "cannot be written to: File name too long",
    }.items():
        error = error_of(capsys, monkeypatch, command, RUN, *COMMANDS[command], target)
        assert error.startswith(f"{option} {target}: {words}")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_fails_later_leaves_nothing_behind(command):
    shutil.rmtree("weights")
    before = sorted(Path().iterdir())
    done = CliRunner().invoke(app, [command, RUN, *COMMANDS[command], "above/made"])
    assert done.exit_code == 1
    assert sorted(Path().iterdir()) == before


def profiled() -> set[str]:
    done = CliRunner().invoke(app, list(PROFILE), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return {path.name for path in Path("profile").iterdir()}


@pytest.mark.slow
def test_a_profile_replaces_an_earlier_one_and_nothing_else(capsys, monkeypatch):
    written = profiled()
    assert {"profile.html", "steps.csv", "correlations.csv", "steps-evidence.png"} <= written
    Path("profile/delta.png").write_text("of a run that was profiled here before")
    assert profiled() == written
    Path("profile/thesis.csv").write_text("mine")
    error = error_of(capsys, monkeypatch, *PROFILE)
    assert "has what this command did not write, such as 'thesis.csv'" in error
    assert Path("profile/thesis.csv").read_text() == "mine"


def test_a_report_whose_place_is_taken_is_told_in_one_line():
    Path("small/report").write_text("mine")
    with pytest.raises(AegpoError, match="--out small/report: cannot be written to: small/report is a file"):
        write_report(Path("small"), Console(quiet=True))
    Path("small/report").unlink()
    Path("small/report.html").mkdir()
    with pytest.raises(AegpoError, match=r"--out small/report\.html: is a folder where a file goes"):
        write_report(Path("small"), Console(quiet=True))


@contextmanager
def files_up_to(size: int):
    """Inside, no file may grow beyond so many bytes: the system refuses it as it refuses a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_weights_that_the_disk_has_no_room_for_are_one_message_and_nothing_is_kept():
    with files_up_to(10_000), pytest.raises(AegpoError, match="nothing was kept: make room, or choose another folder"):
        export(ExportRequest(Path(RUN), Path("made"), full=True))
    assert not Path("made").exists()
    assert not list(Path().glob(".aegpo-*"))
