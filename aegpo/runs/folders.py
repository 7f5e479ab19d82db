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
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aegpo.config.validation import validate
from aegpo.core.experiment import Experiment
from aegpo.core.files import refused, way_out, write_json
from aegpo.core.reports import RunInfo
from aegpo.core.verdicts import VerdictSpec
from aegpo.errors import AegpoError, CheckpointError, DiskError
from aegpo.runs.evaluations import evaluated_steps
from aegpo.runs.records import read_document, write_document

ORDER, FINISHED = "order.json", "finished.json"
WAIT_FOR_LOCK = "AEGPO_WAIT_FOR_LOCK"  # environment variable: seconds that a run waits for the lock of its folder
_LOCK, _PID = ".lock", 20  # bytes of a process id
_LOOK_EVERY = 0.5  # seconds between tries
_REMOVE_ORDER = "delete it: the experiment's command writes it anew"


@dataclass(frozen=True)
class Order:
    """Which runs belong to an experiment, and what its report compares."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    verdict: VerdictSpec = field(default_factory=VerdictSpec)
    about: Mapping[str, str] = field(default_factory=dict)  # arm -> what it does, as the file says now

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        asked = self.verdict.model_dump(mode="json", exclude_none=True)
        told = {"about": dict(self.about)} if self.about else {}
        return {"arms": list(self.arms), "seeds": list(self.seeds), **asked, **told}


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
        """True if every training step is done and recorded.

        Raises:
            CheckpointError: if the note that says so is damaged.
        """
        return is_finished(self.folder, self.experiment.training_steps)

    def mark_finished(self, step: int) -> None:
        """Notes that nothing is left to do."""
        write_json(self.folder / FINISHED, {"step": step})


def run_folder(out: Path, name: str, arm: str, seed: int) -> Path:
    """Where one arm under one seed lives."""
    return out / name / arm / f"seed-{seed}"


def is_finished(folder: Path, training_steps: int) -> bool:
    """True if a run folder notes that every training step is done and recorded.

    Raises:
        CheckpointError: if the note is damaged.
    """
    path, way_out = folder / FINISHED, "delete it: the same command then goes on from the newest checkpoint"
    if not path.exists():
        return False
    step = read_document(path, ("step",), way_out).get("step")
    if type(step) is int and step < training_steps:  # the run was to end there, and got more steps since
        return False
    if step != training_steps:
        raise CheckpointError(f"{path} says {step!r} for the last step, but the run has {training_steps}; {way_out}")
    return True


def write_order(
    folder: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    verdict: VerdictSpec,
    say: Callable[[str], None] = warnings.warn,
    about: Mapping[str, str] | None = None,
) -> None:
    """Notes beside the arms which runs belong to the experiment, in which order, and what its report says of them.

    What is there and damaged is written anew, for nothing is lost with it: `say` gets a line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, order = folder / ORDER, Order(tuple(arms), tuple(seeds), verdict, about or {})
    if path.is_dir():
        raise AegpoError(f"{path} is a folder where a file goes; move it, or choose another --out")
    try:
        if path.exists() and read_order(folder).plain() == order.plain():
            return
    except AegpoError as error:
        say(str(error).replace(_REMOVE_ORDER, "it is written anew"))
    write_document(path, order.plain())


def read_order(folder: Path) -> Order:
    """What `write_order` wrote.

    Raises:
        CheckpointError: if it is damaged.
        AegpoError: if it asks for comparisons that make no sense.
    """
    path = folder / ORDER
    order = read_document(path, ("arms", "seeds", *VerdictSpec.model_fields, "about"), _REMOVE_ORDER)
    arms, seeds, about = order.get("arms", ()), order.get("seeds", ()), order.get("about", {})
    if not _list_of(str, arms) or not _list_of(int, seeds):
        raise CheckpointError(f"cannot read {path}: it does not list 'arms' and 'seeds'; {_REMOVE_ORDER}")
    if not isinstance(about, dict) or not all(type(words) is str for words in about.values()):
        raise CheckpointError(f"cannot read {path}: its 'about' maps no arms to sentences; {_REMOVE_ORDER}")
    verdict, found = validate(VerdictSpec, {key: order[key] for key in VerdictSpec.model_fields if key in order})
    wrong = [*found, *(verdict.problems(arms) if verdict is not None else ())]
    if verdict is None or wrong:
        places = "; ".join(f"{'.'.join(map(str, each.location))}: {each.message}" for each in wrong)
        raise AegpoError(f"cannot read {path}: {places}; mend it, or give the experiment file to 'aegpo run' again")
    return Order(tuple(arms), tuple(seeds), verdict, about)


