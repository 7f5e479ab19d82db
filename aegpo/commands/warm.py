"""A process that imports what every run imports and forks for each: `aegpo.runs.warm_server` starts it and asks it.

    python -m aegpo.commands.warm SOCKET

It only imports: no plugin, no model and no GPU, and it has one thread, for a fork of more is not safe; where a library
has started some, it ends, and runs are started as ever. What becomes a run goes on as `python -m aegpo` would, to the
interpreter's end.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aegpo.core.processes import PARENT

IMPORTED = (
    "aegpo.commands.cli",
    "aegpo.commands.run",
    "aegpo.method.signals.entropy_probe",
    "aegpo.models.shapes.model",  # and diffusers, peft and transformers
    "aegpo.runs.loop",
    "aegpo.runs.trackers",
    "aegpo.train.engine",
)
_THREADS = Path("/proc/self/task")


def main() -> None:
    """Says that it is ready, answers until nobody asks any more, and becomes a run in every process that it forks."""
    with socket.socket(fileno=int(sys.argv[1])) as link:
        for name in IMPORTED:
            importlib.import_module(name)
        if len(list(_THREADS.iterdir())) > 1:
            return
        gc.freeze()  # what is here stays shared memory
        _say(link, {"ready": True})
        job = _serve(link)
    if job is not None:
        _become(job)
        runpy.run_module("aegpo", run_name="__main__", alter_sys=True)


def _serve(link: socket.socket) -> Mapping[str, Any] | None:
    """Answers; in a process that was forked it returns what that is to run, and here None at the end."""
    with link.makefile("rb") as lines:
        for line in lines:
            asked = json.loads(line)
            if "ended" in asked:
                _say(link, {"code": os.waitstatus_to_exitcode(os.waitpid(asked["ended"], 0)[1])})
                continue
            server = os.getpid()
            try:
                child = os.fork()
            except OSError as error:
                _say(link, {"errno": error.errno})
                continue
            if child == 0:
                return {**asked, "server": server}
            _say(link, {"pid": child})
    return None


def _become(job: Mapping[str, Any]) -> None:
    """Takes what a process of its own would be started with: group, streams, environment, command line."""
    os.setpgid(0, 0)
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.environ.clear()
    os.environ.update({**job["environment"], PARENT: str(job["server"])})
    sys.argv[1:] = job["words"]


def _say(link: socket.socket, said: Mapping[str, Any]) -> None:
    link.sendall(json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    main()
