"""Starts the processes of one run on this machine, and all of them again when one was lost.

The agent is torch's (`torch.distributed.launcher`), as torchrun has it, with a function in place of a command: a run
that ends by an error on which its processes agree is over, and only one that lost a process is started again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, TypeVar

from aegpo.core.processes import PARENT, parent
from aegpo.errors import ProcessLostError
from aegpo.parallel.watch import OtherProcess

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

A = TypeVar("A")
STOPPED = 130  # exit code of processes that the user stopped, as shells have it
_LOGGERS = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LINGERS = {STOPPED: 2.0}  # seconds that an ended process waits for an agent to ask for its code
_LINGER = 20.0
_SILENCE = 120.0  # seconds that the processes of a group may take to start, the modules they need included


@dataclass(frozen=True)
class Group:
    """The processes of one run on this machine."""

    processes: int
    restarts: int  # how often all are started again after one was lost
    patience: float  # seconds that they have to end once they are told to
    environment: Mapping[str, str]


def run_group(group: Group, entry: Callable[[A], int], argument: A) -> int:
    """Runs a function in every process of a group, until it has an exit code.

    Ctrl-C and SIGTERM are passed on, once each.

    Args:
        group: the processes.
        entry: of a module, returns the exit code of its process, on which all agree; a process that ends in any other
            way is lost.
        argument: what it gets.

    Raises:
        ProcessLostError: if a process was lost more often than the group is started again.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    told = {**group.environment, PARENT: str(os.getpid()), "TORCH_CPP_LOG_LEVEL": _log_level()}
    guard = _Guard(parent())
    with _own_signals(), _quiet(), _environment(told), tempfile.TemporaryDirectory() as folder:
        guard.start()
        try:
            codes = elastic_launch(_config(group, f"{folder}/agent"), _process)(entry, argument, guard.started)
        except SignalException:
            if not guard.silent:
                return STOPPED
            raise ProcessLostError(
                f"the {group.processes} processes of this run ended without a word: a part ended them (os._exit); the "
                "same command goes on from the newest checkpoint"
            ) from None
        except ChildFailedError as error:
            raise _lost(group, error) from None
        finally:
            guard.over.set()
    return _agreed([int(code) for code in codes.values()])


def _agreed(codes: list[int]) -> int:
    """The exit code of processes that ended: theirs, or 1 where an error was nobody's fault but ours."""
    return codes[0] if len(set(codes)) == 1 else 1


def _lost(group: Group, error: ChildFailedError) -> ProcessLostError:
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    often = {0: "", 1: " after 1 restart"}.get(group.restarts, f" after {group.restarts} restarts")
    return ProcessLostError(
        f"process {rank} of the {group.processes} of this run {how}{often}; the same command goes on from the newest "
        "checkpoint"
    )


def _config(group: Group, file: str) -> LaunchConfig:
    """How torch's agent is to do it. What it notes is pickled: it does so in a file of the user's, and on no port."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    options: dict[str, Any] = {
        "shutdown_timeout": max(1, round(group.patience)),
        "signals_to_handle": ",".join(each.name for each in _SIGNALS),
    }
    known = {field.name for field in fields(LaunchConfig)}  # torch before 2.13 ends processes after 30 seconds
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=group.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=file,
        rdzv_configs={"store_type": "file"},
        local_addr="localhost",
        max_restarts=group.restarts,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        **{name: value for name, value in options.items() if name in known},
    )


# --- in each process --------------------------------------------------------------------------------------------------


def _process(entry: Callable[[A], int], argument: A, started: SimpleQueue[int]) -> int:
    """What a process of the group does."""
    if sys.platform != "win32":
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the agent only, which passes it on
    started.put(os.getpid())
    code = entry(argument)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    threading.Thread(target=_leave, args=(code,), daemon=True).start()
    return code


def _leave(code: int) -> None:
    """Ends a process that returned its code: an agent that was told to stop never asks for it."""
    time.sleep(_LINGERS.get(code, _LINGER))
    os._exit(code or 1)


# --- in the agent -----------------------------------------------------------------------------------------------------


class _Guard(threading.Thread):
    """Ends a group, as Ctrl-C does, once nobody waits for it, or it is gone and torch's agent has not noticed.

    To that agent a process that ends with exit code 0 before its function returned is one that goes on.
    """

    def __init__(self, waiting: int | None) -> None:
        """`waiting`: the process that waits for this one, if one does."""
        super().__init__(name="aegpo-guard", daemon=True)
        self.started: SimpleQueue[int] = get_context("spawn").SimpleQueue()  # numbers of processes
        self.over, self.silent = threading.Event(), False
        self._waiting = waiting

    def run(self) -> None:
        """Looks every second."""
        alive, seen = list[OtherProcess](), time.monotonic()
        while not self.over.wait(1.0):
            while not self.started.empty():
                alive.append(OtherProcess(self.started.get()))
                seen = time.monotonic()
            alive = [each for each in alive if not each.gone()]
            seen = time.monotonic() if alive else seen
            self.silent = time.monotonic() - seen > _SILENCE
            if self.silent or (self._waiting is not None and os.getppid() != self._waiting):
                os.kill(os.getpid(), signal.SIGTERM)
                return


@contextmanager
def _own_signals() -> Iterator[None]:
    """Inside, torch may watch for signals; after it they mean what they did."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torch's agent logs nothing: what went wrong is told by the processes, and by what the agent raises."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before, nowhere = [each.propagate for each in loggers], logging.NullHandler()
    for each in loggers:
        each.propagate = False
        each.addHandler(nowhere)
    try:
        yield
    finally:
        for each, propagates in zip(loggers, before, strict=True):
            each.propagate = propagates
            each.removeHandler(nowhere)


@contextmanager
def _environment(told: Mapping[str, str]) -> Iterator[None]:
    """Inside, processes that are started find these variables."""
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _log_level() -> str:
    return os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
