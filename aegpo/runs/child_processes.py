"""Runs in processes of their own: their shares of the machine, their progress and how they end."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from aegpo.core.experiment import Experiment
from aegpo.core.problems import Location
from aegpo.core.processes import PARENT, parent, started_alone
from aegpo.errors import UserInterrupt
from aegpo.runs.progress import Display, Record
from aegpo.runs.threads import VARIABLES, allowed, thread_variables

GOES_ON = "interrupted; to go on:"  # what a run says last that was stopped, before the command
INTERRUPTED = 130  # exit code of a run that Ctrl-C or SIGTERM stopped, as shells have it
_LOOK_EVERY = 0.5  # seconds between looks at the children
_ECHO = 0.5  # seconds within which a signal that comes again is the same one
_LOG_LINES = 15
_GPU = re.compile(r"cuda(:\d+)?")


class StopSignals:
    """Within this context the first Ctrl-C or SIGTERM asks to stop, and the second one stops at once.

    To a process that another one waits for the same signal may come twice: sent to both, and passed on.
    """

    def __init__(self) -> None:
        self.count = 0
        self._first = 0.0  # when the first one came
        self._parent = parent()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals come to the main thread, which is somebody else's
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def wanted(self) -> bool:
        """True once a signal came, or the process that waits for this one is gone."""
        return self.count > 0 or (self._parent is not None and os.getppid() != self._parent)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.count == 1 and self._parent is not None and now - self._first < _ECHO:
            return
        self.count, self._first = self.count + 1, self._first or now
        if self.count > 1:
            raise UserInterrupt


def at_its_word() -> bool:
    """A process is done if its exit code says so."""
    return True


@dataclass(frozen=True)
class Child:
    """A run in a process of its own."""

    label: str
    command: Sequence[str]
    folder: Path  # where its record grows
    log: Path
    steps: int
    threads: int | None = None  # of the run's earlier starts; None: those of its slot's share
    finished: Callable[[], bool] = at_its_word  # asked once it has ended well: a part may end the process at any time


@dataclass(frozen=True)
class Failure:
    """A child that ended badly."""

    child: Child
    code: int
    why: str = ""  # it could not be started

    @property
    def reason(self) -> str:
        """The error that ended it, as it says; "" if it could not say."""
        lines = self.child.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = next((line for line in reversed(lines) if line.startswith("error: ")), "")
        return said.removeprefix("error: ")

    def __str__(self) -> str:
        if self.why:
            return f"{self.child.label} failed: it could not be started: {self.why}"
        how = f"exit code {self.code}" if self.code >= 0 else f"killed by {signal.Signals(-self.code).name}"
        if self.code in (0, INTERRUPTED):
            how += ", but the run neither finished nor was stopped: a part ended the process (os._exit)"
        lines = self.child.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        tail = "\n".join(f"  | {line}" for line in lines)
        return f"{self.child.label} failed: {how}; the end of {self.child.log}:\n{tail}"


class Started(Protocol):
    """A process, as `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """The exit code, if it has ended; negative: of a signal."""

    def wait(self) -> int:
        """The exit code, once it has ended."""

    def terminate(self) -> None:
        """Asks it to stop."""

    def kill(self) -> None:
        """Ends it."""


class Starter(Protocol):
    """A way to start children."""

    def ready(self) -> bool:
        """True if a child may be started now."""

    def start(self, child: Child, environment: Mapping[str, str]) -> Started:
        """A process that runs the child's command, adds to its log and leads a group of its own.

        A terminal's Ctrl-C then reaches this process only, which passes it on once.

        Raises:
            OSError: if it cannot be started.
        """


class Cold:
    """A new interpreter for each child."""

    def ready(self) -> bool:
        """Always."""
        return True

    def start(self, child: Child, environment: Mapping[str, str]) -> Started:
        """A process of its own from the beginning."""
        with child.log.open("ab") as log:
            return subprocess.Popen(
                child.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,
            )


def run_children(
    children: Sequence[Child], shares: Sequence[Mapping[str, str]], shown: Display, starter: Starter | None = None
) -> tuple[list[Failure], bool]:
    """Runs every child, in this order, one at a time in each slot; a failing one does not stop the others.

    Ctrl-C tells the children that run to stop and waits for them; a second one kills them.

    Args:
        children: what to run.
        shares: for each slot, the environment variables of its share of the machine.
        shown: where progress goes.
        starter: how they are started; None: each is a new interpreter.

    Returns:
        The failures in the order they happened, and whether any child was stopped before it was done.
    """
    waiting, working, starter = deque(children), dict[int, _Working](), starter or Cold()
    failures: list[Failure] = []
    interrupted = told = False
    with StopSignals() as stop, _killed_on_error(working):
        while working or (waiting and not told):
            for slot, share in enumerate(shares):
                if slot not in working and waiting and not told and starter.ready():
                    child = waiting.popleft()
                    try:
                        working[slot] = _Working(child, share, shown, starter)
                    except OSError as error:
                        why = f"{error.filename or child.log}: {error.strerror}; move or mend it"
                        failures.append(Failure(child, 1, f"{why}, then give the same command again"))
            for slot, each in list(working.items()):
                code = each.look(told)
                if code is not None:
                    del working[slot]
                    interrupted |= code == INTERRUPTED and not each.failed
                    failures += [Failure(each.child, code)] if each.failed else []
            if stop.wanted() and not told:
                told = interrupted = True
                shown.say("stopping: each run saves its state after the step it is in; Ctrl-C again aborts at once")
                for each in working.values():
                    each.process.terminate()
            time.sleep(_LOOK_EVERY)
    return failures, interrupted


class _Working:
    """A child that was started."""

    def __init__(self, child: Child, share: Mapping[str, str], shown: Display, starter: Starter) -> None:
        self.child, self._shown, self.failed = child, shown, False
        self._record = Record(child.folder, child.steps)
        child.log.parent.mkdir(parents=True, exist_ok=True)
        with child.log.open("ab") as log:
            log.write(f"--- {shlex.join(child.command)}\n".encode(errors="surrogateescape"))
        self.process = starter.start(child, _environment(child, share))
        shown.show(child.label, self._record.read())

    def look(self, told: bool) -> int | None:
        """Shows progress; the exit code once the child has ended."""
        code = self.process.poll()
        self._shown.show(self.child.label, self._record.read())
        if code is None:
            return None
        if told and code == -signal.SIGTERM:  # it was still starting and had nothing to save
            code = INTERRUPTED
        self.failed = not self._believed(code, told)
        ends = {0: "finished", INTERRUPTED: "interrupted"}
        self._shown.end(self.child.label, "failed" if self.failed else ends[code])
        return code

    def _believed(self, code: int, told: bool) -> bool:
        """True if a child is finished or was stopped, as its exit code says."""
        if code == INTERRUPTED:
            return told or GOES_ON in self.child.log.read_text(errors="replace").rpartition("\n--- ")[2]
        return code == 0 and self.child.finished()


def _environment(child: Child, share: Mapping[str, str]) -> dict[str, str]:
    """What a child finds in its environment: its share, in which every variable names one number of threads."""
    threads = child.threads or int(share.get(VARIABLES[0], 0))
    decided = thread_variables(allowed(threads)) if threads else {}
    return {**started_alone(os.environ), **share, **decided, PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}


@contextmanager
def _killed_on_error(working: Mapping[int, _Working]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for each in working.values():
            each.process.kill()
            each.process.wait()
        raise


def divide(
    cores: int,
    gpus: Sequence[str],
    devices: Set[str],
    jobs: int | None,
    runs: int,
    processes: int = 1,
    gpu_each: bool = False,
) -> list[dict[str, str]]:
    """The environment variables of each slot, so that runs at the same time do not fight for cores or GPUs.

    A slot's runs see one GPU, of which they make `cuda:0`, as long as they take whatever GPU they are given; all
    processes of a run share it, unless each is to have one: then they see as many. Where any of them names a device by
    number, for itself or for a reward, all of them see all GPUs, under the numbers they have here, and there is one run
    at a time unless `jobs` says otherwise: who names devices has shared them out.

    Args:
        cores: CPU cores there are.
        gpus: ids of the GPUs there are.
        devices: every device the runs name, see `devices_of`.
        jobs: runs at a time; None: one for each GPU if the runs use them, else one for each core, or for as many of
            them as a run has processes.
        runs: how many runs there are in all.
        processes: of each run.
        gpu_each: each process has a GPU of its own.
    """
    spread = bool(gpus) and devices <= {"auto", "cpu", "cuda"} and devices != {"cpu"}
    each = processes if gpu_each else 1  # GPUs of a run
    groups = [",".join(gpus[first : first + each]) for first in range(0, len(gpus) - each + 1, each)]
    if jobs is None:
        # A device named by number, or one this function knows nothing of, is taken to hold one run.
        jobs = len(groups) if spread else cores // processes if devices <= {"auto", "cpu"} else 1
    jobs = max(1, min(jobs, runs))
    shares = [thread_variables(max(1, cores // (jobs * processes))) for _ in range(jobs)]
    if spread:
        for slot, share in enumerate(shares):
            share["CUDA_VISIBLE_DEVICES"] = groups[slot % len(groups)]
    return shares


def devices_of(experiment: Experiment) -> set[str]:
    """Every device an experiment names: its own, and those of rewards and of any other part."""
    return {device for _, device in _devices((), experiment.model_dump(mode="json"))}


def named_gpus(experiment: Experiment) -> list[tuple[Location, str]]:
    """The GPUs that an experiment names by number, with their places in it."""
    found = _devices((), experiment.model_dump(mode="json"))
    return [(location, device) for location, device in found if device.startswith("cuda:")]


def _devices(place: Location, value: object) -> Iterator[tuple[Location, str]]:
    """What is called a device or reads like a GPU, in plain data of a spec at a place."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _devices((*place, name), each)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _devices((*place, index), each)
    elif isinstance(value, str) and (_named(place) == "device" or _GPU.fullmatch(value)):
        yield place, value


def _named(place: Location) -> str | int:
    """The key of a value, of one in a list the list's."""
    return next((name for name in reversed(place) if isinstance(name, str)), "")


def usable_cores() -> int:
    """CPU cores this process may use: its affinity, within the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def usable_gpus() -> tuple[str, ...]:
    """Ids of the CUDA devices this process may use; torch is asked only where there is an NVIDIA driver."""
    if not (Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()):
        return ()
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",")[:count]) if visible else tuple(str(index) for index in range(count))
