"""The run of a job that was started again waits for the lock of the one before it, unless it is asked to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from clustered import Experiment, until, write_tiny

from aegpo.errors import AegpoError
from aegpo.runs.child_processes import StopSignals
from aegpo.runs.folders import WAIT_FOR_LOCK, locked

HELD = """
import sys, time
from pathlib import Path
from aegpo.runs.folders import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def opened(number: int, path: Path) -> bool:
    """True if a process has a file open."""
    for each in Path(f"/proc/{number}/fd").iterdir():
        with suppress(OSError):  # closed since
            if each.samefile(path):
                return True
    return False


@contextmanager
def held(folder: Path, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """Inside, or for so many seconds, another process holds a run folder."""
    with subprocess.Popen([sys.executable, "-c", HELD, str(folder), str(seconds)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            yield other
        finally:
            other.kill()


def test_a_run_of_a_job_waits_for_the_lock_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv(WAIT_FOR_LOCK, "20")
    with held(tmp_path, 0.7) as other, locked(tmp_path) as mine:
        assert mine
        assert other.wait() == 0


def test_a_run_that_has_waited_long_enough_for_a_lock_says_who_holds_it(tmp_path, monkeypatch):
    monkeypatch.setenv(WAIT_FOR_LOCK, "1")
    with held(tmp_path, 600) as other:
        with pytest.raises(AegpoError, match=f"process {other.pid} is running"), locked(tmp_path):
            pass
        monkeypatch.setenv(WAIT_FOR_LOCK, "long")
        with pytest.raises(AegpoError, match="AEGPO_WAIT_FOR_LOCK is 'long'"), locked(tmp_path):
            pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_wait_for_a_lock_ends_when_the_run_is_asked_to_stop(tmp_path, monkeypatch, number):
    monkeypatch.setenv(WAIT_FOR_LOCK, "300")
    begin = time.monotonic()
    with held(tmp_path, 600), StopSignals() as stop:
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        with locked(tmp_path, stop.wanted) as mine:
            assert not mine
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_a_command_that_waits_for_a_lock_is_interrupted_by_sigterm(tmp_path, tiny_weights, monkeypatch):
    monkeypatch.setenv(WAIT_FOR_LOCK, "300")
    experiment = Experiment(tmp_path, "--seed", "0")
    write_tiny(tmp_path, tiny_weights)
    with held(experiment.run(), 600), experiment.start() as process:
        until(lambda: opened(process.pid, experiment.run() / ".lock"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
    assert "interrupted; to go on:" in experiment.log
    assert experiment.steps() == 0
