"""The manifest of a run: what is run and by which versions, written once; what differs when it goes on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aegpo.config.older import modern
from aegpo.config.validation import validate
from aegpo.core.as_json import loads
from aegpo.core.experiment import Experiment
from aegpo.core.files import write_json
from aegpo.core.places import named_places
from aegpo.core.problems import Location
from aegpo.core.registry import Spec
from aegpo.errors import CheckpointError
from aegpo.runs.folders import Run
from aegpo.runs.places import FROM_ROOT, KEY, moved, same_place
from aegpo.runs.rules import RULES, changed_rules

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
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Change:
    """A field of a run's experiment that is not what it was when the run was begun."""

    key: str
    old: str  # as JSON
    new: str
    by_default: bool = False  # the file does not set it: what changed is its default
    moved: bool = False  # a place, of something that was moved

    def __str__(self) -> str:
        """``key: old -> new``; for a default also how to keep the old one."""
        line = f"{self.key}: {self.old} -> {self.new}"
        if not self.by_default:
            return line
        return f"{line} (the file does not set it, and its default is this now; to keep the old one, {self.way_back})"

    @property
    def way_back(self) -> str:
        """What to write into the file to keep the old value."""
        return f"write {self.key}: {self.old}"

    @property
    def is_micro_batch(self) -> bool:
        """True for what moves results by rounding only."""
        return self.key.endswith(".micro_batch")

    @property
    def is_allowed(self) -> bool:
        """True for what a run may go on with, and say."""
        return self.is_micro_batch or self.moved


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
            **source_state(),
            KEY: FROM_ROOT,
            "rules": dict(RULES),
            "threads": threads,
        }
        write_json(path, manifest)
    return read_manifest(run.folder)


