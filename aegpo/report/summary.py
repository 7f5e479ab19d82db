"""Every number of the report, computed from the recorded runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aegpo.core.records import FloatArray
from aegpo.method.signals.entropy_options import ENTROPY
from aegpo.report.contrasts import Contrast
from aegpo.report.reaching import Reach, Target, reaching
from aegpo.report.recorded import Study
from aegpo.report.recorded_run import RecordedRun
from aegpo.report.scores import (
    SIGNAL_FORWARDS,
    EqualCost,
    Score,
    Uneven,
    at_equal_cost,
    correct,
    final_scores,
    forwards,
    not_compared,
    not_timed,
    paths_of,
    target_of,
    uneven_arm,
)

RESIDUAL_NOISE = "residual_noise"  # the metric of a training step
_SHOWN_NOISE = 5e-5  # rounds to 0.0001, the least that the table shows
_SIGNALS = ("signals", "probe")  # the stage, and its name in version 0.1


@dataclass(frozen=True)
class Cost:
    """What one arm spent, mean over its finished seeds."""

    arm: str
    seeds: tuple[int, ...]
    steps: int
    forwards: float  # velocity evaluations of rollouts and signals
    signal_forwards: float
    gradient_rows: float  # states at which the network was evaluated with a gradient, once in each optimizer step
    cost: float  # what `aegpo check` calls work: forwards + 3 x gradient rows + frozen policies at those states
    relative_cost: float | None  # to the first arm's
    training_seconds: float  # without evaluations and checkpoints
    total_seconds: float
    stage_seconds: Mapping[str, float]  # mean of a training step
    gain_at_equal_cost: float | None  # of the headline label; None where all arms cost the same


@dataclass(frozen=True)
class SignalsCost:
    """What an arm's signals took, mean over its finished seeds."""

    arm: str
    settings: Mapping[str, str]  # of attention entropy: what its cost depends on
    forwards: float  # of a training step
    forwards_share: float  # of the forwards of rollouts and signals
    seconds: float  # of a training step
    seconds_share: float | None  # of a training step without evaluations and checkpoints; None: no time recorded
    exact: bool  # every prompt of a step is measured at every denoising step, all rows


@dataclass(frozen=True)
class Noise:
    """The noise that an arm's stochastic steps left in its training images, over the steps of all its runs."""

    arm: str
    mean: float
    low: float  # 10th percentile
    high: float  # 90th percentile


@dataclass(frozen=True)
class Curve:
    """One arm's scores at its evaluations, over its finished seeds."""

    arm: str
    steps: FloatArray  # (evaluations,)
    forwards: FloatArray  # (evaluations,) mean over seeds, rollouts and signals
    cost: FloatArray  # (evaluations,) mean over seeds
    seconds: FloatArray  # (evaluations,) mean over seeds, training only
    scores: Mapping[str, FloatArray]  # label -> (S, evaluations)


@dataclass(frozen=True)
class Summary:
    """The numbers of a report."""

    name: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    about: Mapping[str, str]  # arm -> what it does; arms of which nothing is said are left out
    controls: tuple[tuple[str, str], ...]  # an arm and its control each
    prompts: int  # held-out
    headline: str  # the label that decides: what is optimised; empty before the first evaluation
    scores: tuple[Score, ...]
    contrasts: tuple[Contrast, ...]
    margin: float | None  # of the file, for the headline
    equal_cost: EqualCost | None  # None where all arms cost the same, or there is but one
    uneven: Uneven | None  # on the headline
    costs: tuple[Cost, ...]
    signals: tuple[SignalsCost, ...]  # of arms whose signals cost forwards
    noise: tuple[Noise, ...]  # of arms whose runs recorded it
    target: Target | None  # None where no arm gained anything
    reach: tuple[Reach, ...]
    notes: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Evaluation labels in the order of the tables."""
        return tuple(dict.fromkeys(score.label for score in self.scores))

    def under(self, label: str) -> tuple[Score, ...]:
        """The scores of one label, an arm each."""
        return tuple(score for score in self.scores if score.label == label)

    def compared(self, label: str) -> tuple[Contrast, ...]:
        """The contrasts of one label."""
        return tuple(each for each in self.contrasts if each.label == label)


def summarize(study: Study) -> Summary:
    """All numbers of a study's report."""
    headline = study.labels[0] if study.labels else ""
    scores, found = final_scores(study)
    curves = {curve.arm: curve for curve in learning_curves(study)}
    contrasts, equal_cost = correct(study, found, at_equal_cost(study))
    costs = _costs(study, curves, equal_cost)
    prompts = next((len(run.evaluations[0].prompts) for run in study.runs.values() if run.evaluations), 0)
    rows = [score for score in scores if score.label == headline]
    target = target_of(study, rows)
    return Summary(
        study.name,
        study.arms,
        study.seeds,
        study.about,
        tuple((study.verdict.controls or {}).items()),
        prompts,
        headline,
        scores,
        contrasts,
        study.verdict.margin,
        equal_cost,
        uneven_arm(study, headline),
        costs,
        tuple(_signals(study, cost) for cost in costs if cost.signal_forwards > 0),
        tuple(_noise(study)),
        target,
        reaching(paths_of(study, headline), target.score) if target is not None else (),
        (*study.notes, *not_compared(study), *not_timed(study, rows, target)),
    )


