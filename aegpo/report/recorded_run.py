"""One run as it was recorded: read back from disk, less what is damaged, which is said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from aegpo.core.records import FloatArray
from aegpo.errors import CheckpointError
from aegpo.method.signals.entropy_options import ENTROPY, ENTROPY_DELTA
from aegpo.runs.checkpoints import noted_records
from aegpo.runs.folders import is_finished
from aegpo.runs.manifest import read_manifest
from aegpo.runs.records import EvaluationRow, MetricsRow, TimingRow, read_rows
from aegpo.runs.resuming import (
    EVALUATIONS,
    IMAGES,
    METRICS,
    TIMING,
    damaged_images,
    image_name,
    image_steps,
    miscounted,
)

WEIGHTED_SUM = "weighted sum"  # label of what is optimised where several rewards are trained on
IDLE_STAGES = ("evaluation", "checkpoint")  # wall-clock that is not the method's
_OLDER_SIGNALS = {"entropy": ENTROPY, "delta": ENTROPY_DELTA}  # key of version 0.1 -> signal


class _Reward(BaseModel):
    kind: str
    name: str | None = None
    weight: float = 1.0


class _Rollouts(BaseModel):
    prompts_per_step: int
    rollouts_per_step: int
    denoising_steps: int


class _Evaluation(BaseModel):
    every: int = Field(ge=1)
    denoising_steps: int | None = None
    images: int = 16


class _Experiment(BaseModel):
    name: str
    training_steps: int
    rollouts: _Rollouts
    rewards: list[_Reward]
    evaluation: _Evaluation
    signals: dict[str, dict[str, Any]] = {}
    probe: dict[str, Any] = {}


class _Manifest(BaseModel):
    """What a report reads of a manifest, of any version."""

    arm: str
    seed: int
    experiment: _Experiment
    versions: dict[str, str | None]
    plugins: list[tuple[str, str]]
    commit: str | None
    base: dict[str, Any] | None = None


@dataclass(frozen=True)
class RecordedStep:
    """One training step as the tracker wrote it."""

    step: int
    metrics: Mapping[str, float]
    counts: tuple[int, ...]  # P
    selected: tuple[tuple[int, ...], ...]  # P, the chosen denoising steps
    signals: Mapping[str, FloatArray]  # by name: (P,), (T,) or (P, T); NaN at what was not known


@dataclass(frozen=True)
class RecordedEvaluation:
    """Scores of the held-out prompts after one training step."""

    step: int
    scores: Mapping[str, FloatArray]  # reward label -> (prompts,)
    base_scores: Mapping[str, FloatArray]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class RecordedRun:
    """One arm under one seed, as far as it got."""

    arm: str
    seed: int
    folder: Path
    manifest: Mapping[str, Any]
    steps: tuple[RecordedStep, ...]
    evaluations: tuple[RecordedEvaluation, ...]
    seconds: Mapping[int, Mapping[str, float]]  # step -> stage -> wall-clock
    marked_finished: bool
    not_finite: Mapping[str, tuple[int, ...]]  # what was recorded but is left out, for it is no number -> steps
    images: tuple[Path, ...]  # sample grids in the order of the steps
    damage: tuple[str, ...]  # what of it is left out, in words

    @property
    def experiment(self) -> Mapping[str, Any]:
        """The resolved spec."""
        spec: Mapping[str, Any] = self.manifest["experiment"]
        return spec

    @property
    def training_steps(self) -> int:
        """How many steps the run was to have."""
        return int(self.experiment["training_steps"])

    @property
    def steps_done(self) -> int:
        """How many it has."""
        return self.steps[-1].step if self.steps else 0

    @property
    def finished(self) -> bool:
        """True if every step is done and the last one evaluated."""
        evaluated = self.evaluations[-1].step if self.evaluations else -1
        return self.marked_finished and self.steps_done == evaluated == self.training_steps

    @property
    def trained(self) -> tuple[str, ...]:
        """Labels of the rewards that are optimised; their weighted sum too if they are several."""
        return _trained(self.experiment)

    def spent(self, step: int, *names: str) -> float:
        """The sum of metrics over the training steps up to `step`."""
        rows = (row.metrics for row in self.steps if row.step <= step)
        return sum(row.get(name, 0.0) for row in rows for name in names)

    def gradient_rows(self, step: int) -> float:
        """Of the training steps up to `step`; before they were counted, every trained edge was evaluated."""
        rows = (row.metrics for row in self.steps if row.step <= step)
        return sum(row.get("gradient_rows", row.get("trained_edges", 0.0)) for row in rows)

    def training_seconds(self, step: int) -> float:
        """Wall-clock of the training steps up to `step`, without evaluations and checkpoints."""
        rows = (stages for done, stages in self.seconds.items() if 0 < done <= step)
        return sum(value for row in rows for stage, value in row.items() if stage not in IDLE_STAGES)


def read_run(arm: str, seed: int, folder: Path) -> RecordedRun:
    """One run.

    Raises:
        CheckpointError: if its manifest, its steps or its evaluations are damaged, or those of another run.
    """
    manifest = _readable(folder, read_manifest(folder))
    if (manifest["arm"], manifest["seed"]) != (arm, seed):
        raise CheckpointError(
            f"{folder} has the run of arm {manifest['arm']!r}, seed {manifest['seed']}, by its manifest.json; put it "
            "where it belongs"
        )
    for path in miscounted(folder, noted_records(folder / "checkpoints")):
        raise CheckpointError(f"{path} is not what the newest checkpoint counts; put the file back")
    # a step that was repeated after a stop is there twice: the later row is the one that counts
    not_finite: dict[str, list[int]] = {}
    rows = read_rows(folder / METRICS, MetricsRow).whole()
    steps = {row["step"]: _step(row, not_finite) for row in rows if row["step"] > 0}
    weights, scored = _weights(manifest["experiment"]), read_rows(folder / EVALUATIONS, EvaluationRow).whole()
    evaluations = {row["step"]: _evaluation(row, weights) for row in scored}
    evaluations = {step: row for step, row in evaluations.items() if _all_finite(row, not_finite)}
    damage: list[str] = []
    finished = _marked_finished(folder, int(manifest["experiment"]["training_steps"]), damage)
    seconds = _seconds(folder / TIMING, finished, damage)
    images = _images(folder / IMAGES, scored, damage)
    return RecordedRun(
        arm,
        seed,
        folder,
        manifest,
        tuple(steps[step] for step in sorted(steps)),
        tuple(evaluations[step] for step in sorted(evaluations)),
        seconds,
        finished,
        {what: tuple(dict.fromkeys(places)) for what, places in not_finite.items()},
        images,
        tuple(f"seed {seed} of arm {arm}: {each}" for each in damage),
    )


def _readable(folder: Path, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The manifest; one of 0.1 has no checksum by which damage would have been noticed."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{folder / 'manifest.json'}: its {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}, so it is "
            "damaged; put it back"
        ) from error
    return manifest


def _marked_finished(folder: Path, training_steps: int, damage: list[str]) -> bool:
    try:
        return is_finished(folder, training_steps)
    except CheckpointError as error:
        damage.append(str(error))
        return False


def _images(folder: Path, scored: Sequence[Mapping[str, Any]], damage: list[str]) -> tuple[Path, ...]:
    """Sample grids in the order of the steps; damaged ones are left out, and noted."""
    expected = {row["step"]: row["image_sha256"] for row in scored if "image_sha256" in row}
    odd = dict(damaged_images(expected, folder))
    damage += [f"{folder / image_name(step)} {wrong}: not shown" for step, wrong in odd.items()]
    found = dict(image_steps(folder))
    unsigned = {step: path for step, path in found.items() if step not in expected and not _is_png(path)}
    damage += [f"{path} is no picture: not shown" for path in unsigned.values()]
    return tuple(path for step, path in found.items() if step not in odd and step not in unsigned)


def _is_png(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for what is no picture
        return False
    return True


def _seconds(path: Path, finished: bool, damage: list[str]) -> dict[int, Mapping[str, float]]:
    """Wall-clock by step and stage; a step and its evaluation are rows of their own."""
    found: dict[int, dict[str, float]] = {}
    try:
        read = read_rows(path, TimingRow)
        rows = read.whole()
    except CheckpointError as error:
        damage.append(f"{error}: its wall-clock is left out")
        return {}
    if finished and read.damage is not None:  # nobody is writing it
        damage.append(f"{path}: {read.damage}: the wall-clock of that line is left out")
    for row in rows:
        found.setdefault(row["step"], {}).update(row["seconds"])
    return dict(found)


def _step(row: Mapping[str, Any], not_finite: dict[str, list[int]]) -> RecordedStep:
    """One step, less what is not finite, which is noted; NaN in a signal is what was not known."""
    metrics = {name: value for name, value in row["metrics"].items() if math.isfinite(value)}
    older = {name: row[key] for key, name in _OLDER_SIGNALS.items() if row.get(key) is not None}
    signals: dict[str, FloatArray] = {}
    for name, values in (row.get("signals", {}) | older).items():
        table = np.asarray(values, dtype=np.float64)
        if np.isinf(table).any():
            not_finite.setdefault(f"the signal {name!r}", []).append(row["step"])
        else:
            signals[name] = table
    for name in row["metrics"].keys() - metrics.keys():
        not_finite.setdefault(f"the metric {name!r}", []).append(row["step"])
    selected = tuple(tuple(steps) for steps in row["selected"])
    return RecordedStep(row["step"], metrics, tuple(row["counts"]), selected, signals)


def _all_finite(row: RecordedEvaluation, not_finite: dict[str, list[int]]) -> bool:
    odd = [label for label in row.scores if not np.isfinite([row.scores[label], row.base_scores[label]]).all()]
    for label in odd:
        not_finite.setdefault(f"a score of {label!r}", []).append(row.step)
    return not odd


def _evaluation(row: Mapping[str, Any], weights: Mapping[str, float]) -> RecordedEvaluation:
    return RecordedEvaluation(
        row["step"], _scores(row["scores"], weights), _scores(row["base_scores"], weights), tuple(row["prompts"])
    )


def _scores(scores: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> dict[str, FloatArray]:
    table = {label: np.asarray(values, dtype=np.float64) for label, values in scores.items()}
    if len(weights) < 2 or not table.keys() >= weights.keys():
        return table
    total: FloatArray = np.sum([weight * table[label] for label, weight in weights.items()], axis=0)
    return {WEIGHTED_SUM: total, **table}


def _weights(experiment: Mapping[str, Any]) -> dict[str, float]:
    return {reward.get("name") or reward["kind"]: reward.get("weight", 1.0) for reward in experiment["rewards"]}


def _trained(experiment: Mapping[str, Any]) -> tuple[str, ...]:
    labels = tuple(_weights(experiment))
    return (WEIGHTED_SUM, *labels) if len(labels) > 1 else labels
