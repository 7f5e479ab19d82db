"""The folder of an experiment that is watched: how every run stands, and what evaluations have found so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from aegpo.core.records import FloatArray
from aegpo.errors import AegpoError, CheckpointError
from aegpo.report.recorded_run import RecordedRun, read_run
from aegpo.report.statistics import Interval, mean_interval
from aegpo.report.watch.standing import Reader, Standing
from aegpo.runs.folders import FINISHED, ORDER, read_order
from aegpo.runs.resuming import EVALUATIONS, IMAGES, image_steps

_MANIFEST = "manifest.json"
_SHOWN = 3  # folders that a message names


@dataclass(frozen=True)
class Found:
    """What the runs that have begun recorded, as far as it can be read."""

    arms: tuple[str, ...]  # all of the experiment, in its order
    runs: tuple[RecordedRun, ...]  # with an evaluation
    notes: tuple[str, ...]  # what cannot be read, in words

    def of(self, arm: str) -> list[RecordedRun]:
        """The runs of an arm, by seed."""
        return [run for run in self.runs if run.arm == arm]

    @property
    def labels(self) -> tuple[str, ...]:
        """What is scored: what the first run is trained on first, then its guards."""
        scored = dict.fromkeys(label for run in self.runs for row in run.evaluations for label in row.scores)
        trained = [label for run in self.runs[:1] for label in run.trained if label in scored]
        return (*trained, *(label for label in scored if label not in trained))

    def is_guard(self, label: str) -> bool:
        """True if no run is trained on it."""
        return not any(label in run.trained for run in self.runs)

    def base(self, label: str) -> tuple[float, Interval | None] | None:
        """The base's mean score and its 95 % interval over prompts; None before anything was scored."""
        rows = [run.evaluations[-1].base_scores[label] for run in self.runs if label in run.evaluations[-1].base_scores]
        return (float(rows[0].mean()), mean_interval(rows[0])) if rows else None


def mean_scores(run: RecordedRun, label: str) -> dict[int, float]:
    """By step, the mean over prompts."""
    return {row.step: float(row.scores[label].mean()) for row in run.evaluations if label in row.scores}


def common_scores(runs: Sequence[RecordedRun], label: str) -> tuple[list[int], FloatArray]:
    """The steps (E,) at which all of these runs were evaluated, and their scores there, (S, E)."""
    scores = [found for run in runs if (found := mean_scores(run, label))]
    steps = sorted(set.intersection(*map(set, scores))) if scores else []
    return steps, np.array([[each[step] for step in steps] for each in scores])


class Watched:
    """Reads the folder again and again."""

    def __init__(self, folder: Path) -> None:
        """Takes a folder that an experiment writes to.

        Raises:
            AegpoError: if it is none.
        """
        self.folder = folder
        self._readers: dict[tuple[str, int], Reader] = {}
        self._standings: dict[tuple[str, int], Standing] = {}
        # by what was there when it was read
        self._recorded: dict[tuple[str, int], tuple[object, RecordedRun | str]] = {}
        if not folder.is_dir():
            raise AegpoError(f"{folder}: no such folder; name the one that 'aegpo run' writes to, OUT/NAME")
        if not (folder / ORDER).is_file() and not list(_begun(folder)):
            raise AegpoError(
                f"{folder} is no experiment's folder: it has no {ORDER} and no ARM/seed-S; {_hint(folder)}"
            )

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self.folder.resolve().name

    def runs(self) -> tuple[tuple[str, ...], list[tuple[str, int]], str]:
        """The arms in their order, every run by arm and seed, and why the order is not the experiment's own."""
        begun = list(_begun(self.folder))
        arms, seeds = sorted({arm for arm, _ in begun}), sorted({seed for _, seed in begun})
        if not (self.folder / ORDER).is_file():
            return tuple(arms), begun, "" if begun else f"{self.folder} is gone"
        try:
            order = read_order(self.folder)
        except AegpoError as error:
            return tuple(arms), begun, str(error)
        if not order.arms:
            return tuple(arms), begun, ""
        seeds = list(order.seeds)
        return order.arms, [(arm, seed) for arm in order.arms for seed in seeds], ""

    def standings(self) -> list[Standing]:
        """How each run stands; one whose files go away while they are read, as it stood before."""
        found = []
        for arm, seed in self.runs()[1]:
            with suppress(OSError):
                self._standings[arm, seed] = self._reader(arm, seed).standing()
            if (arm, seed) in self._standings:
                found.append(self._standings[arm, seed])
        totals = {each.total for each in found if each.total is not None}
        total = totals.pop() if len(totals) == 1 else None
        return [replace(each, total=total) if each.total is None else each for each in found]

    def _reader(self, arm: str, seed: int) -> Reader:
        return self._readers.setdefault((arm, seed), Reader(self.folder / arm / f"seed-{seed}", arm, seed))

    def version(self) -> str:
        """Something that is another text once there is another evaluation, or a run begins or ends."""
        return str(hash(tuple((key, self._signature(*key)) for key in self.runs()[1])))

    def _signature(self, arm: str, seed: int) -> tuple[object, ...]:
        folder = self.folder / arm / f"seed-{seed}"
        found: list[object] = []
        for name in (_MANIFEST, EVALUATIONS, FINISHED):
            try:
                status = (folder / name).stat()
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
            except OSError:
                found.append(None)
        return tuple(found)

    def found(self) -> Found:
        """What evaluations have found; what has not changed is not read again."""
        arms, keys, why = self.runs()
        read: list[RecordedRun] = []
        notes = [why] if why else []
        for key in keys:
            run = self._read(*key)
            if isinstance(run, str):
                notes.append(run)
            elif run is not None and run.evaluations:
                read.append(run)
        notes += [line for run in read for line in run.damage]
        return Found(arms, tuple(read), tuple(notes))

    def _read(self, arm: str, seed: int) -> RecordedRun | str | None:
        """A run, why it cannot be read, or None if it has not begun."""
        folder, signature = self.folder / arm / f"seed-{seed}", self._signature(arm, seed)
        if not (folder / _MANIFEST).is_file():
            return None
        known, run = self._recorded.get((arm, seed), (None, ""))
        if known != signature:
            try:
                run = read_run(arm, seed, folder)
            except CheckpointError as error:
                run = f"seed {seed} of arm {arm}: {error}"
            self._recorded[arm, seed] = signature, run
        return run

    def image(self, arm: str, seed: int, step: int) -> Path | None:
        """The samples of an evaluation; None if there are none. Names come from the folder, never from who asks."""
        if (arm, seed) not in self.runs()[1]:
            return None
        return dict(self.images(arm, seed)).get(step)

    def images(self, arm: str, seed: int) -> Iterator[tuple[int, Path]]:
        """The samples of a run by step."""
        return image_steps(self.folder / arm / f"seed-{seed}" / IMAGES)


def _begun(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.glob("*/seed-*")):
        number = path.name.removeprefix("seed-")
        if number.isdecimal() and path.is_dir():
            yield path.parent.name, int(number)


def _hint(folder: Path) -> str:
    """Which folder may have been meant."""
    near = [folder, *list(folder.resolve().parents)[:3]]
    above = next((str(path) for path in near if (path / ORDER).is_file()), None)
    below = [str(path.parent) for path in sorted(folder.glob(f"*/{ORDER}"))]
    if above is not None:
        return f"did you mean {above}?"
    if below:
        more = f" or {len(below) - _SHOWN} more" if len(below) > _SHOWN else ""
        return f"did you mean {', '.join(below[:_SHOWN])}{more}?"
    return "name the one that 'aegpo run' writes to, OUT/NAME"
