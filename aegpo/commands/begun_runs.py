"""What `aegpo check` says of runs that a file began before: defaults that are not what they were then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from aegpo.config.loading import ExperimentFile
from aegpo.errors import CheckpointError
from aegpo.runs.changes import Change
from aegpo.runs.folders import Run, run_folder
from aegpo.runs.manifest import changed_defaults


def notes(file: ExperimentFile, out: Path) -> Iterator[str]:
    """A line for each field whose default changed since runs of the file were begun, and what to do about it."""
    found: dict[Change, list[Run]] = {}
    for arm in file.arms:
        for seed in file.seeds:
            run = Run(arm, seed, file.experiment(arm, seed), run_folder(out, file.name, arm, seed))
            try:
                changes = changed_defaults(run)
            except CheckpointError as error:
                yield str(error)
                continue
            for change in changes:
                found.setdefault(change, []).append(run)
    for change, runs in found.items():
        more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        yield (
            f"{runs[0].label}{more} in {out / file.name} cannot go on: {change.key} was {change.old} when begun, "
            f"{file.path} does not set it, and its default is {change.new} now; to keep the old one, "
            f"{change.way_back}"
        )
