"""The manifest of a run: what is run and by which versions, written once; what differs when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aegpo.errors import CheckpointError
from aegpo.runs.bases import Base, base_of, check_base, pinned
from aegpo.runs.changes import Change, differences, experiment_changes
from aegpo.runs.folders import FINISHED, Run
from aegpo.runs.longer import RAISED, STEPS, begun_experiment
from aegpo.runs.places import FROM_ROOT, KEY
from aegpo.runs.records import read_document, write_document
from aegpo.runs.rules import RULES, changed_rules, without_words
from aegpo.runs.software import LIBRARIES, source_state, versions
from aegpo.runs.split import KEY as SPLIT
from aegpo.runs.split import check_split, noted_split

FORMAT = 1
_NEEDED = {"arm": str, "seed": int, "experiment": dict, "versions": dict, "threads": int}
BATCHES = "micro_batches"  # that were left to the machine: see `aegpo.runs.batches`
_CHANGED = ("threads_changed", "parallel_changed")
_KEYS = (
    "format",
    *_NEEDED,
    "base",
    "plugins",
    "commit",
    "dirty",
    KEY,
    "rules",
    "parallel",
    BATCHES,
    SPLIT,
    RAISED,
    *_CHANGED,
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
            **source_state(),
            KEY: FROM_ROOT,
            "rules": dict(RULES),
            "threads": threads,
            **noted_split(run.experiment),
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


def note_longer(run: Run) -> dict[str, Any]:
    """The manifest, which notes that the run makes more training steps than it was to make, if it does."""
    manifest, steps = read_manifest(run.folder), run.experiment.training_steps
    before = manifest["experiment"][STEPS]
    if before == steps:
        return manifest
    raised = [*manifest.get(RAISED, []), {"from": before, "to": steps}]
    write_document(
        run.folder / "manifest.json",
        {**manifest, "experiment": {**manifest["experiment"], STEPS: steps}, RAISED: raised},
    )
    (run.folder / FINISHED).unlink(missing_ok=True)
    return read_manifest(run.folder)


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
    experiment = json.dumps(without_words(begun_experiment(manifest)), sort_keys=True).encode()
    begun = hashlib.sha256(experiment).hexdigest()
    return {"arm": manifest["arm"], "seed": manifest["seed"], "experiment": begun}


def check_manifest(run: Run) -> None:
    """Refuses a folder in which another experiment has learned something, with the differences.

    A `micro_batch` and `optimizer.retain` may change: they say how much is worked on at once and how much is kept of
    it, and move results by rounding only. So may trackers and `model.gradient_checkpointing`, which change none, how
    processes share the work, and a place, if what was there is gone and is in another folder now, with all that is
    around it. `training_steps` may be raised where no step that is done would have been another one. A run with steps
    still to do must have been begun under the rules of this version.

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
    if not run.finished:
        check_split(run.folder, manifest, run.experiment)
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
    """Each `micro_batch` that is not the one the run was begun with: bits may differ from a run without the change.

    Where one is left to the machine now, the number that was there stays.
    """
    changes = experiment_changes(run.experiment, manifest)
    return [f"{each.key}: {each.old} -> {each.new}" for each in changes if each.is_micro_batch and each.new != '"auto"']


def moved_places(run: Run, manifest: Mapping[str, Any]) -> list[str]:
    """Each place that is not where it was when the run was begun."""
    changes = experiment_changes(run.experiment, manifest)
    return [f"{each.key}: {each.old} -> {each.new}" for each in changes if each.moved]


def _outdated(run: Run, manifest: Mapping[str, Any]) -> bool:
    """True if a run that learned nothing would be begun in another way now."""
    split = noted_split(run.experiment).get(SPLIT)
    changed = experiment_changes(run.experiment, manifest) or changed_rules(manifest.get("rules", {}))
    return bool(changed) or split != manifest.get(SPLIT)


def _learned(run: Run) -> bool:
    """True if a step was recorded or a checkpoint written."""
    metrics = run.folder / "metrics.jsonl"
    recorded = metrics.exists() and metrics.stat().st_size > 0
    return recorded or (run.checkpoints.is_dir() and any(run.checkpoints.iterdir()))


def changed_versions(manifest: Mapping[str, Any]) -> list[str]:
    """Libraries whose version is not the one the run was begun with: bits may differ from a run without a break."""
    begun = dict.fromkeys(LIBRARIES) | manifest["versions"]  # an older manifest names fewer libraries
    return differences(begun, versions())
