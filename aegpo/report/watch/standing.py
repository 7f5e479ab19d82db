"""How one run stands: whether it waits, runs, has ended or died, how far it is and what it has cost so far."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from aegpo.errors import CheckpointError
from aegpo.report.scores import WORK
from aegpo.runs.child_processes import GOES_ON
from aegpo.runs.folders import holder, is_finished
from aegpo.runs.manifest import read_manifest
from aegpo.runs.progress import FORWARDS, REWARD, Tail
from aegpo.runs.records import Row
from aegpo.runs.resuming import METRICS, TIMING

State = Literal["waiting", "running", "finished", "stopped", "failed", "died"]
UNDER_WAY = ("waiting", "running")  # states of which more is to be expected
_ELSEWHERE = 2  # looks at which a record must have grown whose process is not here, before it is one of another machine
_SILENT = 60.0  # seconds without a row after which such a run counts as gone, or ten steps of it if that is longer


@dataclass(frozen=True)
class Standing:
    """A run at one moment."""

    arm: str
    seed: int
    state: State
    why: str  # what is known of its end, "" if nothing
    step: int
    total: int | None  # training steps; None: it has not begun
    seconds: float  # wall-clock so far, evaluations included
    cost: float  # in forwards, as in the report
    forwards: int
    reward: float | None  # mean over the last step's rollouts

    @property
    def share(self) -> float:
        """How much of it is done, in [0, 1]."""
        return self.step / self.total if self.total else 0.0

    @property
    def pace(self) -> float | None:
        """Seconds of a training step, its share of evaluations included; None before the first."""
        return self.seconds / self.step if self.step else None

    @property
    def left(self) -> float | None:
        """Seconds until it is done at this pace; None if that is not known, or it does not run."""
        if self.state != "running" or self.pace is None or self.total is None:
            return None
        return self.pace * (self.total - self.step)


class _Told(Row):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Metrics(_Told):
    metrics: dict[str, float]


class _Seconds(_Told):
    seconds: dict[str, float]


class Reader:
    """Reads one run again and again; of its growing files only what is new."""

    def __init__(self, folder: Path, arm: str, seed: int) -> None:
        self.folder, self.arm, self.seed = folder, arm, seed
        self._tails = (Tail(folder / METRICS, _Metrics), Tail(folder / TIMING, _Seconds))
        self._forget()
        self._sizes = self._measured()
        self._grown, self._grown_at = 0, 0.0  # looks at which nobody here was writing and it grew all the same

    def standing(self) -> Standing:
        """The run as it is now.

        Raises:
            OSError: if a file goes away while it is read.
        """
        if any(tail.replaced() for tail in self._tails):  # it goes on, and forgets what it will do again
            self._forget()
        for row in self._tails[0].rows(None):
            self._count(row["step"], row["metrics"])
        for row in self._tails[1].rows(None):
            self._seconds += sum(row["seconds"].values())
        total = self._total()
        state, why = self._state(total)
        known = (self._step, total, self._seconds, self._cost, self._forwards, self._reward)
        return Standing(self.arm, self.seed, state, why, *known)

    def _forget(self) -> None:
        for tail in self._tails:
            tail.rewind()
        self._step, self._forwards, self._cost, self._seconds = 0, 0, 0.0, 0.0
        self._reward: float | None = None

    def _count(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step, self._reward = step, metrics.get(REWARD, self._reward)
        self._cost += metrics.get(WORK, 0.0)
        self._forwards += int(sum(metrics.get(name, 0) for name in FORWARDS))

    def manifest(self) -> Mapping[str, Any] | None:
        """What is run; None before it has begun, or where it cannot be read."""
        try:
            return read_manifest(self.folder)
        except CheckpointError:
            return None

    def _total(self) -> int | None:
        manifest = self.manifest()
        total = None if manifest is None else manifest["experiment"].get("training_steps")
        return total if isinstance(total, int) else None

    def _state(self, total: int | None) -> tuple[State, str]:
        if total is not None and self._marked(total):
            return "finished", ""
        if self._alive() or self._elsewhere():
            return "running", "" if self._step else "its model is loaded, or its base evaluated"
        said = self._log()
        if (error := next((line for line in reversed(said) if line.startswith("error: ")), None)) is not None:
            return "failed", error.removeprefix("error: ")
        if total is None:
            return "waiting", ""
        if any(GOES_ON in line for line in said) or self._saved() == self._step > 0:
            return "stopped", "the same command goes on from here"
        return "died", f"the same command goes on from step {self._saved()}"

    def _marked(self, total: int) -> bool:
        try:
            return is_finished(self.folder, total)
        except CheckpointError:
            return False

    def _alive(self) -> bool:
        """True if the process that holds the folder is one of this machine, and lives."""
        process = holder(self.folder)
        if process is None or sys.platform == "win32":  # where asking would end it
            return False
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def _elsewhere(self) -> bool:
        """True if the record grows although nobody here writes it."""
        sizes, now = self._measured(), time.monotonic()
        if sizes != self._sizes:
            self._sizes, self._grown, self._grown_at = sizes, self._grown + 1, now
        patience = max(_SILENT, 10 * self._seconds / max(1, self._step))
        return self._grown >= _ELSEWHERE and now - self._grown_at < patience

    def _measured(self) -> tuple[int, ...]:
        paths = (self.folder / name for name in (METRICS, TIMING))
        return tuple(path.stat().st_size if path.is_file() else 0 for path in paths)

    def _log(self) -> list[str]:
        """What the last start printed, where it was in a process of its own."""
        log, lock = self.folder / "run.log", self.folder / ".lock"
        try:
            if lock.exists() and log.stat().st_mtime < lock.stat().st_mtime - 1:
                return []  # of an earlier start
            return log.read_text(encoding="utf-8", errors="replace").rpartition("--- ")[2].splitlines()
        except OSError:
            return []

    def _saved(self) -> int:
        """The step of the newest checkpoint; 0: there is none."""
        names = [path.name.removeprefix("step-") for path in (self.folder / "checkpoints").glob("step-*")]
        return max((int(name) for name in names if name.isdecimal()), default=0)
