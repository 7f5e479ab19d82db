"""Both sides, each in a process of its own, of which one works at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_rivals.cases import Case, Turn
from bench_rivals.serving import STEP, STOP, serve, tail

PATIENCE = 900.0  # seconds a side may take for a step, or to be ready
PATIENCE_AT_THE_END = 10.0  # seconds it may take to end


class Side:
    """A process that does training steps."""

    def __init__(self, module: str, case: Case) -> None:
        self._case, self._module = case, module
        spawned = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawned.Pipe()
        self._process = spawned.Process(target=serve, args=(theirs, module, case), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def step(self) -> Turn:
        """One training step."""
        self._pipe.send(STEP)
        answer = self._answer()
        assert isinstance(answer, Turn)
        return answer

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):  # it may have ended
            self._pipe.send(STOP)
            self._process.join(PATIENCE_AT_THE_END)
        if self._process.is_alive():
            self._process.kill()

    def _answer(self) -> Any:
        try:
            if self._pipe.poll(PATIENCE):
                return self._pipe.recv()
        except EOFError:
            pass
        self._process.kill()
        folder = self._case.folder
        raise SideError(f"{self._module} failed; the end of {folder / 'log.txt'}:\n{tail(folder)}")


class SideError(Exception):
    """A side cannot go on."""


@dataclass
class Series:
    """A side's training steps."""

    module: str  # here
    case: Case
    warm_up: Turn | None = None
    turns: list[Turn] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """What each step took: processor time, or on a GPU wall-clock."""
        return [turn.processor if self.case.device == "cpu" else turn.wall for turn in self.turns]

    @property
    def rows(self) -> str:
        """Rows without and with gradient of a step."""
        return " or ".join(sorted({f"{turn.rows} + {turn.learning_rows}" for turn in self.turns}))


def take_turns(series: Sequence[Series], turns: int) -> None:
    """One step each to warm up, and then so many in turns."""
    sides: list[Side] = []
    try:
        for each in series:
            sides.append(Side(each.module, each.case))
            each.warm_up = sides[-1].step()
        for _ in range(turns):
            for each, side in zip(series, sides, strict=True):
                each.turns.append(side.step())
    finally:
        for side in sides:
            side.stop()


def environment(device: str, home: Path) -> None:
    """What all sides' processes inherit: one thread, no downloads, and no GPU where none is wanted."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(home / "datasets"),
    }
    if device == "cpu":
        os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
