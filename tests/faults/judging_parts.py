"""Runs a faulty plugin, and the same command without its fault; says all that is wrong with how these end."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from faulty_parts import Faulty
from warm import Ended, Warm

RUN = Path("tiny/main/seed-0")
RECORDS = ("metrics.jsonl", "evaluations.jsonl")


class Judge:
    """The runs of one case, in a folder of its own."""

    def __init__(
        self, warm: Warm, folder: Path, experiment: Path, case: Faulty, clean: dict[str, dict[str, str]]
    ) -> None:
        """`clean` keeps what runs without a fault have."""
        self._warm, self._folder, self._experiment, self.case, self._clean = warm, folder, experiment, case, clean
        self.plugin = folder / "my_plugin.py"
        self.plugin.write_text(case.source)

    def run(self, out: str, fault: bool) -> Ended:
        """The run of the experiment."""
        words = ["run", self._experiment, "--out", out, "--plugin", self.plugin, "--no-report"]
        return self._warm(words, self._folder, seconds=90, memory=12e9, environment={"FAULT": str(int(fault))})

    def complaints(self) -> list[str]:
        """What is wrong; nothing is right."""
        first = self.run("runs", fault=True)
        wrong = ["hangs"] if first.hangs else []
        wrong += self._of_ending(first)
        if self.case.ending == "load":
            return wrong + self._of_loading()
        if self.case.ending != "start":
            wrong += self._of_going_on()
        return [*wrong, first.out[-3000:]] if wrong else []

    def _of_ending(self, ended: Ended) -> list[str]:
        """What is wrong with the first end."""
        ending, finished = self.case.ending, (self._folder / "runs" / RUN / "finished.json").exists()
        if ending in ("ok", "load") or (ending == "finish" and ended.code == 0):
            return [] if ended.code == 0 and finished else [f"exit code {ended.code}, finished: {finished}"]
        wrong = self.refused(ended)
        if finished:
            wrong.append("a run that did not finish is marked finished")
        steps = self._steps("runs")
        if ending == "start" and steps:
            wrong.append(f"{steps} steps were done")
        if ending == "step" and not (steps == 2 and self._saved("runs")):
            wrong.append(f"{steps} steps are recorded, {self._saved('runs')} saved")
        return wrong

    def refused(self, ended: Ended) -> list[str]:
        """What is wrong with a refusal: code, one line with the names, no traceback but of the part's own failure."""
        wrong = [f"exit code {ended.code}"] if ended.code != 2 else []
        if not ended.error:
            wrong.append("no line 'error: ...'")
        wrong += [f"{name!r} is not in the error" for name in self.case.named if name not in ended.error]
        if ended.traceback and self.plugin.name not in ended.out.partition("Traceback")[2].partition("\nerror:")[0]:
            wrong.append("a traceback that is not the part's")
        if ended.traceback and "\nerror:" not in ended.out.rpartition("Traceback")[2]:
            wrong.append("a traceback after the error")
        return wrong

    def _of_going_on(self) -> list[str]:
        """What is wrong with the same command without the fault, beside a run that never had it."""
        again = self.run("runs", fault=False)
        if again.code:
            return [f"it cannot go on: exit code {again.code}", again.out[-2000:]]
        kept, expected = self._results("runs"), self._unbroken()
        names = RECORDS if self.case.ending == "ok" else tuple(expected)
        differ = [name for name in names if kept.get(name) != expected[name]]
        return [f"the run that went on differs in {differ}"] if differ else []

    def _unbroken(self) -> dict[str, str]:
        """What a run has that never had a fault; of cases that are alike it is made once."""
        key = json.dumps([sorted(self.case.changes.items(), key=str), self.case.like], default=str)
        if key not in self._clean:
            ended = self.run("clean", fault=False)
            assert ended.code == 0, ended.out
            self._clean[key] = self._results("clean")
        return self._clean[key]

    def _of_loading(self) -> list[str]:
        """What is wrong with a run that cannot take back what it saved."""
        shutil.rmtree(self._folder / "runs" / RUN / "checkpoints" / "step-000004")
        (self._folder / "runs" / RUN / "finished.json").unlink()
        ended = self.run("runs", fault=True)
        wrong = self.refused(ended)
        return [*wrong, ended.out[-3000:]] if wrong else []

    def _steps(self, out: str) -> int:
        rows = self._folder / out / RUN / "metrics.jsonl"
        return len(rows.read_bytes().splitlines()) if rows.exists() else 0

    def _saved(self, out: str) -> list[str]:
        return sorted(path.name for path in (self._folder / out / RUN / "checkpoints").glob("step-*"))

    def _results(self, out: str) -> dict[str, str]:
        """Checksums of the record and of the newest checkpoint."""
        run = self._folder / out / RUN
        files = [run / name for name in RECORDS]
        files += sorted((run / "checkpoints" / self._saved(out)[-1]).iterdir())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
