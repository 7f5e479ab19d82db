"""What is noted of jobs beside an experiment's runs, so that the same command finds them again.

OUT/NAME/.cluster/
    ARM/seed-S.json        the job that computes the run, while there is one
    ARM/seed-S.end.json    the exit code with which its command ended last
    submitit/              what submitit writes
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from aegpo.core.files import write_json
from aegpo.errors import CheckpointError
from aegpo.runs.folders import Run
from aegpo.runs.records import read_document

FOLDER = ".cluster"
_WAY_OUT = "see whether its job still goes on, then delete it: the same command submits the run again"


@dataclass(frozen=True)
class Handle:
    """A job that was submitted."""

    cluster: str  # slurm, ray or local
    job: str  # what the cluster calls it
    number: str  # of the submission


def folder_of(run: Run) -> Path:
    """Where the jobs of a run's experiment are noted."""
    return run.folder.parents[1] / FOLDER


def note_of(run: Run) -> Path:
    """Where the job of a run is noted."""
    return folder_of(run) / run.arm / f"seed-{run.seed}.json"


def end_of(run: Run) -> Path:
    """Where the end of its command is noted."""
    return folder_of(run) / run.arm / f"seed-{run.seed}.end.json"


def keep(run: Run, handle: Handle) -> None:
    """Notes which job computes a run."""
    path = note_of(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(handle))


def forget(run: Run) -> None:
    """Notes that no job computes a run."""
    note_of(run).unlink(missing_ok=True)


def kept(run: Run) -> Handle | None:
    """The job that computes a run, as far as it is noted.

    Raises:
        CheckpointError: if the note is damaged.
    """
    path = note_of(run)
    if not path.exists():
        return None
    told = read_document(path, ("cluster", "job", "number"), _WAY_OUT)
    if not all(isinstance(told.get(name), str) for name in ("cluster", "job", "number")):
        raise CheckpointError(f"cannot read {path}: it does not say which job computes the run; {_WAY_OUT}")
    return Handle(told["cluster"], told["job"], told["number"])


def note_end(path: Path, number: str, code: int) -> None:
    """Notes how the command of a job ended, where the job runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"number": number, "code": code})


def ended(run: Run, number: str) -> int | None:
    """The exit code with which the command of a submission ended last; None: it runs, or could not say."""
    path = end_of(run)
    try:
        told = read_document(path, ("number", "code"), _WAY_OUT)
    except (CheckpointError, OSError):
        return None
    code = told.get("code")
    return code if told.get("number") == number and type(code) is int else None
