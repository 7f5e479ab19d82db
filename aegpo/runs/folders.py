"""A run on disk: one arm under one seed in a folder of its own, with a manifest, a status and a lock.

OUT/NAME/ARM/seed-S/
    manifest.json      what is run and by which versions; written once
    metrics.jsonl      one row a training step; evaluations.jsonl, timing.jsonl, images/: see aegpo.runs.trackers
    checkpoints/       see aegpo.runs.checkpoints
    run.log            what the run printed, where it ran in a process of its own
    finished.json      there is nothing left to do
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aegpo.core.as_json import loads
from aegpo.core.experiment import Experiment
from aegpo.core.files import write_json
from aegpo.core.reports import RunInfo
from aegpo.core.verdicts import VerdictSpec
from aegpo.errors import AegpoError
from aegpo.runs.evaluations import evaluated_steps

_LOCK = ".lock"


@dataclass(frozen=True)
class Run:
    """One arm under one seed, and where it lives."""

    arm: str
    seed: int
    experiment: Experiment
    folder: Path

    @property
    def label(self) -> str:
        """How messages call the run."""
        return f"{self.arm} seed {self.seed}"

    def info(self, first_step: int, owes_evaluation: bool) -> RunInfo:
        """What observers are told of the run, which goes on after `first_step`."""
        last = self.experiment.training_steps
        due = evaluated_steps(last, self.experiment.evaluation.every)
        return RunInfo(self.arm, self.seed, self.folder, first_step, last, due, owes_evaluation)

    @property
    def checkpoints(self) -> Path:
        """The folder `aegpo.runs.checkpoints` writes to."""
        return self.folder / "checkpoints"

    @property
    def log(self) -> Path:
        """What the run printed in a process of its own."""
        return self.folder / "run.log"

    @property
    def finished(self) -> bool:
        """True if every training step is done and recorded."""
        return (self.folder / "finished.json").exists()

    def mark_finished(self, step: int) -> None:
        """Notes that nothing is left to do."""
        write_json(self.folder / "finished.json", {"step": step})


def run_folder(out: Path, name: str, arm: str, seed: int) -> Path:
    """Where one arm under one seed lives."""
    return out / name / arm / f"seed-{seed}"


def write_order(folder: Path, arms: Sequence[str], seeds: Sequence[int], verdict: VerdictSpec) -> None:
    """Notes beside the arms which runs belong to the experiment, in which order, and what its report compares."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "order.json"
    order = {"arms": list(arms), "seeds": list(seeds), **verdict.model_dump(mode="json", exclude_none=True)}
    if not path.exists() or loads(path.read_bytes()) != order:
        write_json(path, order)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other process out of a run folder, which is made if need be.

    The operating system lets go of the lock when the process ends, however it ends; a lock that is a file of its own
    would outlive a process that is killed, and nobody could go on.

    Raises:
        AegpoError: if another process holds the folder, or the disk has no such locks.
    """
    from filelock import lock_descriptor

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("ab+", buffering=0) as file:
        try:
            free = lock_descriptor(file.fileno(), blocking=False)
        except OSError as error:
            raise AegpoError(
                f"{folder} cannot be kept from other processes: its disk has no locks ({error.strerror}); choose an "
                "--out on a disk that has, such as one of this machine"
            ) from error
        file.seek(1)  # Windows lets others read what is behind the byte that is locked
        if not free:
            raise AegpoError(
                f"process {file.read().decode() or '(unknown)'} is running {folder}; wait for it or end it, or choose "
                "another --out"
            )
        file.truncate(0)
        file.write(f" {os.getpid()}".encode())
        yield


def start_over(folder: Path) -> None:
    """Deletes all that earlier starts left in a run folder; the lock of the caller stays."""
    # The manifest goes last: what is half deleted is still known as begun, and refused if the experiment changed.
    entries = [path for path in folder.iterdir() if path.name != _LOCK]
    for path in sorted(entries, key=lambda path: path.name == "manifest.json"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
