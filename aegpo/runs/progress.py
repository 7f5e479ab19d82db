"""What the user watches while runs go on: bars in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from pydantic import ConfigDict
from rich.console import Console
from rich.live import Live

from aegpo.core.terminals import plain
from aegpo.runs.bar_rows import BarRow, BarRows
from aegpo.runs.records import Row, parse_row

REWARD = "reward"  # metric of a step: weighted reward, mean over rollouts
# metrics of a step: velocity evaluations for rollouts and for signals, which version 0.1 called a probe
FORWARDS = ("forwards", "signal_forwards", "probe_forwards")


@dataclass(frozen=True)
class Standing:
    """How far a run is."""

    step: int
    total: int
    reward: float | None = None  # of the last step's rollouts
    forwards: int = 0  # since the start of training
    evaluated: int | None = None  # the step of the last evaluation
    evaluation: Mapping[str, float] = field(default_factory=dict)  # its mean score by reward label

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Standing:
        """The standing once a step's metrics are known."""
        forwards = self.forwards + int(sum(metrics.get(name, 0) for name in FORWARDS))
        return replace(self, step=step, reward=metrics.get(REWARD, self.reward), forwards=forwards)

    def after_evaluation(self, step: int, scores: Mapping[str, float]) -> Standing:
        """The standing once an evaluation is known."""
        return replace(self, evaluated=step, evaluation=dict(scores))

    def numbers(self, evaluation: bool = True) -> str:
        """Reward, forwards and, if asked for, the last evaluation in words."""
        parts = [] if self.reward is None else [f"reward {self.reward:.3f}"]
        parts.append(f"forwards {self.forwards:,}")
        if evaluation and self.evaluation:
            parts.append(self.scores())
        return "  ".join(parts)

    def shorter(self) -> tuple[str, ...]:
        """Numbers for less and less room: all, without the evaluation, the reward alone, none."""
        reward = "" if self.reward is None else f"reward {self.reward:.3f}"
        return self.numbers(), self.numbers(evaluation=False), reward, ""

    def scores(self) -> str:
        """The last evaluation in words."""
        return "evaluation " + ", ".join(f"{label} {value:.3f}" for label, value in self.evaluation.items())


class _Told(Row):
    """Of a row, what is shown."""

    model_config = ConfigDict(extra="ignore", strict=True)


class _Step(_Told):
    metrics: dict[str, float]


class _Scored(_Told):
    scores: dict[str, list[float]]


class Record:
    """Reads the growing record of a run, `metrics.jsonl` and `evaluations.jsonl`, while another process writes it.

    It reads up to the first row that is damaged: whoever runs the run, or reports it, says what is wrong with it.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self._metrics = Tail(folder / "metrics.jsonl", _Step)
        self._evaluations = Tail(folder / "evaluations.jsonl", _Scored)
        self._start = Standing(0, total)
        self._standing = self._start

    def read(self, until: int | None = None) -> Standing:
        """The standing by now, or after step `until` if rows beyond it are about to be forgotten."""
        if self._metrics.replaced() or self._evaluations.replaced():  # a resumed run forgets what it will do again
            self._metrics.rewind()
            self._evaluations.rewind()
            self._standing = self._start
        for row in self._metrics.rows(until):
            self._standing = self._standing.after_step(row["step"], row["metrics"])
        for row in self._evaluations.rows(until):
            means = {label: sum(scores) / len(scores) for label, scores in row["scores"].items()}
            self._standing = self._standing.after_evaluation(row["step"], means)
        return self._standing


class Tail:
    """The lines a JSON-lines file gained since the last look."""

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self._path, self._kind = path, kind
        self.rewind()

    def rewind(self) -> None:
        """Begins at the start again."""
        self._offset = 0
        self._inode: int | None = None

    def replaced(self) -> bool:
        """True if the file is not the one that was read, or is shorter than what was read of it."""
        if self._inode is None:
            return False
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return True
        return found.st_ino != self._inode or found.st_size < self._offset

    def rows(self, until: int | None) -> Iterator[Mapping[str, Any]]:
        """The new rows, up to the first that is damaged, or of a step beyond `until`."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            self._inode = self._path.stat().st_ino
            file.seek(self._offset)
            for line in file:
                row = parse_row(line, self._kind)
                if isinstance(row, str) or (until is not None and row["step"] > until):
                    break
                self._offset += len(line)
                yield row


