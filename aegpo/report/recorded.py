"""Reads back what the runs of an experiment left on disk, and says what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aegpo.config.validation import validate
from aegpo.core.as_json import loads
from aegpo.core.records import FloatArray
from aegpo.core.verdicts import VerdictSpec
from aegpo.errors import AegpoError
from aegpo.method.signals.entropy_options import ENTROPY, ENTROPY_DELTA
from aegpo.runs.evaluations import evaluated_steps, unevaluated
from aegpo.runs.manifest import read_manifest
from aegpo.runs.observers import read_dropped

WEIGHTED_SUM = "weighted sum"  # label of what is optimised where several rewards are trained on
_OLDER_SIGNALS = {"entropy": ENTROPY, "delta": ENTROPY_DELTA}  # key of version 0.1 -> signal
_SHOWN = 5  # steps that a note names
IDLE_STAGES = ("evaluation", "checkpoint")  # wall-clock that is not the method's


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

    def training_seconds(self, step: int) -> float:
        """Wall-clock of the training steps up to `step`, without evaluations and checkpoints."""
        rows = (stages for done, stages in self.seconds.items() if 0 < done <= step)
        return sum(value for row in rows for stage, value in row.items() if stage not in IDLE_STAGES)

    @property
    def images(self) -> tuple[Path, ...]:
        """Sample grids in the order of the steps."""
        return tuple(sorted((self.folder / "images").glob("step-*.png")))


@dataclass(frozen=True)
class Study:
    """Every run of one experiment; the first arm is the baseline."""

    folder: Path
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Mapping[tuple[str, int], RecordedRun]
    notes: tuple[str, ...]  # what is missing or odd, in words
    verdict: VerdictSpec  # which arms are compared, and by what measure

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self.folder.name

    def of(self, arm: str) -> tuple[RecordedRun, ...]:
        """The runs of an arm that have begun, by seed."""
        return tuple(self.runs[arm, seed] for seed in self.seeds if (arm, seed) in self.runs)

    def finished(self, arm: str) -> tuple[RecordedRun, ...]:
        """The finished runs of an arm, by seed."""
        return tuple(run for run in self.of(arm) if run.finished)

    @cached_property
    def example(self) -> RecordedRun:
        """The first run in the order of the arms: what is said of all runs is read off it."""
        return next(run for arm in self.arms for run in self.of(arm))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Evaluation labels: what the first arm optimises first, then the guards."""
        rows = (row for run in self.runs.values() for row in run.evaluations)
        evaluated = dict.fromkeys(label for row in rows for label in row.scores)
        trained = [label for label in self.example.trained if label in evaluated]
        return (*trained, *(label for label in evaluated if label not in trained))


def read_study(folder: Path) -> Study:
    """Reads every `ARM/seed-S` below the folder of an experiment.

    Raises:
        AegpoError: if there is no run, a file is damaged, or runs were evaluated on different prompts.
    """
    found = {(path.parent.name, _seed(path)): path for path in sorted(folder.glob("*/seed-*")) if _seed(path) >= 0}
    begun = {key: path for key, path in found.items() if (path / "manifest.json").exists()}
    if not begun:
        raise AegpoError(f"no run in {folder}: it has no ARM/seed-S/manifest.json; name a folder a run wrote to")
    arms, seeds, verdict = _order(folder, begun)
    runs = {key: _read_run(key[0], key[1], path) for key, path in begun.items() if key[0] in arms and key[1] in seeds}
    if not runs:
        raise AegpoError(f"no run in {folder} is of the arms and seeds that its order.json names")
    _check_prompts(runs)
    odd = (*_unevaluated(runs), *_dropped(runs), *_not_finite(runs))
    notes = (*_missing(arms, seeds, runs), *odd, *_strangers(begun, runs))
    return Study(folder, arms, seeds, runs, notes, verdict)


def _seed(path: Path) -> int:
    number = path.name.removeprefix("seed-")
    return int(number) if number.isdecimal() else -1


def _order(folder: Path, begun: Mapping[tuple[str, int], Path]) -> tuple[tuple[str, ...], tuple[int, ...], VerdictSpec]:
    path = folder / "order.json"
    if not path.exists():
        return tuple(sorted({arm for arm, _ in begun})), tuple(sorted({seed for _, seed in begun})), VerdictSpec()
    order = _parse(path, path.read_text(encoding="utf-8"))
    arms = tuple(order["arms"])
    verdict, found = validate(VerdictSpec, {key: order[key] for key in VerdictSpec.model_fields if key in order})
    wrong = [*found, *(verdict.problems(arms) if verdict is not None else ())]
    if verdict is None or wrong:
        places = "; ".join(f"{'.'.join(map(str, each.location))}: {each.message}" for each in wrong)
        raise AegpoError(f"cannot read {path}: {places}; mend it, or give the experiment file to 'aegpo run' again")
    return arms, tuple(order["seeds"]), verdict


