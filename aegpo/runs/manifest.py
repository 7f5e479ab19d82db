"""The manifest of a run: what is run and by which versions, written once; what differs when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aegpo.config.older import modern
from aegpo.config.validation import validate
from aegpo.core.experiment import Experiment
from aegpo.core.places import named_places
from aegpo.core.problems import Location
from aegpo.core.registry import Spec
from aegpo.errors import CheckpointError
from aegpo.runs.bases import Base, base_of, check_base, pinned
from aegpo.runs.folders import Run
from aegpo.runs.places import FROM_ROOT, KEY, moved, same_place
from aegpo.runs.records import read_document, write_document
from aegpo.runs.rules import RULES, changed_rules
from aegpo.runs.software import LIBRARIES, source_state, versions

FORMAT = 1
_NEEDED = {"arm": str, "seed": int, "experiment": dict, "versions": dict, "threads": int}
_CHANGED = ("threads_changed", "parallel_changed")
_KEYS = ("format", *_NEEDED, "base", "plugins", "commit", "dirty", KEY, "rules", "parallel", *_CHANGED)
_ABSENT = object()


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
        """True for what moves results by rounding only: how much is worked on at once, and how much is kept of it."""
        return self.key.endswith(".micro_batch") or self.key == "optimizer.retain"

    @property
    def is_parallel(self) -> bool:
        """True for how processes share the work: `aegpo.runs.cutting` says what moves results."""
        return self.key == "parallel" or self.key.startswith("parallel.")

    @property
    def is_tracker(self) -> bool:
        """True for who is told of a run: that changes nothing of it."""
        return self.key.partition("[")[0] == "trackers"

    @property
    def is_allowed(self) -> bool:
        """True for what a run may go on with, and say."""
        harmless = self.is_tracker or self.key == "model.gradient_checkpointing"
        return harmless or self.is_micro_batch or self.is_parallel or self.moved


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
        write_document(path, manifest)
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
    write_document(run.folder / "manifest.json", {**manifest, "threads": threads, "threads_changed": changes})


def keep_base(run: Run, loaded: Base | None = None) -> Base | None:
    """Notes in the manifest which base the run is trained from, once its weights are there; later refuses another one.

    Args:
        run: of which nothing is learned, or something.
        loaded: what this said before the model was loaded.

    Raises:
        CheckpointError: if the run has learned something from another base, or files were changed while they were
            loaded.
    """
    manifest = read_manifest(run.folder)
    noted, base = manifest.get("base"), base_of(run.experiment.model)
    if loaded is not None and base != loaded and "hub" not in loaded:
        raise CheckpointError(
            f"{run.experiment.model.base_folder} was changed while {run.label} loaded it; give the same command again "
            "when all of it is written"
        )
    if _learned(run):  # what 0.1 began has no note, and gets none: nobody knows what it was trained from
        check_base(run.folder, noted, run.experiment.model)
    elif base is not None and base != noted:
        write_document(run.folder / "manifest.json", {**manifest, "base": dict(base)})
    return base


def at_its_base(run: Run, manifest: Mapping[str, Any]) -> Run:
    """The run with its model at the commit of the hub that it was trained from, if it has learned something."""
    return replace(run, experiment=pinned(run.experiment, manifest.get("base"))) if _learned(run) else run


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        CheckpointError: if it is missing, is damaged or has another format.
    """
    path = folder / "manifest.json"
    manifest = read_document(path, _KEYS, "put it back, or start the run over with --fresh")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a manifest of format {FORMAT}, the only one this version of aegpo reads; start the run "
            "over with --fresh, or choose another --out"
        )
    for name, kind in _NEEDED.items():
        if type(manifest.get(name)) is not kind:
            raise CheckpointError(
                f"{path} has no {name!r} that is a {kind.__name__}, so it is damaged; put it back, or start the run "
                "over with --fresh"
            )
    return manifest


def identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a run from others, for its checkpoints: arm, seed, and SHA-256 of the experiment it was begun with."""
    experiment = json.dumps(manifest["experiment"], sort_keys=True).encode()
    begun = hashlib.sha256(experiment).hexdigest()
    return {"arm": manifest["arm"], "seed": manifest["seed"], "experiment": begun}


def check_manifest(run: Run) -> None:
    """Refuses a folder in which another experiment has learned something, with the differences.

    A `micro_batch` and `optimizer.retain` may change: they say how much is worked on at once and how much is kept of
    it, and move results by rounding only. So may trackers and `model.gradient_checkpointing`, which change none, how
    processes share the work, and a place, if what was there is gone and is in another folder now, with all that is
    around it. A run with steps still to do must have been begun under the rules of this version.

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
    return [change for change in changes if change.by_default and not change.is_allowed]


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
        if not (place in named and same_place(before, after, manifest)) and not _pins(place, after, manifest)
    ]


def _pins(place: Location, after: Any, manifest: Mapping[str, Any]) -> bool:
    """True if a change only says by its commit which base the run was trained from."""
    return place == ("model", "revision") and after == (manifest.get("base") or {}).get("commit", _ABSENT)


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
    begun = dict.fromkeys(LIBRARIES) | manifest["versions"]  # an older manifest names fewer libraries
    return differences(begun, versions())
