"""What a section is given, what it leaves, and how one is run so that no other one suffers from it.

A section is a generator of rows: numbers by name, each printed and put into the file as soon as it is known. It runs in
a process of its own, forked from one that has imported everything and never touched CUDA: a kernel that breaks the
context, or memory that is not given back, is then that section's alone. Where imports did touch it, it is spawned.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from typing import Literal

Method = Literal["fork", "spawn"]
Value = str | int | float | bool | None
Row = Mapping[str, Value]
GRACE = 5.0  # seconds a section that was told to end may take


@dataclass(frozen=True)
class Job:
    """What a section is given."""

    dry: bool  # tiny sizes on a CPU
    folder: Path  # empty; gone when the section ends
    deadline: float  # on `time.monotonic`

    @property
    def device(self) -> str:
        """Where it computes."""
        return "cpu" if self.dry else "cuda"

    @property
    def left(self) -> float:
        """Seconds until it is ended."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Section:
    """One question."""

    name: str
    asks: str
    run: Callable[[Job], Iterator[Row]]
    seconds: float  # it takes about so long on an H100: it is not begun with less left


class Record:
    """Where rows go: to the terminal, and to the end of a file."""

    def __init__(self, path: Path, common: Row) -> None:
        """`common`: what every row says too."""
        self._path, self._common = path, common

    def add(self, section: str, row: Row) -> None:
        """Prints and appends a row at once, so that a run that is cut off has told it."""
        said = {name: _in_json(value) for name, value in {"section": section, **row, **self._common}.items()}
        line = json.dumps(said)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def context(method: Method) -> ForkContext | SpawnContext:
    """How processes begin."""
    return multiprocessing.get_context("fork") if method == "fork" else multiprocessing.get_context("spawn")


def _in_json(value: Value) -> Value:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def failure(row: Row) -> bool:
    """True for a row that says that something went wrong."""
    return "error" in row or row.get("ok") is False


def run_apart(section: Section, dry: bool, deadline: float, record: Record, method: Method) -> bool:
    """Runs a section in a process of its own; True if all went well. One that is still at it is ended in time.

    `method`: how the process begins, fork or spawn.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        job = Job(dry, Path(folder), deadline)
        child = context(method).Process(target=_child, args=(section, job, record))
        child.start()
        child.join(max(0.0, job.left))
        late = child.is_alive()
        if late and child.pid is not None:
            _end(child, child.pid)
    seconds = round(time.monotonic() - begin, 1)
    if late:
        record.add(section.name, {"error": "ended, for time was over", "section_seconds": seconds})
    elif child.exitcode not in (0, 1):
        record.add(section.name, {"error": f"ended with {child.exitcode}", "section_seconds": seconds})
    return child.exitcode == 0


def _end(child: multiprocessing.process.BaseProcess, group: int) -> None:
    """Ends a section and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(group, number)
        child.join(GRACE)
        if not child.is_alive():
            return


def _child(section: Section, job: Job, record: Record) -> None:
    os.setsid()
    os.environ["AEGPO_CACHE"] = str(job.folder / "cache")
    begin, fine = time.monotonic(), True
    try:
        for row in section.run(job):
            fine = fine and not failure(row)
            record.add(section.name, row)
    except BaseException as error:
        fine = False
        record.add(section.name, {"error": told(error), "at": place(error)})
    record.add(section.name, {"section_seconds": round(time.monotonic() - begin, 1)})
    raise SystemExit(0 if fine else 1)


def told(error: BaseException) -> str:
    """An error in one line, and what caused it."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    return said if error.__cause__ is None else f"{said} <- {told(error.__cause__)}"


def place(error: BaseException) -> str:
    """The last line of the traceback that is there: file, line and what stands in it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{'/'.join(Path(frames[-1].filename).parts[-3:])}:{frames[-1].lineno} {frames[-1].line}" if frames else ""
