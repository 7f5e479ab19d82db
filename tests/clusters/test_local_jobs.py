"""Jobs of this machine, by submitit: they go on without their command, and end as if nothing had happened to them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from clustered import Experiment, parent_of, unbroken, until, write_tiny
from pseudo_terminal import Terminal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
COMMAND = "aegpo run tiny.yaml --plugin pace.py --out out"
DETACHED = f"detached: 2 jobs go on; to follow them again:  {COMMAND} --cluster local"


@pytest.fixture
def folder(tmp_path, tiny_weights) -> Path:
    write_tiny(tmp_path, tiny_weights)
    return tmp_path


def test_jobs_outlive_their_command_and_what_breaks_them_costs_no_bit(folder, monkeypatch):
    local = Experiment(folder, "--cluster", "local")
    local.slow()
    process = local.start()
    local.after(3)
    assert local.interrupted(process) == 130
    assert DETACHED in local.log

    process = local.start()
    until(lambda: "main seed 1: job" in local.log and "was submitted before" in local.log)
    (running,) = local.computing()
    os.kill(running, signal.SIGKILL)  # its job starts it again
    until(lambda: local.computing() not in ([], [running]))
    os.kill(parent_of(local.computing()[0]), signal.SIGKILL)  # the job: the run saves its state and ends
    until(lambda: not local.computing())
    local.fast()
    assert local.ended(process) == 1
    assert "of local was ended before its command was" in local.log

    assert local.ended(local.start()) == 0, local.log
    assert "main seed 0: finished" in local.log
    assert (local.out / "report.html").exists()
    straight = unbroken(folder, monkeypatch, seeds=(0, 1))
    assert [local.digests(seed) for seed in (0, 1)] == [straight.digests(seed) for seed in (0, 1)]


@pytest.fixture
def local(folder) -> Iterator[Experiment]:
    """Its commands are told to the terminal; what they leave behind is killed."""
    experiment = Experiment(folder, "--cluster", "local")
    yield experiment
    for number in experiment.processes():
        os.kill(number, signal.SIGKILL)


def asked(local: Experiment) -> Terminal:
    """A terminal whose user pressed Ctrl-C amid the runs."""
    local.slow()
    terminal = Terminal(local.command(), local.folder)
    local.after(3)
    terminal.types("\x03")
    until(lambda: "d or c?" in terminal.text)
    return terminal


def test_jobs_go_on_when_the_user_of_a_terminal_says_so_and_the_same_command_attaches(local):
    terminal = asked(local)
    terminal.types("d\n")
    assert terminal.ended() == 130
    assert DETACHED in terminal.text
    terminal.close()
    before = local.steps()
    until(lambda: local.steps() > before)

    terminal = Terminal(local.command(), local.folder)
    until(lambda: "main seed 1: job" in terminal.text and "was submitted before" in terminal.text)
    local.fast()
    assert terminal.ended() == 0, terminal.text
    for seed in (0, 1):
        assert f"main seed {seed}: finished" in terminal.text
        assert (local.run(seed) / "finished.json").exists()
    assert "main seed 1: job" in terminal.text
    assert "of local was submitted before" in terminal.text
    terminal.close()


def test_jobs_that_the_user_of_a_terminal_cancels_save_their_state_and_leave_no_process(local):
    settings = ("--cluster-set", "setup=true")
    local.words += settings
    terminal = asked(local)
    terminal.types("c\n")
    assert terminal.ended() == 130, terminal.text
    until(lambda: not local.processes())
    assert "cancelled: each run saves its state" in terminal.text
    again = " ".join([COMMAND, *settings, "--cluster local"])
    assert f"interrupted; to go on:  {again}" in terminal.text
    saved = max(int(path.name.removeprefix("step-")) for path in (local.run() / "checkpoints").glob("step-*"))
    assert saved == local.steps()
    assert not list((local.out / ".cluster" / "main").glob("seed-?.json"))
    terminal.close()
