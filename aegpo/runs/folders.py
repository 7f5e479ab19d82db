"""A run on disk: one arm under one seed in a folder of its own, with a manifest, a status and a lock.

OUT/NAME/ARM/seed-S/
    manifest.json      what is run and by which versions; written once
    metrics.jsonl      one row a training step; evaluations.jsonl, timing.jsonl, images/: see aegpo.runs.trackers
    checkpoints/       see aegpo.runs.checkpoints
    run.log            what the run printed, where it ran in a process of its own
    finished.json      there is nothing left to do
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aegpo.errors import AegpoError, CheckpointError
from aegpo.core.experiment import Experiment

FORMAT = 1
_LOCK = ".lock"
_SHOWN = 5  # steps that a message names
_ABSENT = object()
_LIBRARIES = (
    "accelerate",
    "aegpo",
    "bitsandbytes",
    "diffusers",
    "huggingface_hub",
    "numpy",
    "peft",
    "pillow",
    "pluggy",
    "pydantic",
    "safetensors",
    "torch",
    "transformers",
)


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


def write_order(folder: Path, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Notes beside the arms which runs belong to the experiment and which arm the others are compared to: the first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "order.json"
    order = {"arms": list(arms), "seeds": list(seeds)}
    if not path.exists() or json.loads(path.read_bytes()) != order:
        write_json(path, order)


# --- the manifest -----------------------------------------------------------------------------------------------------


def open_manifest(run: Run, plugins: Sequence[tuple[str, str]], threads: int) -> dict[str, Any]:
    """Writes the run's manifest, or reads and checks the one an earlier start wrote.

    A start that failed before a step was done leaves nothing worth keeping, so its manifest is replaced if the
    experiment was corrected since.

    Args:
        run: the run.
        plugins: name and version of each distribution that registered parts.
        threads: CPU threads of this process. A resumed run must use the number in the manifest it gets back: sums
            split over another number of threads round differently.

    Raises:
        CheckpointError: if the manifest is of another experiment or cannot be read.
    """
    check_manifest(run)
    path = run.folder / "manifest.json"
    if not path.exists() or (not _learned(run) and _changes(run, read_manifest(run.folder))):
        if run.checkpoints.is_dir() and any(run.checkpoints.iterdir()):
            raise CheckpointError(
                f"{run.folder} has checkpoints but no manifest.json, so nobody knows what experiment they are of; put "
                "it back, or start over with --fresh"
            )
        manifest = {
            "format": FORMAT,
            "arm": run.arm,
            "seed": run.seed,
            "experiment": run.experiment.model_dump(mode="json"),
            "versions": versions(),
            "plugins": [list(plugin) for plugin in plugins],
            "commit": commit(),
            "threads": threads,
        }
        write_json(path, manifest)
    return read_manifest(run.folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        CheckpointError: if it is missing, is not JSON or has another format.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; start the run over with --fresh") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a manifest of format {FORMAT}, the only one this version of aegpo reads; start the run "
            "over with --fresh, or choose another --out"
        )
    return manifest


def check_manifest(run: Run) -> None:
    """Refuses a folder in which another experiment has learned something, with the differences.

    A `micro_batch` may change: it says how many are worked on at once, and moves results by rounding only.

    Raises:
        CheckpointError: if the folder has a manifest of another experiment and at least one step of it.
    """
    if not (run.folder / "manifest.json").exists():
        return
    changes = [line for line in _changes(run, read_manifest(run.folder)) if not _is_micro_batch(line)]
    if changes and _learned(run):
        lines = "\n".join(f"  {change}" for change in changes)
        raise CheckpointError(
            f"{run.label} was begun with another experiment in {run.folder}:\n{lines}\n"
            "undo the change to go on, start the run over with --fresh, or keep both with another --out"
        )


def changed_batches(run: Run, manifest: Mapping[str, Any]) -> list[str]:
    """Each `micro_batch` that is not the one the run was begun with: bits may differ from a run without the change."""
    return [line for line in _changes(run, manifest) if _is_micro_batch(line)]


def _changes(run: Run, manifest: Mapping[str, Any]) -> list[str]:
    wanted = json.loads(json.dumps(run.experiment.model_dump(mode="json")))
    return differences(manifest["experiment"], wanted)


def _is_micro_batch(change: str) -> bool:
    return change.partition(": ")[0].endswith(".micro_batch")


def _learned(run: Run) -> bool:
    """True if a step was recorded or a checkpoint written."""
    metrics = run.folder / "metrics.jsonl"
    recorded = metrics.exists() and metrics.stat().st_size > 0
    return recorded or (run.checkpoints.is_dir() and any(run.checkpoints.iterdir()))


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """What differs between two JSON values, as lines ``key: old -> new`` in the order of the keys."""
    if old is not _ABSENT and new is not _ABSENT:
        if isinstance(old, dict) and isinstance(new, dict):
            prefix = f"{key}." if key else ""
            names = [*old, *(name for name in new if name not in old)]
            pairs = [(f"{prefix}{name}", old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in names]
            return [line for place, before, after in pairs for line in differences(before, after, place)]
        if isinstance(old, list) and isinstance(new, list) and any(isinstance(item, dict) for item in (*old, *new)):
            size = max(len(old), len(new))
            before, after = [*old, *[_ABSENT] * (size - len(old))], [*new, *[_ABSENT] * (size - len(new))]
            return [line for i in range(size) for line in differences(before[i], after[i], f"{key}[{i}]")]
        if old == new and type(old) is type(new):
            return []
    return [f"{key}: {_shown(old)} -> {_shown(new)}"]


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value)


def changed_versions(manifest: Mapping[str, Any]) -> list[str]:
    """Libraries whose version is not the one the run was begun with: bits may differ from a run without a break."""
    begun = dict.fromkeys(_LIBRARIES) | manifest["versions"]  # an older manifest names fewer libraries
    return differences(begun, versions())


def versions() -> dict[str, str | None]:
    """Version of Python and of every library that can change a number; None where one is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of the working directory, or None outside of a repository."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


# --- lock, start over -------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other process out of a run folder, which is made if need be.

    The operating system lets go of the lock when the process ends, however it ends.

    Raises:
        AegpoError: if another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise AegpoError(
                f"process {file.read().strip() or '(unknown)'} is running {folder}; wait for it or end it, or choose "
                "another --out"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
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


# --- files that are whole or absent -----------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is whole or absent at any moment."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file in one step, safe against a crash at any moment."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until names that were added to or removed from a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- evaluations that are due ----------------------------------------------------------------------------------------


def evaluated_steps(training_steps: int, every: int) -> tuple[int, ...]:
    """After which training steps a run scores the held-out prompts; 0 is before training."""
    return tuple(step for step in range(training_steps + 1) if step % every == 0 or step == training_steps)


def unevaluated(recorded: Collection[int], due: Sequence[int], until: int) -> str:
    """The evaluations that should be recorded once step `until` is done and are not, in words; empty if all are."""
    lost = [step for step in due if step <= until and step not in recorded]
    after = [str(step) for step in lost if step > 0]
    if len(after) > _SHOWN:
        after = [*after[: _SHOWN - 1], f"{len(after) - _SHOWN + 1} more"]
    many = "s" * (len(after) > 1)
    words = ["the evaluation before training"] if 0 in lost else []
    words += [f"the evaluation{many} after step{many} {', '.join(after)}"] if after else []
    return " and ".join(words)
