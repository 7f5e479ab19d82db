"""Runs that start by a fork: what they find and how they end is as in a process of their own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from aegpo.runs.child_processes import Child, run_children
from aegpo.runs.progress import Lines
from aegpo.runs.threads import thread_variables
from aegpo.runs.warm_server import starting, warm_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
PATIENCE = 240  # seconds
ONE = thread_variables(1)


@pytest.fixture(scope="module")
def starter():
    with warm_server() as server:
        wait_until(server.ready)
        yield server


def wait_until(happened):
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


HOOK = "import aegpo\n@aegpo.hookimpl\ndef aegpo_register_rewards(registry): pass\n"


def child(folder, label, code, **told):
    """A command that runs `code`, as a plugin that it imports."""
    folder.mkdir(exist_ok=True, parents=True)
    plugin = folder / f"{label}_plugin.py"
    plugin.write_text(HOOK + code)
    command = [sys.executable, "-m", "aegpo", "plugins", "--plugin", str(plugin)]
    return Child(label, command, folder / label, folder / label / "run.log", 4, **told)


def run_all(children, starter, shares=(ONE,)):
    console = Console(file=io.StringIO())
    failures, interrupted = run_children(children, shares, Lines(console, every_step=False), starter)
    return failures, interrupted, console.file.getvalue().splitlines()


LOOK = """
import json, os, sys, threading, signal
import torch
found = {
    "argv": sys.argv, "main": sys.modules["__main__"].__spec__.name, "threads": torch.get_num_threads(),
    "tasks": len(os.listdir("/proc/self/task")), "parent": os.environ["AEGPOPARENT"] == str(os.getppid()),
    "leads": os.getpgid(0) == os.getpid(), "stdin": sys.stdin.read(), "environment": dict(os.environ),
    "handlers": [getattr(signal.getsignal(each), "__qualname__", "none") for each in (signal.SIGINT, signal.SIGTERM)],
    "path": sys.path,
    "folder": os.getcwd(), "files": sorted(int(each) for each in os.listdir("/proc/self/fd"))[:3],
    "cuda": torch.cuda.is_initialized(), "random": __import__("random").random(), "encoding": sys.stdout.encoding,
    "loaded": [name for name in sys.modules if name.startswith("aegpo_")],
}
print(json.dumps(found))
print("to stderr", file=sys.stderr)
"""


@pytest.mark.slow
def test_a_fork_finds_what_a_process_of_its_own_finds(tmp_path, starter, monkeypatch):
    monkeypatch.setenv("OF_THE_USER", "x")
    found = []
    for label, start in (("warm", starter), ("cold", None), ("again", starter)):
        each = child(tmp_path, label, LOOK)
        assert run_all([each], start)[0] == []
        lines = each.log.read_text().splitlines()
        assert lines[0].startswith("--- ")
        assert "to stderr" in lines
        found.append(json.loads(lines[1]))
        assert found[-1].pop("argv")[1:] == each.command[3:]
        assert found[-1]["environment"].pop("AEGPOPARENT")
        found[-1].pop("loaded")
    warm, cold, again = found
    assert warm["parent"]
    assert warm["environment"]["OF_THE_USER"] == "x"
    assert warm.pop("random") != again.pop("random"), "no two forks draw the same"
    cold.pop("random")
    assert {name for name in warm if warm[name] != cold[name]} == set()
    assert warm["main"] == "aegpo.__main__"


def test_a_run_of_more_threads_than_one_is_a_process_of_its_own(tmp_path, starter, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "import os; print(os.environ['AEGPOPARENT'] == str(os.getppid()), os.getppid())"
    each = child(tmp_path, "two", code)
    assert run_all([each], starter, [thread_variables(2)])[0] == []
    assert each.log.read_text().splitlines()[1] == f"True {os.getpid()}"


ENDINGS = {
    "error": ("raise SystemExit(7)", "exit code"),
    "ended": ("import os; os._exit(5)", "exit code 5"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    "crashed": ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDINGS)
def test_how_a_fork_ends_is_told_as_of_a_process_of_its_own(tmp_path, starter, how):
    code, told = ENDINGS[how]
    of_each = []
    for folder, start in (("warm", starter), ("cold", None)):
        children = [child(tmp_path / folder, "bad", code), child(tmp_path / folder, "good", "print('good')")]
        failures, interrupted, lines = run_all(children, start)
        assert (interrupted, lines) == (False, ["bad: failed", "good: finished"])
        of_each.append(str(failures[0]).replace(str(tmp_path / folder), ""))
    assert told in of_each[0]
    assert of_each[0] == of_each[1]


def test_a_fatal_error_leaves_its_stack_in_the_log(tmp_path, starter):
    each = child(tmp_path, "fatal", "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)")
    failures, _, _ = run_all([each], starter)
    assert "Fatal Python error: Segmentation fault" in str(failures[0]) + each.log.read_text()


def test_a_log_that_cannot_be_written_is_told(tmp_path, starter):
    each = child(tmp_path, "none", "print('never')")
    each.log.mkdir(parents=True)
    (failure,), _, _ = run_all([each], starter)
    assert "could not be started" in str(failure)


OBEDIENT = """
import time
from aegpo.runs.child_processes import INTERRUPTED, StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while not stop.wanted():
        time.sleep(0.01)
