"""Jobs of a real Slurm of two nodes, both this machine: nox -s slurm starts it."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from clustered import Experiment, unbroken, until, write_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("srun") is None, reason="there is no Slurm here; nox -s slurm has one"),
]
WORDS = ("--seed", "0", "--cluster", "slurm", "--cluster-set", "time=30")


@pytest.fixture
def folder(tmp_path, tiny_weights) -> Path:
    write_tiny(tmp_path, tiny_weights)
    return tmp_path


def slurm(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def job() -> str:
    """The only one."""
    (found,) = slurm("squeue", "--noheader", "--format", "%i").split()
    return found


def start_again(number: str) -> None:
    """Slurm holds a job for two minutes before it starts it again."""
    until(lambda: "PENDING" in slurm("squeue", "--noheader", "--format", "%T"))
    time.sleep(6)  # the command asks every five
    slurm("scontrol", "update", f"JobId={number}", "StartTime=now")


def test_a_job_that_is_queued_again_amid_its_run_costs_no_bit_and_outlives_its_command(folder, monkeypatch):
    experiment = Experiment(folder, *WORDS)
    experiment.slow()
    process = experiment.start()
    experiment.after(3)
    number = job()
    slurm("scontrol", "requeue", number)
    start_again(number)
    experiment.after(experiment.steps() + 2)
    assert experiment.interrupted(process) == 130
    assert "detached: 1 jobs go on" in experiment.log
    assert "waits to be started again" in experiment.log

    process = experiment.start()
    until(lambda: job() == number)
    slurm("scancel", "--signal", "USR2", number)  # its node is about to be taken away
    start_again(number)
    experiment.fast()
    assert experiment.ended(process) == 0, experiment.log
    assert f"job {number} of slurm was submitted before" in experiment.log
    assert "Restarts=2" in slurm("scontrol", "show", "job", number)
    assert experiment.digests() == unbroken(folder, monkeypatch).digests()


def test_a_run_of_two_nodes_is_queued_again_and_ends_as_one_process_does(folder, monkeypatch):
    shards = ("--set", "parallel.shards=2")
    experiment = Experiment(folder, *WORDS, *shards, "--nodes", "2")
    experiment.slow()
    process = experiment.start()
    experiment.after(3)
    number = job()
    assert slurm("squeue", "--noheader", "--format", "%D").split() == ["2"]
    slurm("scontrol", "requeue", number)
    start_again(number)
    experiment.fast()
    assert experiment.ended(process) == 0, experiment.log
    assert experiment.digests() == unbroken(folder, monkeypatch, *shards).digests()


def test_a_job_that_is_cancelled_saves_its_state_and_is_told_of(folder):
    experiment = Experiment(folder, *WORDS)
    experiment.slow()
    process = experiment.start()
    experiment.after(3)
    slurm("scancel", job())
    assert experiment.ended(process) == 130, experiment.log
    assert "interrupted; to go on:  aegpo run tiny.yaml" in experiment.log
    assert list((experiment.run() / "checkpoints").glob("step-*"))


def test_a_job_that_slurm_refuses_is_told_in_its_words(folder):
    experiment = Experiment(folder, *WORDS, "--cluster-set", "partition=nowhere")
    assert experiment.ended(experiment.start()) == 2
    assert "error: main seed 0: Slurm took no job:" in experiment.log
    assert "nvalid partition" in experiment.log
