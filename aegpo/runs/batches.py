"""Micro-batches that a file leaves to the machine: found once, noted in the run's manifest, used by every later start.

"micro_batches": {"rollouts": 32, "optimizer": 16}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from aegpo.core.experiment import Experiment
from aegpo.runs.folders import Run
from aegpo.runs.manifest import BATCHES, read_manifest
from aegpo.runs.records import write_document

SECTIONS = ("rollouts", "optimizer")


def with_noted(experiment: Experiment, manifest: Mapping[str, Any]) -> Experiment:
    """The experiment with what its run was computed with before, where the file says `auto`; what it says itself wins.

    What a run was begun with may also be a number that its file gave then.
    """
    found = {}
    for name in _left(experiment):
        begun = manifest["experiment"].get(name, {}).get("micro_batch")
        number = (manifest.get(BATCHES) or {}).get(name, begun)
        if type(number) is int and number >= 1:
            found[name] = getattr(experiment, name).model_copy(update={"micro_batch": number})
    return experiment.model_copy(update=found)


def note(run: Run, found: Experiment) -> str | None:
    """Notes in the manifest what was found for a run; returns what is to be said of it, if anything was."""
    numbers = {name: getattr(found, name).micro_batch for name in _left(run.experiment)}
    if not numbers:
        return None
    manifest = read_manifest(run.folder)
    noted = {**(manifest.get(BATCHES) or {}), **numbers}
    if noted != manifest.get(BATCHES):
        write_document(run.folder / "manifest.json", {**manifest, BATCHES: noted})
    return ", ".join(f"{name}.micro_batch: auto -> {number}" for name, number in numbers.items())


def _left(experiment: Experiment) -> Iterator[str]:
    """The sections that leave their micro-batch to the machine."""
    return (name for name in SECTIONS if getattr(experiment, name).micro_batch == "auto")