# --- curves and costs ------------------------------------------------------------------------------------------------


def learning_curves(study: Study) -> Iterator[Curve]:
    """The curve of every arm that has a finished run."""
    for arm in study.arms:
        runs = study.finished(arm)
        if runs:
            yield curve_of(arm, runs)


def curve_of(arm: str, runs: Sequence[RecordedRun]) -> Curve:
    """The curve over some runs of an arm, at the steps at which all of them were evaluated."""
    steps = sorted(set.intersection(*({row.step for row in run.evaluations} for run in runs)))
    kept = [[row for row in run.evaluations if row.step in steps] for run in runs]
    labels = [label for label in kept[0][0].scores if all(label in row.scores for row in itertools.chain(*kept))]
    return Curve(
        arm,
        np.asarray(steps, dtype=np.float64),
        np.mean([[forwards(run, step) for step in steps] for run in runs], axis=0),
        np.mean([[run.spent(step, "work") for step in steps] for run in runs], axis=0),
        np.mean([[run.training_seconds(step) for step in steps] for run in runs], axis=0),
        {label: np.array([[row.scores[label].mean() for row in rows] for rows in kept]) for label in labels},
    )


def _costs(study: Study, curves: Mapping[str, Curve], equal: EqualCost | None) -> tuple[Cost, ...]:
    first = curves.get(study.arms[0])
    gains = {score.arm: score.gain for score in equal.under(study.labels[0])} if equal is not None else {}
    return tuple(_cost_row(study.finished(arm), curve, first, gains.get(arm)) for arm, curve in curves.items())


def _cost_row(runs: Sequence[RecordedRun], curve: Curve, first: Curve | None, equal: float | None) -> Cost:
    last = runs[0].training_steps
    stages = list(dict.fromkeys(stage for run in runs for row in run.seconds.values() for stage in row))
    spent = {stage: float(np.mean([_stage_seconds(run, stage) for run in runs])) for stage in stages}
    return Cost(
        curve.arm,
        tuple(run.seed for run in runs),
        last,
        float(curve.forwards[-1]),
        float(np.mean([run.spent(last, *SIGNAL_FORWARDS) for run in runs])),
        float(np.mean([run.gradient_rows(last) for run in runs])),
        float(curve.cost[-1]),
        float(curve.cost[-1] / first.cost[-1]) if first is not None and first.cost[-1] > 0 else None,
        float(curve.seconds[-1]),
        sum(spent.values()),
        {stage: value / last for stage, value in spent.items()},
        equal,
    )


def _stage_seconds(run: RecordedRun, stage: str) -> float:
    return sum(row.get(stage, 0.0) for row in run.seconds.values())


def _signals(study: Study, cost: Cost) -> SignalsCost:
    experiment = study.finished(cost.arm)[0].experiment
    probe = experiment.get("signals", {}).get(ENTROPY, experiment.get("probe", {}))
    exact = {"steps": "all", "rows": "all", "refresh": 1}
    shown = {name: str(probe[name]) for name in ("source", "samples", *exact) if name in probe}
    seconds = sum(cost.stage_seconds.get(stage, 0.0) for stage in _SIGNALS)
    training = cost.training_seconds / cost.steps
    return SignalsCost(
        cost.arm,
        shown,
        cost.signal_forwards / cost.steps,
        cost.signal_forwards / cost.forwards,
        seconds,
        seconds / training if training > 0 else None,
        all(probe.get(name, value) == value for name, value in exact.items()),
    )


def _noise(study: Study) -> Iterator[Noise]:
    """Of every arm; nothing where no arm's steps left any that a table would show."""
    found = list(_noise_of(study))
    if any(each.high >= _SHOWN_NOISE for each in found):
        yield from found


def _noise_of(study: Study) -> Iterator[Noise]:
    for arm in study.arms:
        metrics = [row.metrics for run in study.of(arm) for row in run.steps]
        rows = [each[RESIDUAL_NOISE] for each in metrics if RESIDUAL_NOISE in each]
        if rows:
            low, high = np.percentile(rows, [10, 90])
            yield Noise(arm, float(np.mean(rows)), float(low), float(high))
