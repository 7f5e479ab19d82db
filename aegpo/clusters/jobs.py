"""The job of one run: its command, started by a cluster as often as it takes, and what is noted of its end.

What a cluster is given is strings, which any version of any pickler reads. The command is a child of the process that
the cluster started, and watches it: where that one is killed, the run saves its state and ends, and the job that is
started in its place waits for the run's lock.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from aegpo.clusters.notes import note_end
from aegpo.core.processes import PARENT, started_alone
from aegpo.runs.child_processes import INTERRUPTED
from aegpo.runs.folders import WAIT_FOR_LOCK

LOCK_PATIENCE = 300  # seconds that a job waits for the lock of the one before it: longer than a step
_LOOK_EVERY = 0.2
_MEETING = 300.0  # seconds that the first node of a job may take to say where it is
# Variables that a job on another machine gets as they are here; no secret is among them.
CARRIED = ("AEGPO_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH")


@dataclass(frozen=True)
class Job:
    """What a cluster starts for one run."""

    number: str  # of this submission, unlike any other
    words: tuple[str, ...]  # after the interpreter's name
    directory: str  # where they mean what they say
    log: str  # what the command prints is added to it
    end: str  # where its last exit code is noted
    environment: tuple[tuple[str, str | None], ...] = ()  # None: without the variable
    setup: tuple[str, ...] = ()  # lines of a shell before the command
    restarts: int = 0  # how often the command is started again after it was killed
    shares: tuple[tuple[tuple[str, str], ...], ...] = ()  # of the machine, one for each slot; (): all of it
    slots: str = ""  # folder of the locks on these
    nodes: int = 1
    processes: int = 1  # on each node, if there are several
    meeting: str = ""  # where the first node notes its address, if there are several


@dataclass(frozen=True)
class Node:
    """One of a job's machines."""

    rank: int = 0
    address: str = ""  # its own; "": its host name
    attempt: str = "0"  # how often the cluster has started the job before


class Work:
    """A job that was started on a node."""

    def __init__(self, job: Job, node: Node = Node()) -> None:
        self._job, self._node = job, node
        self._process: subprocess.Popen[bytes] | None = None
        self._told = False

    def run(self) -> int:
        """Runs the command to its end, and again if it was killed; notes the exit code, and returns it."""
        end = Path(self._job.end)
        if self._node.rank == 0:
            end.unlink(missing_ok=True)
        with ExitStack() as held:
            held.enter_context(self._passing_on())
            share = held.enter_context(self._slot())
            for _ in range(self._job.restarts + 1):
                code = INTERRUPTED if self._told else self._once(share)
                if code >= 0 or self._told:
                    break
        if self._node.rank == 0:
            note_end(end, self._job.number, code)
        return code

    def stop(self) -> None:
        """Asks the command to save its state and end."""
        self._told = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stopped(self) -> None:
        """Returns once a command that was asked to stop has ended."""
        self.stop()
        while self._process is not None and self._process.poll() is None:
            time.sleep(_LOOK_EVERY)

    def _once(self, share: Mapping[str, str]) -> int:
        job, log = self._job, Path(self._job.log)
        if self._node.rank > 0:
            log = log.with_name(f"{log.stem}-node-{self._node.rank}{log.suffix}")
        words = [sys.executable, *(self._over_nodes() if job.nodes > 1 else ()), *job.words]
        if job.setup:  # `exec`: the shell becomes the command, and signals reach it
            words = ["/bin/sh", "-c", " && ".join([*job.setup, f"exec {shlex.join(words)}"])]
        told = {PARENT: str(os.getpid()), WAIT_FOR_LOCK: str(LOCK_PATIENCE), "PYTHONUNBUFFERED": "1"}
        given = {**started_alone(os.environ), **dict(job.environment), **share, **told}
        environment = {name: value for name, value in given.items() if value is not None}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"--- {shlex.join(words)}\n".encode(errors="surrogateescape"))
            file.flush()
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=job.directory,
                env=environment,
                process_group=0,
            )
        if self._told:
            self._process.terminate()
        while (code := self._process.poll()) is None:  # not `wait`: a signal's handler may look at the process, too
            time.sleep(_LOOK_EVERY)
        if code == -signal.SIGTERM and self._told:  # it was still starting and had nothing to save
            return INTERRUPTED
        return code

    @contextmanager
    def _passing_on(self) -> Iterator[None]:
        """Inside, SIGTERM stops the command; where signals come to another thread, that one passes them on."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.stop()

        before = signal.signal(signal.SIGTERM, on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    @contextmanager
    def _slot(self) -> Iterator[Mapping[str, str]]:
        """Inside, one of the machine's shares is this job's; it waits until one is free."""
        from filelock import lock_descriptor

        if not self._job.shares:
            yield {}
            return
        with ExitStack() as held:
            files = []
            for index in range(len(self._job.shares)):
                path = Path(self._job.slots) / f"slot-{index}"
                path.parent.mkdir(parents=True, exist_ok=True)
                files.append(held.enter_context(path.open("ab+", buffering=0)))
            while not self._told:
                for file, share in zip(files, self._job.shares, strict=True):
                    if lock_descriptor(file.fileno(), blocking=False):
                        yield dict(share)
                        return
                time.sleep(_LOOK_EVERY)
            yield {}

    # --- several nodes ------------------------------------------------------------------------------------------------

    def _over_nodes(self) -> Sequence[str]:
        """How torchrun is started on this node, up to what it starts."""
        job = self._job
        where = Path(f"{job.meeting}-{self._node.attempt}")
        if self._node.rank == 0:
            address = self._node.address or socket.gethostname()
            where.parent.mkdir(parents=True, exist_ok=True)
            temporary = where.with_name(where.name + ".new")
            temporary.write_text(f"{address}:{_free_port()}", encoding="utf-8")
            temporary.replace(where)
        begin = time.monotonic()
        while not where.exists() and time.monotonic() - begin < _MEETING and not self._told:
            time.sleep(_LOOK_EVERY)
        endpoint = where.read_text(encoding="utf-8") if where.exists() else "nowhere:1"
        told = {
            "nnodes": str(job.nodes),
            "nproc-per-node": str(job.processes),
            "rdzv-backend": "c10d",
            "rdzv-id": f"{job.number}-{self._node.attempt}",
            "rdzv-endpoint": endpoint,
            "max-restarts": str(job.restarts),
        }
        return ["-m", "aegpo.clusters.node", *(f"--{name}={value}" for name, value in told.items())]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    return port
