"""A warm interpreter that forks for each command, so that hundreds of them take minutes, not hours.

A fork runs the entry point of `python -m aegpo` with its own output, environment, folder and limits; its exit code,
output and tracebacks are those of a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CALM = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
CALM |= {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
MOST_OUTPUT = 20_000_000  # bytes


@dataclass(frozen=True)
class Ended:
    """How a command ended: the code of a signal is negative; `hangs`: its time ran out; `memory`: its peak, bytes."""

    code: int
    out: str
    seconds: float
    memory: int
    hangs: bool

    @property
    def error(self) -> str:
        """The line that starts with `error:`, or nothing."""
        return next((line for line in self.out.splitlines() if line.startswith("error:")), "")

    @property
    def traceback(self) -> bool:
        """Whether a traceback is printed."""
        return "Traceback (most recent call last)" in self.out


class Warm:
    """Runs command lines in forks of one interpreter that has imported what they need."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("forking.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(command, env=os.environ | CALM, text=True, **pipes)
        self._answer()

    def __call__(
        self,
        words: Sequence[object],
        folder: Path,
        *,
        seconds: float = 60,
        memory: float = 0,
        environment: Mapping[str, str | None] | None = None,
    ) -> Ended:
        """Runs `aegpo WORDS` in a folder.

        Args:
            words: The command line.
            folder: The working directory.
            seconds: Processor time it may take; of the clock it may take ten times that and a minute.
            memory: Bytes of address space it may take; 0 for no limit.
            environment: Variables to set, or to take away where the value is None.
        """
        handle, name = tempfile.mkstemp(prefix="aegpo-fork-")
        os.close(handle)
        job = {"words": [str(word) for word in words], "folder": str(folder), "out": name, "memory": int(memory)}
        self._ask(job | {"seconds": seconds, "environment": dict(environment or {})})
        answer = self._answer()
        with Path(name).open("rb") as file:
            text = file.read(MOST_OUTPUT).decode("utf-8", "replace")
        Path(name).unlink()
        return Ended(answer["code"], text, answer["seconds"], answer["memory"], answer["hangs"])

    def close(self) -> None:
        """Ends the interpreter."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def _ask(self, job: dict[str, object]) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()

    def _answer(self) -> dict:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the interpreter that forks has ended"
        return json.loads(line)
