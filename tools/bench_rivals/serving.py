"""A side in a process of its own: it does a training step when it is told to, and says what the step took."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench_rivals.cases import Case, Turn
from bench_rivals.counting import Rows

STEP, STOP = "step", "stop"


class Stopped(BaseException):
    """No further step is wanted; no rival catches it."""


class Server:
    """Stands between the training steps of a side."""

    def __init__(self, pipe: Connection, device: str) -> None:
        self.rows = Rows()
        self.rows.watch()
        self._pipe, self._cuda = pipe, device != "cpu"
        self._running = False
        self._said: dict[str, Any] = {}
        self._processor = self._wall = 0.0
        self.steps = 0  # that were begun

    def boundary(self) -> None:
        """To be called before every training step, and so after the one before; returns when the next one is wanted.

        Raises:
            Stopped: if none is.
        """
        if self._running:
            self._synchronize()
            spent = time.process_time() - self._processor, time.perf_counter() - self._wall
            self._pipe.send(Turn(*spent, self.rows.plain, self.rows.learning, self._said))
            self._said = {}
        else:
            self._pipe.send("ready")
        if self._pipe.recv() != STEP:
            raise Stopped
        self._running = True
        self.steps += 1
        self.rows.clear()
        self._synchronize()
        self._processor, self._wall = time.process_time(), time.perf_counter()

    def say(self, **said: Any) -> None:
        """Adds to what is told of the present step."""
        self._said |= said

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def serve(pipe: Connection, side: str, case: Case) -> None:
    """The life of a side's process: `side` is a module here with a function `train(case, server)`."""
    log = os.open(case.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(case.folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for who waits
    sys.argv = [side]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        importlib.import_module(f"bench_rivals.{side}").train(case, Server(pipe, case.device))
    except Stopped:
        pass
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def tail(folder: Path, lines: int = 25) -> str:
    """The end of what a side printed."""
    return "\n".join((folder / "log.txt").read_text(errors="replace").splitlines()[-lines:])