class Pace:
    """The time left, from the steps done since this object was made."""

    def __init__(self, done: int) -> None:
        self._first = done
        self._began = time.monotonic()

    def left(self, done: int, total: int) -> float | None:
        """Seconds until `total` steps are done, or None before the first one."""
        if done <= self._first:
            return None
        return (time.monotonic() - self._began) / (done - self._first) * (total - done)


class Display(Protocol):
    """Shows the standing of runs; `with` it, the terminal belongs to the display."""

    def __enter__(self) -> Display:
        """Takes the terminal."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the terminal back."""

    def show(self, label: str, standing: Standing) -> None:
        """Shows a run, for the first time or again."""

    def end(self, label: str, outcome: str) -> None:
        """Says how a run ended."""

    def say(self, line: str) -> None:
        """Prints a line of its own."""


def display(console: Console, every_step: bool, runs: int = 1) -> Display:
    """Bars if the console is a terminal that does not ask for plain output, else lines.

    Args:
        console: where to print.
        every_step: lines for every step, else only for evaluations.
        runs: how many runs there will be; with more than one, a terminal gets a bar for all of them.
    """
    return Bars(console, runs) if console.is_terminal and not plain(console) else Lines(console, every_step)


class Lines:
    """One line for each event."""

    def __init__(self, console: Console, every_step: bool) -> None:
        self._console = console
        self._every_step = every_step
        self._paces: dict[str, Pace] = {}
        self._last: dict[str, tuple[int, int]] = {}  # step and evaluation told of last

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, label: str, standing: Standing) -> None:
        """Prints a line if a new step, or evaluation, is there to tell of."""
        pace = self._paces.setdefault(label, Pace(standing.step))
        step, evaluated = self._last.get(label, (None, None))
        news = standing.evaluated != evaluated or (self._every_step and standing.step != step)
        if not news or standing.evaluated is None:
            return
        self._last[label] = (standing.step, standing.evaluated)
        if standing.step == step:  # whose own numbers were told
            self.say(f"{label}: step {step}/{standing.total}  {standing.scores()}")
            return
        left = pace.left(standing.step, standing.total)
        eta = "" if left is None else f"  eta {_clock(left)}"
        numbers = standing.numbers(evaluation=standing.evaluated != evaluated)
        self.say(f"{label}: step {standing.step}/{standing.total}{eta}  {numbers}")

    def end(self, label: str, outcome: str) -> None:
        """Prints a line."""
        self.say(f"{label}: {outcome}")

    def say(self, line: str) -> None:
        """Prints a line."""
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


class Bars:
    """One bar for each run that goes on, and one for all of them."""

    def __init__(self, console: Console, runs: int) -> None:
        self._console = console
        self._rows: dict[str, BarRow] = {}
        self._paces: dict[str, Pace] = {}
        self._standings: dict[str, Standing] = {}
        self._first: dict[str, int] = {}  # steps that were done before
        self._pace = Pace(0)
        self._runs = runs
        self._all = BarRow("all runs", 0, None, _clock(None)) if runs > 1 else None
        self._live = Live(console=console, get_renderable=self._drawn, auto_refresh=False)

    def __enter__(self) -> Bars:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, label: str, standing: Standing) -> None:
        """Moves the run's bar and the bar of all runs."""
        self._standings[label] = standing
        self._first.setdefault(label, standing.step)
        pace = self._paces.setdefault(label, Pace(standing.step))
        eta = _clock(pace.left(standing.step, standing.total))
        self._rows[label] = BarRow(label, standing.step, standing.total, eta, standing.shorter())
        self._show_all(standing.total)
        self._live.refresh()

    def _show_all(self, steps: int) -> None:
        if self._all is None:
            return
        done, total = sum(standing.step for standing in self._standings.values()), steps * self._runs
        new = done - sum(self._first.values())
        forwards = sum(standing.forwards for standing in self._standings.values())
        eta = _clock(self._pace.left(new, new + total - done))
        self._all = BarRow(self._all.label, done, total, eta, (f"forwards {forwards:,}", ""))

    def _drawn(self) -> BarRows:
        return BarRows([*([] if self._all is None else [self._all]), *self._rows.values()])

    def end(self, label: str, outcome: str) -> None:
        """Replaces the run's bar by a line."""
        if self._rows.pop(label, None) is not None:
            self.say(f"{label}: {outcome}  {self._standings[label].numbers()}")
        else:
            self.say(f"{label}: {outcome}")

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
