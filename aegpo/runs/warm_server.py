"""Runs that start by a fork of a process which has imported everything, in milliseconds instead of seconds.

    with warm_server() as starter: run_children(children, shares, shown, starter)

Where the platform cannot, or the process does not come up, runs start as ever. A run that starts so has its own log,
group, environment, exit code and signals; to it the process that waits is the server, which ends with this one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from aegpo.core.processes import started_alone
from aegpo.runs.child_processes import INTERRUPTED, Child, Cold, Started, Starter
from aegpo.runs.threads import VARIABLES, allowed, thread_variables

COLD = "AEGPO_COLD_START"  # environment variable: if it is set, every run imports for itself
_MODULE = "aegpo.commands.warm"
_COMMAND = [sys.executable, "-m", "aegpo"]


def starting(children: int, shares: Sequence[Mapping[str, str]]) -> AbstractContextManager[Starter]:
    """How so many runs are best started: from a server if there are several and it may fork for them.

    That is on Linux, for runs that have one thread and no GPU, unless the user does not want it.
    """
    can = sys.platform == "linux" and hasattr(os, "pidfd_open") and not os.environ.get(COLD)
    alone = all(allowed(int(share[VARIABLES[0]])) == 1 and "CUDA_VISIBLE_DEVICES" not in share for share in shares)
    return warm_server() if can and alone and children > 1 else nullcontext(Cold())


@contextmanager
def warm_server() -> Iterator[Starter]:
    """Starts the server, and ends it with the block; no run is to be at work then."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**started_alone(os.environ), **thread_variables(1), "PYTHONUNBUFFERED": "1"},
                pass_fds=(theirs.fileno(),),
                process_group=0,
            )
        try:
            yield _Server(ours)
        finally:
            process.kill()
            process.wait()


class _GoneError(Exception):
    """The server does not answer any more."""


class _Server:
    """Starts runs by asking the server to fork."""

    def __init__(self, link: socket.socket) -> None:
        self._link, self._answers, self._warm = link, link.makefile("rb"), False
        self._cold = Cold()
        self._gone = False

    def ready(self) -> bool:
        """True once the server has imported everything, or has ended."""
        if not self._warm and not self._gone and _readable(self._link.fileno(), 0):
            try:
                self._warm = bool(self._answer()["ready"])
            except _GoneError:
                self._gone = True
        return self._warm or self._gone

    def start(self, child: Child, environment: Mapping[str, str]) -> Started:
        """A fork, unless the run is to have more threads than one, which libraries are told when they are imported."""
        words, threads = child.command[len(_COMMAND) :], {environment.get(name) for name in VARIABLES}
        if self._gone or threads != {"1"} or [*child.command] != [*_COMMAND, *words]:
            return self._cold.start(child, environment)
        try:
            said = self._ask({"words": words, "environment": dict(environment), "log": str(child.log)})
        except _GoneError:
            self._gone = True
            return self._cold.start(child, environment)
        if "errno" in said:
            raise OSError(said["errno"], os.strerror(said["errno"]))
        return _Forked(self, child, said["pid"])

    def code(self, child: Child, number: int) -> int:
        """The exit code of a run that has ended.

        Without the server nobody knows it: a run that nobody waits for saves its state and stops.
        """
        try:
            return int(self._ask({"ended": number})["code"])
        except _GoneError:
            self._gone = True
            return 0 if child.finished() else INTERRUPTED

    def _ask(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            self._link.sendall(json.dumps(asked).encode() + b"\n")
        except OSError as error:
            raise _GoneError from error
        return self._answer()

    def _answer(self) -> Mapping[str, Any]:
        try:
            line = self._answers.readline()
        except OSError as error:
            raise _GoneError from error
        if not line.endswith(b"\n"):
            raise _GoneError
        answer: Mapping[str, Any] = json.loads(line)
        return answer


class _Forked:
    """A run that the server has forked; a handle of the system means this process also once its number is another's."""

    def __init__(self, server: _Server, child: Child, number: int) -> None:
        self._server, self._child, self._number = server, child, number
        self._handle = os.pidfd_open(number)
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, if it has ended; negative: of a signal."""
        return self._ended(0)

    def wait(self) -> int:
        """The exit code, once it has ended."""
        while (code := self._ended(1000)) is None:
            pass
        return code

    def terminate(self) -> None:
        """Asks it to stop."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it."""
        self._signal(signal.SIGKILL)

    def _ended(self, patience: int) -> int | None:
        if self._code is None and _readable(self._handle, patience):
            self._code = self._server.code(self._child, self._number)
            os.close(self._handle)
        return self._code

    def _signal(self, number: signal.Signals) -> None:
        if self._code is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)


def _readable(descriptor: int, patience: int) -> bool:
    """True if something is there to be read, or comes within so many milliseconds."""
    look = select.poll()
    look.register(descriptor, select.POLLIN)
    return bool(look.poll(patience))
