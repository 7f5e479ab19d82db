"""Every number of the report, computed from the recorded runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from aegpo.core.records import FloatArray
from aegpo.method.signals.entropy_options import ENTROPY
from aegpo.report.recorded import RecordedRun, Study
from aegpo.report.statistics import (
    Interval,
    crossed_interval,
    first_reach,
    holm,
    mean_interval,
    p_value,
    smallest_detectable,
)

RESIDUAL_NOISE = "residual_noise"  # the metric of a training step
SIGNAL_FORWARDS = ("signal_forwards", "probe_forwards")  # the metric, and its name in version 0.1
_SIGNALS = ("signals", "probe")  # the stage, and its name in version 0.1


@dataclass(frozen=True)
class Difference:
    """How much more an arm gained than the first arm, seed by seed: both start from the same base and prompts."""

    seeds: tuple[int, ...]  # finished in both arms
    by_seed: tuple[float, ...]
    mean: float
    over_seeds: Interval | None  # new seeds, these prompts: paired t; None for one seed
    over_both: Interval | None  # new seeds and new prompts; None for one seed
    p: float | None  # of the paired t test over seeds
    p_holm: float | None  # corrected for the number of arms compared under this label
    smallest_detectable: float | None  # true difference that the t test would have seen with 80 % chance


@dataclass(frozen=True)
class Score:
    """One arm under one evaluation label, over its finished seeds."""

    arm: str
    label: str
    trained: bool  # False: a guard, scored but never optimised
    seeds: tuple[int, ...]
    base: float
    final: float
    gain: float
    gain_by_seed: tuple[float, ...]
    gain_interval: Interval | None  # new seeds and new prompts; for one seed: new prompts only
    difference: Difference | None  # None for the first arm, or where no seed is finished in both


@dataclass(frozen=True)
class Cost:
    """What one arm spent, mean over its finished seeds."""

    arm: str
    seeds: tuple[int, ...]
    steps: int
    forwards: float  # velocity evaluations of rollouts and signals
    signal_forwards: float
    trained_edges: float
    cost: float  # what `aegpo check` calls work: forwards + 3 x trained edges + frozen policies evaluated there
    relative_cost: float | None  # to the first arm's
    training_seconds: float  # without evaluations and checkpoints
    total_seconds: float
    stage_seconds: Mapping[str, float]  # mean of a training step
    gain_at_equal_cost: float | None  # of the headline label, at the cost of the cheapest arm


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
class Reach:
    """When an arm's mean curve first reaches the first arm's final score; None where it never does."""

    arm: str
    steps: float | None
    forwards: float | None
    cost: float | None
    seconds: float | None


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
    prompts: int  # held-out
    headline: str  # the label that decides: what is optimised; empty before the first evaluation
    target: float | None  # the first arm's final score under it
    scores: tuple[Score, ...]
    costs: tuple[Cost, ...]
    signals: tuple[SignalsCost, ...]  # of arms whose signals cost forwards
    noise: tuple[Noise, ...]  # of arms whose runs recorded it
    reach: tuple[Reach, ...]
    notes: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Evaluation labels in the order of the tables."""
        return tuple(dict.fromkeys(score.label for score in self.scores))

    def under(self, label: str) -> tuple[Score, ...]:
        """The scores of one label, an arm each."""
        return tuple(score for score in self.scores if score.label == label)


def summarize(study: Study) -> Summary:
    """All numbers of a study's report."""
    headline = study.labels[0] if study.labels else ""
    scores = tuple(_all_scores(study))
    curves = {curve.arm: curve for curve in learning_curves(study)}
    baseline = [score for score in scores if score.label == headline and score.arm == study.arms[0]]
    target = baseline[0].final if baseline else None
    reach = tuple(_reach(curve, headline, target) for curve in curves.values())
    prompts = next((len(run.evaluations[0].prompts) for run in study.runs.values() if run.evaluations), 0)
    costs = _costs(study, curves, headline)
    return Summary(
        study.name,
        study.arms,
        study.seeds,
        prompts,
        headline,
        target,
        scores,
        costs,
        tuple(_signals(study, cost) for cost in costs if cost.signal_forwards > 0),
        tuple(_noise(study)),
        reach,
        study.notes,
    )


# --- scores ----------------------------------------------------------------------------------------------------------


def _all_scores(study: Study) -> Iterator[Score]:
    for label in study.labels:
        rows = [row for arm in study.arms if (row := _score(study, arm, label)) is not None]
        compared = [row.difference.p for row in rows if row.difference and row.difference.p is not None]
        corrected = iter(holm(compared))
        for row in rows:
            if row.difference and row.difference.p is not None:
                yield replace(row, difference=replace(row.difference, p_holm=next(corrected)))
            else:
                yield row


