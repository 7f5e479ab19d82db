"""Runs in processes of their own: their shares of the machine, and how they end."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from aegpo.runs.child_processes import Child, StopSignals, divide, run_children, usable_cores
from aegpo.runs.progress import Lines

PATIENCE = 240  # seconds


# --- shares of the machine --------------------------------------------------------------------------------------------


def threads(count):
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(count))


def test_by_default_every_core_has_a_run_of_one_thread():
    assert divide(4, (), {"auto"}, None, runs=15) == [threads(1)] * 4


def test_fewer_runs_than_cores_share_all_of_them():
    assert divide(8, (), {"cpu"}, None, runs=3) == [threads(2)] * 3


def test_more_jobs_than_cores_have_a_thread_each():
    assert divide(2, (), {"auto"}, 5, runs=15) == [threads(1)] * 5


def test_every_gpu_has_a_run_and_more_jobs_go_round():
    by_default = divide(16, ("2", "5"), {"auto"}, None, runs=15)
    assert by_default == [{**threads(8), "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("2", "5")]
    three = divide(16, ("2", "5"), {"cuda"}, 3, runs=15)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in three] == ["2", "5", "2"]


def test_a_gpu_named_by_number_is_left_alone_and_holds_one_run():
    assert divide(16, ("0", "1"), {"cuda:1"}, None, runs=15) == [threads(16)]


def test_there_is_at_least_one_core():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


# --- children ---------------------------------------------------------------------------------------------------------


def python(folder, label, code, **told):
    return Child(label, [sys.executable, "-c", code], folder / label, folder / label / "run.log", 4, **told)


def run_all(children, shares):
    console = Console(file=io.StringIO())
    failures, interrupted = run_children(children, shares, Lines(console, every_step=False))
    return failures, interrupted, console.file.getvalue().splitlines()


STAMP = "import time; print(time.time()); time.sleep(0.2); print(time.time())"


def spans(children):
    """Begin and end of each child, from its log."""
    return [[float(line) for line in child.log.read_text().splitlines()[1:]] for child in children]


@pytest.mark.slow
def test_children_run_in_order_and_never_more_at_a_time_than_there_are_slots(tmp_path):
    children = [python(tmp_path, f"child-{index}", STAMP) for index in range(5)]
    failures, interrupted, lines = run_all(children, [{}, {}])
    assert (failures, interrupted) == ([], False)
    times = spans(children)
    begins = [begin for begin, _ in times]
    assert begins[0] < begins[2] < begins[4]
    for begin, _ in times:
        assert sum(other <= begin < end for other, end in times) <= 2
    assert sorted(lines) == [f"child-{index}: finished" for index in range(5)]


def test_a_child_has_its_share_and_writes_both_streams_to_its_log(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); print('to stderr', file=sys.stderr)"
    child = python(tmp_path, "one", code)
    run_all([child], [{"OMP_NUM_THREADS": "3"}])
    lines = child.log.read_text().splitlines()
    assert lines[0] == f"--- {shlex.join(child.command)}"
    assert lines[1:] == ["3", "to stderr"]


def test_a_failing_child_is_told_with_its_last_lines_and_the_others_go_on(tmp_path):
    code = "import sys; [print('line', i) for i in range(30)]; sys.exit('boom')"
    children = [python(tmp_path, "bad", code), python(tmp_path, "good", STAMP)]
    failures, interrupted, lines = run_all(children, [{}])
    assert not interrupted
    assert lines == ["bad: failed", "good: finished"]
    (failure,) = failures
    text = str(failure).splitlines()
    assert text[0] == f"bad failed: exit code 1; the end of {children[0].log}:"
    assert len(text) == 16
    assert text[-2:] == ["  | line 29", "  | boom"]


@pytest.mark.parametrize("code", [0, 130])
def test_an_exit_code_that_a_part_made_up_is_not_believed(tmp_path, code):
    child = python(tmp_path, "bad", f"import os; os._exit({code})", finished=lambda: False)
    failures, interrupted, lines = run_all([child], [{}])
    assert (interrupted, lines) == (False, ["bad: failed"])
    assert f"exit code {code}, but the run neither finished nor was stopped: a part ended" in str(failures[0])


def test_a_child_that_was_killed_is_told_with_the_signal(tmp_path):
    failures, _, _ = run_all([python(tmp_path, "bad", "import os; os.kill(os.getpid(), 9)")], [{}])
    assert str(failures[0]).startswith("bad failed: killed by SIGKILL; the end of")


@pytest.mark.parametrize(("own", "expected"), [(None, "2"), ("1", "1"), ("3", "2"), ("1,2", "1")])
def test_a_child_has_no_more_threads_than_the_users_environment_allows(tmp_path, monkeypatch, own, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    child = python(tmp_path, "threads", "import os; print(os.environ['OMP_NUM_THREADS'])")
    assert run_all([child], [{"OMP_NUM_THREADS": "2"}])[0] == []
    assert child.log.read_text().splitlines()[-1] == expected


OBEDIENT = """
import time
from aegpo.runs.child_processes import INTERRUPTED, StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while not stop.wanted():
        time.sleep(0.01)
raise SystemExit(INTERRUPTED)
"""


def interrupt_once(happened, times=1):
    """Sends Ctrl-C to this process as soon as something happened."""

    def send():
        while not happened():
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)

    threading.Thread(target=send, daemon=True).start()


def ready(child):
    return lambda: child.log.exists() and "\nready" in child.log.read_text()


def test_ctrl_c_tells_the_children_waits_for_them_and_starts_no_other(tmp_path):
    children = [python(tmp_path, "first", OBEDIENT), python(tmp_path, "second", STAMP)]
    interrupt_once(ready(children[0]))
    failures, interrupted, lines = run_all(children, [{}])
    assert (failures, interrupted) == ([], True)
    assert lines[0].startswith("stopping: each run saves its state")
    assert lines[1:] == ["first: interrupted"]
    assert not children[1].log.exists()


DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_second_ctrl_c_kills_the_children(tmp_path):
    child = python(tmp_path, "deaf", DEAF)
    interrupt_once(ready(child), times=2)
    with pytest.raises(KeyboardInterrupt):
        run_all([child], [{}])
    pid = int(child.log.read_text().split()[-1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


PARENT = """
import io, sys
from pathlib import Path
from rich.console import Console
from aegpo.runs.child_processes import Child, run_children
from aegpo.runs.progress import Lines
folder = Path(sys.argv[1])
child = Child("orphan", [sys.executable, "-c", sys.argv[2]], folder, folder / "run.log", 4)
run_children([child], [{}], Lines(Console(file=io.StringIO()), every_step=False))
"""


def test_a_child_stops_when_the_process_that_waits_for_it_is_gone(tmp_path):
    log = tmp_path / "run.log"
    code = OBEDIENT.replace("raise", "print('stopped', flush=True)\nraise")
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), code])
    wait_until(lambda: log.exists() and "\nready" in log.read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: log.read_text().endswith("\nstopped\n"))


def wait_until(happened):
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_that_is_sent_to_a_child_and_passed_on_to_it_counts_once(monkeypatch):
    monkeypatch.setenv("AEGPOPARENT", str(os.getppid()))
    echo = "aegpo.runs.child_processes._ECHO"
    with StopSignals() as stop:
        monkeypatch.setattr(echo, 30)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.count == 1
        monkeypatch.setattr(echo, 0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_first_signal_asks_to_stop_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert not stop.wanted()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
