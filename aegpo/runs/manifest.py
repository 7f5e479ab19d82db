"""The manifest of a run: what is run and by which versions, written once; what differs when it goes on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aegpo.core.files import write_json
from aegpo.errors import CheckpointError
from aegpo.runs.folders import Run

FORMAT = 1
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


def open_manifest(run: Run, plugins: Sequence[tuple[str, str]], threads: int) -> dict[str, Any]:
    """Writes the run's manifest, or reads and checks the one an earlier start wrote.

    A start that failed before a step was done leaves nothing worth keeping, so its manifest is replaced if the
    experiment was corrected since.

    Args:
        run: the run.
        plugins: name and version of each distribution that registered parts.
        threads: CPU threads of a first start. A resumed run uses the number in the manifest it gets back, unless the
            user asks for fewer: sums split over another number of threads round differently.

    Raises:
        CheckpointError: if the manifest is of another experiment or cannot be read.
    """
    check_manifest(run)
    path = run.folder / "manifest.json"
    if not _goes_on(run):
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


def _goes_on(run: Run) -> bool:
    """True if the folder has a manifest that this start keeps."""
    return (run.folder / "manifest.json").exists() and (_learned(run) or not _changes(run, read_manifest(run.folder)))


def begun_threads(run: Run) -> int | None:
    """With how many threads an earlier start of the run computed; None if this is the first one."""
    return int(read_manifest(run.folder)["threads"]) if _goes_on(run) else None


def note_threads(run: Run, threads: int, step: int) -> None:
    """Notes in the manifest that the run computes with another number of threads after a training step."""
    manifest = read_manifest(run.folder)
    change = {"after_step": step, "from": manifest["threads"], "to": threads}
    changes = [*manifest.get("threads_changed", []), change]
    write_json(run.folder / "manifest.json", {**manifest, "threads": threads, "threads_changed": changes})


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
