"""Jobs of this machine, by submitit: they go on without their command, and end as if nothing had happened to them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from clustered import Experiment, parent_of, unbroken, until, write_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def folder(tmp_path, tiny_weights) -> Path:
    write_tiny(tmp_path, tiny_weights)
    return tmp_path


def test_jobs_outlive_their_command_and_what_breaks_them_costs_no_bit(folder, monkeypatch):
    local = Experiment(folder, "--cluster", "local")
    process = local.start()
    local.after(3)
    assert local.interrupted(process) == 130
    assert "detached: 2 jobs go on; to follow them again:  aegpo run tiny.yaml --out out --cluster local" in local.log

    process = local.start()
    until(lambda: "main seed 1: job" in local.log and "was submitted before" in local.log)
    (running,) = local.computing()
    os.kill(running, signal.SIGKILL)  # its job starts it again
    until(lambda: local.computing() not in ([], [running]))
    os.kill(parent_of(local.computing()[0]), signal.SIGKILL)  # the job: the run saves its state and ends
    assert local.ended(process) == 1
    assert "of local was ended before its command was" in local.log

    assert local.ended(local.start()) == 0, local.log
    assert "main seed 0: finished" in local.log
    assert (local.out / "report.html").exists()
    straight = unbroken(folder, monkeypatch, seeds=(0, 1))
    assert [local.digests(seed) for seed in (0, 1)] == [straight.digests(seed) for seed in (0, 1)]