print("stopped", flush=True)
raise SystemExit(INTERRUPTED)
"""
DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", os.getpid(), flush=True)
time.sleep(60)
"""


def interrupt(happened, times=1):
    def send():
        wait_until(happened)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)

    threading.Thread(target=send, daemon=True).start()


def ready(child):
    return lambda: child.log.exists() and "\nready" in child.log.read_text()


def test_ctrl_c_tells_forks_waits_for_them_and_starts_no_other(tmp_path, starter):
    children = [child(tmp_path, "first", OBEDIENT), child(tmp_path, "second", "print('never')")]
    interrupt(ready(children[0]))
    failures, interrupted, lines = run_all(children, starter)
    assert interrupted
    assert failures == [] or "exit code" in str(failures[0])
    assert "\nstopped\n" in children[0].log.read_text()
    assert not children[1].log.exists()
    assert lines[0].startswith("stopping: ")


def test_a_second_ctrl_c_kills_forks(tmp_path, starter):
    each = child(tmp_path, "deaf", DEAF)
    interrupt(ready(each), times=2)
    with pytest.raises(KeyboardInterrupt):
        run_all([each], starter)
    number = int(each.log.read_text().split()[-1])
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


PARENT = """
import io, sys, time
from pathlib import Path
from rich.console import Console
from aegpo.runs.child_processes import Child, run_children
from aegpo.runs.progress import Lines
from aegpo.runs.threads import thread_variables
from aegpo.runs.warm_server import warm_server
folder = Path(sys.argv[1])
children = [
    Child(name, [sys.executable, "-m", "aegpo", "plugins", "--plugin", sys.argv[2]], folder, folder / f"{name}.log", 4)
    for name in ("one", "two")
]
with warm_server() as starter:
    while not starter.ready():
        time.sleep(0.01)
    starter = starter if sys.argv[3] == "warm" else None
    print(run_children(children, [thread_variables(1)], Lines(Console(file=io.StringIO()), every_step=False), starter))
"""


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["parent", "server"])
def test_a_fork_stops_when_the_process_that_waits_for_it_or_the_server_is_killed(tmp_path, whom):
    plugin, log = tmp_path / "plugin.py", tmp_path / "one.log"
    plugin.write_text(f"import os\nprint(os.getppid(), flush=True)\n{OBEDIENT}")
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), str(plugin), "warm"])
    wait_until(lambda: log.exists() and "\nready" in log.read_text())
    server = int(log.read_text().splitlines()[1])
    os.kill(parent.pid if whom == "parent" else server, signal.SIGKILL)
    wait_until(lambda: "\nstopped\n" in log.read_text())
    if whom == "server":  # the other is started as ever
        two = tmp_path / "two.log"
        wait_until(lambda: two.exists() and "\nready" in two.read_text())
        assert int(two.read_text().splitlines()[1]) == parent.pid
    parent.kill()
    parent.wait()


@pytest.mark.slow
def test_where_the_server_does_not_come_up_runs_start_as_ever(tmp_path, monkeypatch):
    """A library that starts a thread when it is imported is one reason; here it is the interpreter's own start."""
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    each = child(tmp_path, "one", "import os; print(os.getppid())")
    with warm_server() as starter:
        assert run_all([each], starter)[0] == []
    assert each.log.read_text().splitlines()[1] == str(os.getpid())


def test_one_run_threads_gpus_and_the_user_s_wish_need_no_server(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def warm(children, share):
        with starting(children, [share]) as starter:
            return type(starter).__name__ != "Cold"

    assert warm(2, ONE)
    assert not warm(1, ONE)
    assert not warm(2, thread_variables(2))
    assert not warm(2, {**ONE, "CUDA_VISIBLE_DEVICES": "0"})
    monkeypatch.setenv("AEGPO_COLD_START", "1")
    assert not warm(2, ONE)