def _list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)


@contextmanager
def locked(folder: Path, unwanted: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Keeps every other process out of a run folder, which is made if need be.

    The operating system lets go of the lock when the process ends, however it ends; a lock that is a file of its own
    would outlive a process that is killed, and nobody could go on. Where a cluster starts a job again, the environment
    says for how long to wait for what the job before it left running.

    Args:
        folder: of the run.
        unwanted: asked while it waits; true ends that.

    Yields:
        True: the folder is this process's; False: the wait was ended, and another one has it.

    Raises:
        AegpoError: if another process holds the folder, or the disk has no such locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _LOCK).is_dir():
        raise AegpoError(f"{folder / _LOCK} is a folder where the lock goes; remove it")
    with (folder / _LOCK).open("ab+", buffering=0) as file:
        try:
            free = _becomes_free(file.fileno(), unwanted)
        except OSError as error:
            raise AegpoError(
                f"{folder} cannot be kept from other processes: its disk has no locks ({error.strerror}); choose an "
                "--out on a disk that has, such as one of this machine"
            ) from error
        file.seek(1)  # Windows lets others read what is behind the byte that is locked
        if not free and unwanted():
            yield False
            return
        if not free:
            holder = file.read(_PID).decode(errors="replace")
            raise AegpoError(
                f"process {holder or '(unknown)'} is running {folder}; wait for it or end it, or choose another --out"
            )
        file.truncate(0)
        file.write(f" {os.getpid()}".encode())
        yield True


def _becomes_free(descriptor: int, unwanted: Callable[[], bool]) -> bool:
    """True once a file is this process's; False if that takes too long, or the wait is ended."""
    from filelock import lock_descriptor

    patience, begin = _patience(), time.monotonic()
    while not lock_descriptor(descriptor, blocking=False):
        if time.monotonic() - begin >= patience or unwanted():
            return False
        time.sleep(_LOOK_EVERY)
    return True


def _patience() -> float:
    given = os.environ.get(WAIT_FOR_LOCK, "0")
    if not (given.isascii() and given.isdigit()):
        raise AegpoError(f"{WAIT_FOR_LOCK} is {given!r} in the environment; whole seconds were expected: unset it")
    return float(given)


def holder(folder: Path) -> int | None:
    """The id of the process that holds a run folder, or held it last, on whatever machine; None if none ever did."""
    try:
        with (folder / _LOCK).open("rb") as file:
            file.seek(1)
            said = file.read(_PID).strip()
    except OSError:
        return None
    return int(said) if said.isdigit() else None


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Inside, a disk that is full, or a folder that may not be written to or is taken away, is told as such.

    Raises:
        DiskError: if the disk refuses what is written.
    """
    try:
        yield
    except OSError as error:
        if not refused(error, folder):
            raise
        raise DiskError(
            f"{folder} cannot be written to: {error.strerror}; {way_out(error)}, then give the same command again: it "
            "goes on from the newest checkpoint"
        ) from error


def start_over(folder: Path) -> None:
    """Deletes all that earlier starts left in a run folder; the lock of the caller stays."""
    # The manifest goes last: what is half deleted is still known as begun, and refused if the experiment changed.
    entries = [path for path in folder.iterdir() if path.name != _LOCK]
    for path in sorted(entries, key=lambda path: path.name == "manifest.json"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
