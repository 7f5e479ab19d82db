"""`aegpo` as tests call it: in this process where the process is not the point, else in one of its own."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from aegpo.commands.cli import main


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    code: int
    stdout: str
    stderr: str


def aegpo(*words: str) -> Done:
    """Runs a command line in this process and the current folder, from the entry point on."""
    out, errors = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["aegpo", *words]
    try:
        with redirect_stdout(out), redirect_stderr(errors):
            code = _exit_code()
    finally:
        sys.argv = before
    return Done(code, out.getvalue(), errors.getvalue())


def _exit_code() -> int:
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("the entry point ends with SystemExit")


def start(
    *words: str, folder: Path | None = None, stderr: int | None = subprocess.STDOUT, **environment: str
) -> subprocess.Popen[str]:
    """Starts a command line in a process of its own, which hears Ctrl-C; its output is a pipe."""
    command, variables = [sys.executable, "-m", "aegpo", *words], os.environ | environment
    with _ctrl_c_is_heard():
        return subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=stderr, text=True)


@contextmanager
def _ctrl_c_is_heard() -> Iterator[None]:
    """Inside, SIGINT is not ignored, as in a terminal; a script's background job and what it starts are deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