def _parse(path: Path, text: str) -> Any:
    try:
        return loads(text)
    except ValueError as error:
        raise AegpoError(f"cannot read {path}: {error}; delete the run's folder and run it again") from error


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line without its newline is one that was being written, and left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and line.strip():
            yield _parse(path, line)


def _read_run(arm: str, seed: int, folder: Path) -> RecordedRun:
    manifest = read_manifest(folder)
    # a step that was repeated after a stop is there twice: the later row is the one that counts
    not_finite: dict[str, list[int]] = {}
    steps = {row["step"]: _step(row, not_finite) for row in _rows(folder / "metrics.jsonl") if row["step"] > 0}
    weights = _weights(manifest["experiment"])
    rows = {row["step"]: _evaluation(row, weights) for row in _rows(folder / "evaluations.jsonl")}
    evaluations = {step: row for step, row in rows.items() if _all_finite(row, not_finite)}
    return RecordedRun(
        arm,
        seed,
        folder,
        manifest,
        tuple(steps[step] for step in sorted(steps)),
        tuple(evaluations[step] for step in sorted(evaluations)),
        _seconds(folder / "timing.jsonl"),
        (folder / "finished.json").exists(),
        {what: tuple(dict.fromkeys(places)) for what, places in not_finite.items()},
    )


def _seconds(path: Path) -> dict[int, Mapping[str, float]]:
    """Wall-clock by step and stage; a step and its evaluation are rows of their own."""
    found: dict[int, dict[str, float]] = {}
    for row in _rows(path):
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


def _check_prompts(runs: Mapping[tuple[str, int], RecordedRun]) -> None:
    first: tuple[str, tuple[str, ...]] | None = None
    for (arm, seed), run in runs.items():
        for row in run.evaluations:
            first = first or (f"{arm} seed {seed}", row.prompts)
            if row.prompts != first[1]:
                raise AegpoError(
                    f"{arm} seed {seed} was evaluated at step {row.step} on other prompts than {first[0]}, so their "
                    "scores cannot be compared; give every arm the same 'prompts' and run them again with --fresh"
                )


def _missing(arms: Sequence[str], seeds: Sequence[int], runs: Mapping[tuple[str, int], RecordedRun]) -> Iterator[str]:
    for arm in arms:
        for seed in seeds:
            run = runs.get((arm, seed))
            if run is None:
                yield f"seed {seed} of arm {arm}: not started"
            elif not run.finished:
                end = "" if run.steps_done < run.training_steps else ", not marked finished or last step not evaluated"
                yield f"seed {seed} of arm {arm}: {run.steps_done} of {run.training_steps} steps{end}"
            elif missing := [row.step for row in run.steps if row.step not in run.seconds]:
                yield f"seed {seed} of arm {arm}: no wall-clock was recorded for {len(missing)} of its steps"


def _unevaluated(runs: Mapping[tuple[str, int], RecordedRun]) -> Iterator[str]:
    for (arm, seed), run in runs.items():
        due = evaluated_steps(run.training_steps, int(run.experiment["evaluation"]["every"]))
        lost = unevaluated([row.step for row in run.evaluations], due, run.steps_done)
        if lost and (run.evaluations or run.steps):  # else it has only begun
            yield f"seed {seed} of arm {arm}: evaluations.jsonl lacks {lost}; the arm's curve has nothing there"


def _dropped(runs: Mapping[tuple[str, int], RecordedRun]) -> Iterator[str]:
    """What trackers and plugins did not hear to the end."""
    for (arm, seed), run in runs.items():
        for each in read_dropped(run.folder):
            where = f"seed {seed} of arm {arm}, step {each.step}"
            yield f"{where}: {each.observer} failed with {each.error}, and the run went on without it"


def _not_finite(runs: Mapping[tuple[str, int], RecordedRun]) -> Iterator[str]:
    for (arm, seed), run in runs.items():
        for what, steps in sorted(run.not_finite.items()):
            shown = [str(step) for step in steps[:_SHOWN]]
            shown += [f"{len(steps) - _SHOWN} more"] if len(steps) > _SHOWN else []
            where = f"step{'s' * (len(steps) > 1)} {', '.join(shown)}"
            yield f"seed {seed} of arm {arm}: {what} is not a finite number at {where}, and left out there"


def _strangers(begun: Mapping[tuple[str, int], Path], runs: Mapping[tuple[str, int], RecordedRun]) -> Iterator[str]:
    for arm, seed in begun:
        if (arm, seed) not in runs:
            yield f"seed {seed} of arm {arm} is in the folder but not in the experiment: left out"