def _score(study: Study, arm: str, label: str) -> Score | None:
    runs = [run for run in study.finished(arm) if label in run.evaluations[-1].scores]
    if not runs:
        return None
    gains = {run.seed: _gain(run, label) for run in runs}  # seed -> (K,)
    table = np.stack(list(gains.values()))
    return Score(
        arm,
        label,
        label in runs[0].trained,
        tuple(gains),
        float(np.mean([run.evaluations[-1].base_scores[label] for run in runs])),
        float(np.mean([run.evaluations[-1].scores[label] for run in runs])),
        float(table.mean()),
        tuple(table.mean(axis=1).tolist()),
        crossed_interval(table) if len(runs) > 1 else mean_interval(table[0]),
        None if arm == study.arms[0] else _difference(study, gains, label),
    )


def _gain(run: RecordedRun, label: str) -> FloatArray:  # (K,)
    last = run.evaluations[-1]
    gain: FloatArray = last.scores[label] - last.base_scores[label]
    return gain


def _difference(study: Study, gains: Mapping[int, FloatArray], label: str) -> Difference | None:
    first = {run.seed: run for run in study.finished(study.arms[0]) if label in run.evaluations[-1].scores}
    seeds = tuple(seed for seed in gains if seed in first)
    if not seeds:
        return None
    table = np.stack([gains[seed] - _gain(first[seed], label) for seed in seeds])  # (S, K)
    by_seed = table.mean(axis=1)
    return Difference(
        seeds,
        tuple(by_seed.tolist()),
        float(by_seed.mean()),
        mean_interval(by_seed),
        crossed_interval(table),
        p_value(by_seed),
        None,
        smallest_detectable(by_seed),
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
        np.mean([[_forwards(run, step) for step in steps] for run in runs], axis=0),
        np.mean([[run.spent(step, "work") for step in steps] for run in runs], axis=0),
        np.mean([[run.training_seconds(step) for step in steps] for run in runs], axis=0),
        {label: np.array([[row.scores[label].mean() for row in rows] for rows in kept]) for label in labels},
    )


def _forwards(run: RecordedRun, step: int) -> float:
    return run.spent(step, "forwards", *SIGNAL_FORWARDS)


def _costs(study: Study, curves: Mapping[str, Curve], headline: str) -> tuple[Cost, ...]:
    cheapest = min((float(curve.cost[-1]) for curve in curves.values()), default=0.0)
    first = curves.get(study.arms[0])
    return tuple(_cost_row(study.finished(arm), curve, cheapest, first, headline) for arm, curve in curves.items())


def _cost_row(runs: Sequence[RecordedRun], curve: Curve, cheapest: float, first: Curve | None, headline: str) -> Cost:
    last = runs[0].training_steps
    stages = list(dict.fromkeys(stage for run in runs for row in run.seconds.values() for stage in row))
    spent = {stage: float(np.mean([_stage_seconds(run, stage) for run in runs])) for stage in stages}
    equal = None
    if headline in curve.scores:
        means = curve.scores[headline].mean(axis=0)
        base = float(np.mean([run.evaluations[-1].base_scores[headline] for run in runs]))
        equal = float(np.interp(cheapest, curve.cost, means)) - base
    return Cost(
        curve.arm,
        tuple(run.seed for run in runs),
        last,
        float(curve.forwards[-1]),
        float(np.mean([run.spent(last, *SIGNAL_FORWARDS) for run in runs])),
        float(np.mean([run.spent(last, "trained_edges") for run in runs])),
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
    for arm in study.arms:
        metrics = [row.metrics for run in study.of(arm) for row in run.steps]
        rows = [each[RESIDUAL_NOISE] for each in metrics if RESIDUAL_NOISE in each]
        if rows:
            low, high = np.percentile(rows, [10, 90])
            yield Noise(arm, float(np.mean(rows)), float(low), float(high))


def _reach(curve: Curve, headline: str, target: float | None) -> Reach:
    if headline not in curve.scores or target is None:
        return Reach(curve.arm, None, None, None, None)
    means = curve.scores[headline].mean(axis=0)
    axes = (curve.steps, curve.forwards, curve.cost, curve.seconds)
    near = target - 1e-9  # a mean of means, which rounds otherwise than the target's
    return Reach(curve.arm, *(first_reach(axis, means, near) for axis in axes))