def _goes_on(run: Run) -> bool:
    """True if the folder has a manifest that this start keeps."""
    if not (run.folder / "manifest.json").exists():
        return False
    return _learned(run) or not _outdated(run, read_manifest(run.folder))


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
        manifest = loads(path.read_bytes())
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

    A `micro_batch` may change: it says how many are worked on at once, and moves results by rounding only. So may a
    place, if what was there is gone and is in another folder now, with all that is around it. A run with
    steps still to do must have been begun under the rules of this version.

    Raises:
        CheckpointError: if the folder has a manifest of another experiment, or of other rules, and at least one step.
    """
    if not (run.folder / "manifest.json").exists():
        return
    manifest = read_manifest(run.folder)
    if not _learned(run):
        return
    changes = [change for change in experiment_changes(run.experiment, manifest) if not change.is_allowed]
    if changes:
        lines = "\n".join(f"  {change}" for change in changes)
        raise CheckpointError(
            f"{run.label} was begun with another experiment in {run.folder}:\n{lines}\n"
            "undo the change to go on, start the run over with --fresh, or keep both with another --out"
        )
    rules = [] if run.finished else changed_rules(manifest.get("rules", {}))
    if rules:
        begun = manifest["versions"].get("aegpo")
        lines = "\n".join(f"  it {rule}" for rule in rules)
        raise CheckpointError(
            f"{run.label} in {run.folder} cannot go on:\n{lines}\n"
            f"go on with aegpo {begun}, start the run over with --fresh, or keep both with another --out"
        )


def changed_defaults(run: Run) -> list[Change]:
    """Fields the file leaves out whose default is not what it was when the run was begun and learned something.

    Raises:
        CheckpointError: if its manifest cannot be read.
    """
    if not (run.folder / "manifest.json").exists() or not _learned(run):
        return []
    changes = experiment_changes(run.experiment, read_manifest(run.folder))
    return [change for change in changes if change.by_default and not change.is_micro_batch]


def changed_batches(run: Run, manifest: Mapping[str, Any]) -> list[str]:
    """Each `micro_batch` that is not the one the run was begun with: bits may differ from a run without the change."""
    changes = experiment_changes(run.experiment, manifest)
    return [f"{each.key}: {each.old} -> {each.new}" for each in changes if each.is_micro_batch]


def moved_places(run: Run, manifest: Mapping[str, Any]) -> list[str]:
    """Each place that is not where it was when the run was begun."""
    changes = experiment_changes(run.experiment, manifest)
    return [f"{each.key}: {each.old} -> {each.new}" for each in changes if each.moved]


def experiment_changes(experiment: Experiment, manifest: Mapping[str, Any]) -> list[Change]:
    """What of an experiment is not as in a manifest.

    A manifest of an earlier version lacks the fields that came since: they have the default of today, which is to mean
    what was done before there was a field.
    """
    data = modern(manifest["experiment"])
    begun, _ = validate(type(experiment), data)
    old, now = data if begun is None else _plain(begun), _plain(experiment)
    named = {place.location for place in named_places(type(experiment), now)}
    return [
        _change(
            place,
            before,
            after,
            by_default=_ABSENT not in (before, after) and not _is_set(experiment, place),
            moved=place in named and moved(before, after),
        )
        for place, before, after in _pairs(old, now, ())
        if not (place in named and same_place(before, after, manifest))
    ]


def _change(place: Location, old: Any, new: Any, *, by_default: bool = False, moved: bool = False) -> Change:
    key = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in place)
    return Change(key.removeprefix("."), _shown(old), _shown(new), by_default, moved)


def _outdated(run: Run, manifest: Mapping[str, Any]) -> bool:
    """True if a run that learned nothing would be begun in another way now."""
    return bool(experiment_changes(run.experiment, manifest) or changed_rules(manifest.get("rules", {})))


def _plain(experiment: Experiment) -> Any:
    """What an experiment does, as JSON: options of signals that no part reads do nothing."""
    experiment = experiment.model_copy(update={"signals": dict(experiment.sources)})
    return json.loads(json.dumps(experiment.model_dump(mode="json")))


def _is_set(spec: Spec, place: Location) -> bool:
    """True if the file, or `--set`, gave the field at a place; False if it has its default."""
    value: Any = spec
    for name in place:
        if isinstance(value, Spec):
            if name not in value.model_fields_set:
                return False
            value = dict(value)[str(name)]
        elif isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, tuple) and isinstance(name, int) and name < len(value):
            value = value[name]
        else:
            break
    return True


def _learned(run: Run) -> bool:
    """True if a step was recorded or a checkpoint written."""
    metrics = run.folder / "metrics.jsonl"
    recorded = metrics.exists() and metrics.stat().st_size > 0
    return recorded or (run.checkpoints.is_dir() and any(run.checkpoints.iterdir()))


def differences(old: Any, new: Any) -> list[str]:
    """What differs between two JSON values, as lines ``key: old -> new`` in the order of the keys."""
    return [str(_change(*pair)) for pair in _pairs(old, new, ())]


def _pairs(old: Any, new: Any, place: Location) -> Iterator[tuple[Location, Any, Any]]:
    """Where two JSON values differ, and what is there in each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in (*old, *(name for name in new if name not in old)):
            yield from _pairs(old.get(name, _ABSENT), new.get(name, _ABSENT), (*place, name))
    elif isinstance(old, list) and isinstance(new, list) and any(isinstance(item, dict) for item in (*old, *new)):
        for index in range(max(len(old), len(new))):
            before, after = (each[index] if index < len(each) else _ABSENT for each in (old, new))
            yield from _pairs(before, after, (*place, index))
    elif old != new or type(old) is not type(new):
        yield place, old, new


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


def source_state(folder: Path = _PACKAGE) -> dict[str, Any]:
    """Which source code runs: git's `commit` of it, and whether it is `dirty`, changed since.

    Both are None where the code is in no repository, as in an installed wheel; also if the folder it was installed
    into happens to lie in one.
    """
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    commit = None if tracked is None else _git(folder, "rev-parse", "HEAD")
    changed = None if commit is None else _git(folder, "status", "--porcelain", "--", ".")
    return {"commit": commit, "dirty": None if changed is None else changed != ""}


def _git(folder: Path, *words: str) -> str | None:
    """What git prints, or None if it fails or is not there."""
    try:
        answer = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
