"""Runs that get more training steps than they were begun with, and go on as if they had had them from the start.

A training step is a function of the weights, the seed and its number; only the learning rate may look at how many there
are. The evaluation after what was the last step is one that the longer run does not make, unless `evaluation.every`
asks for it: it is taken out of the record, so that runs of an experiment have the same evaluations, and rows are those
of a run that was longer from the start.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegpo.core.experiment import Experiment
from aegpo.core.reports import RunInfo
from aegpo.runs.records import EvaluationRow, read_rows

if TYPE_CHECKING:
    from aegpo.runs.checkpoints import Checkpoint

STEPS = "training_steps"  # of an experiment
RAISED = "training_steps_raised"  # of a manifest: from how many to how many, each time
_EVALUATIONS = "evaluations.jsonl"


def why_not_longer(steps: Any, experiment: Experiment) -> str:
    """Why a run that was begun for so many steps cannot go on as an experiment with another number; empty: it can."""
    if not isinstance(steps, int) or experiment.training_steps < steps:
        return "a run gets more steps, not fewer; stop it where it is enough"
    schedule = experiment.optimizer.schedule
    if schedule.kind != "constant":
        return (
            f"'optimizer.schedule: {schedule.kind}' lowers the learning rate over all steps, so those that are done "
            "had another rate than in a longer run"
        )
    return ""


def begun_experiment(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The experiment of a manifest with the number of training steps that the run was begun with."""
    raised = manifest.get(RAISED)
    experiment: Mapping[str, Any] = manifest["experiment"]
    return {**experiment, STEPS: raised[0]["from"]} if raised else experiment


def ended_here(run: RunInfo) -> bool:
    """True if a run goes on from where it once was to end, and the evaluation there is none that it makes now."""
    return 0 < run.first_step < run.training_steps and run.first_step not in run.evaluated_steps


def without_the_ending(checkpoint: Checkpoint, folder: Path) -> Checkpoint | None:
    """The checkpoint after what was the last step as a longer run has it; None: it is that already.

    It counts no evaluation after that step, so that the row may go when it is written, and owes none.

    Args:
        checkpoint: of a run for which `ended_here` holds.
        folder: of the run, with the record that the checkpoint counts.
    """
    state, records = dict(checkpoint.state), checkpoint.records
    if "owes_evaluation" in state:
        state["owes_evaluation"] = False
    path = folder / _EVALUATIONS
    read = read_rows(path, EvaluationRow)
    sizes = [end for row, end in zip(read.rows, read.ends, strict=True) if row["step"] < checkpoint.step]
    if records is not None and sizes:
        kept = path.read_bytes()[: sizes[-1]]
        records = {**records, _EVALUATIONS: [len(kept), zlib.crc32(kept)]}
    longer = replace(checkpoint, state=state, records=records)
    return None if (longer.state, longer.records) == (checkpoint.state, checkpoint.records) else longer
