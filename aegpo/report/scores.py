"""What arms gained: after their last step and at equal cost, and what their curves are timed to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from aegpo.core.records import FloatArray
from aegpo.report.contrasts import Contrast, Gains, contrasts, corrected, gain_interval, table_of_means
from aegpo.report.pooled import uneven_p
from aegpo.report.reaching import TARGET_SHARE, Path, Target
from aegpo.report.recorded import Study
from aegpo.report.recorded_run import RecordedRun
from aegpo.report.statistics import Interval

WORK = "work"  # the metric of a training step that costs add up
SIGNAL_FORWARDS = ("signal_forwards", "probe_forwards")  # the metric, and its name in version 0.1

Final = tuple[FloatArray, FloatArray]  # the base's scores and a run's own, (K,) each
Finals = Mapping[str, Mapping[int, Final]]  # arm -> seed -> them


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


@dataclass(frozen=True)
class EqualCost:
    """What arms had gained under every label when each had spent what the cheapest run spent in all."""

    cost: float
    arm: str  # of that run
    scores: tuple[Score, ...]  # `final` is what was reached there, straight between evaluations; the headline's first
    contrasts: tuple[Contrast, ...]

    def under(self, label: str) -> tuple[Score, ...]:
        """The scores of one label, an arm each."""
        return tuple(score for score in self.scores if score.label == label)

    def compared(self, label: str) -> tuple[Contrast, ...]:
        """The contrasts of one label."""
        return tuple(each for each in self.contrasts if each.label == label)


@dataclass(frozen=True)
class Uneven:
    """An arm that seems to vary more between seeds than the others, although one spread is assumed for all."""

    arm: str
    p: float  # of its being so by chance


# --- final ----------------------------------------------------------------------------------------------------------


def final_scores(study: Study) -> tuple[tuple[Score, ...], tuple[Contrast, ...]]:
    """Gains and contrasts under every label, after the last step; a margin that the file gives is of the first."""
    scores: list[Score] = []
    found: list[Contrast] = []
    for label in study.labels:
        finals = {arm: {run.seed: _last(run, label) for run in _with(study, arm, label)} for arm in study.arms}
        present = {arm: by_seed for arm, by_seed in finals.items() if by_seed}
        of_label = _judge(study, label, present, _margin(study, label))
        scores += of_label[0]
        found += of_label[1]
    return tuple(scores), tuple(found)


def _margin(study: Study, label: str) -> float | None:
    """That of the file, which is of what is optimised."""
    return study.verdict.margin if label == study.labels[0] else None


def _with(study: Study, arm: str, label: str) -> list[RecordedRun]:
    return [run for run in study.finished(arm) if label in run.evaluations[-1].scores]


def _last(run: RecordedRun, label: str) -> Final:
    return run.evaluations[-1].base_scores[label], run.evaluations[-1].scores[label]


def _judge(
    study: Study, label: str, finals: Finals, margin: float | None
) -> tuple[tuple[Score, ...], tuple[Contrast, ...]]:
    gains = _gains(finals)
    scores = tuple(_score(study, arm, label, finals[arm], gains) for arm in finals)
    return scores, contrasts(label, gains, study.verdict.pairs(study.arms), margin)


def _gains(finals: Finals) -> Gains:
    return {arm: {seed: final - base for seed, (base, final) in by_seed.items()} for arm, by_seed in finals.items()}


def _score(study: Study, arm: str, label: str, finals: Mapping[int, Final], gains: Gains) -> Score:
    by_seed = tuple(float(gain.mean()) for gain in gains[arm].values())
    return Score(
        arm,
        label,
        label in study.finished(arm)[0].trained,
        tuple(finals),
        float(np.mean([base for base, _ in finals.values()])),
        float(np.mean([final for _, final in finals.values()])),
        float(np.mean(by_seed)),
        by_seed,
        gain_interval(gains, arm),
    )


def uneven_arm(study: Study, headline: str) -> Uneven | None:
    """The arm of the largest spread among those that have every seed."""
    finals = {arm: {run.seed: _last(run, headline) for run in _with(study, arm, headline)} for arm in study.arms}
    arms, table = table_of_means(_gains(finals), study.seeds)
    found = uneven_p(table) if len(arms) > 2 else None
    return None if found is None else Uneven(arms[found[0]], found[1])


def not_compared(study: Study) -> Iterator[str]:
    """The arms that the file compares with none, and the comparisons that it names and that no run allows."""
    named = study.verdict.comparisons is not None
    pairs = study.verdict.pairs(study.arms) if named else tuple((study.verdict.controls or {}).items())
    left_out = [arm for arm in study.arms if named and not any(arm in pair for pair in pairs)]
    if left_out:
        yield f"in no comparison that the file names: {', '.join(left_out)}"
    for arm, reference in pairs:
        seeds = {name: {run.seed for run in study.finished(name)} for name in (arm, reference)}
        without = [name for name, found in seeds.items() if not found]
        if without:
            yield f"{arm} minus {reference} is not compared: no run of {' nor of '.join(without)} is finished"
        elif not seeds[arm] & seeds[reference]:
            yield f"{arm} minus {reference} is not compared: they have no finished seed in common"


# --- at equal cost, and to a target ----------------------------------------------------------------------------------


def paths_of(study: Study, label: str) -> dict[str, dict[int, Path]]:
    """What each finished run had spent and scored at its evaluations, by arm and seed."""
    found = {arm: {run.seed: _path(run, label) for run in _with(study, arm, label)} for arm in study.arms}
    return {arm: paths for arm, paths in found.items() if paths}


def _path(run: RecordedRun, label: str) -> Path:
    steps, table = _curve(run, label)
    spent = {
        "steps": list(map(float, steps)),
        "forwards": [forwards(run, step) for step in steps],
        "cost": [run.spent(step, WORK) for step in steps],
        "seconds": [run.training_seconds(step) for step in steps],
    }
    return Path({axis: np.asarray(values, dtype=np.float64) for axis, values in spent.items()}, table.mean(axis=1))


def _curve(run: RecordedRun, label: str) -> tuple[list[int], FloatArray]:  # (evaluations, K)
    """The steps of a run's evaluations and its scores there, from step 0 on, where the policy is the base."""
    rows = [row for row in run.evaluations if label in row.scores]
    first = rows[0].scores if rows[0].step == 0 else rows[0].base_scores
    later = [row for row in rows if row.step > 0]
    return [0, *(row.step for row in later)], np.array([first[label], *(row.scores[label] for row in later)])


def forwards(run: RecordedRun, step: int) -> float:
    """Velocity evaluations of rollouts and signals up to a step."""
    return run.spent(step, "forwards", *SIGNAL_FORWARDS)


def at_equal_cost(study: Study) -> EqualCost | None:
    """Gains and contrasts where every run has spent what the cheapest spent in all; None where all spent the same."""
    runs = {(arm, run.seed): run for arm in study.arms for run in study.finished(arm)}
    total = {key: run.spent(run.training_steps, WORK) for key, run in runs.items()}
    if len({arm for arm, _ in runs}) < 2 or len(set(total.values())) < 2 or min(total.values()) <= 0:
        return None
    cheapest = min(total, key=total.__getitem__)
    scores: list[Score] = []
    found: list[Contrast] = []
    for label in study.labels:
        finals: dict[str, dict[int, Final]] = {}
        for arm in study.arms:
            for run in _with(study, arm, label):
                reached = _last(run, label)[0], _score_at(run, label, total[cheapest])
                finals.setdefault(arm, {})[run.seed] = reached
        of_label = _judge(study, label, finals, _margin(study, label))
        scores += of_label[0]
        found += of_label[1]
    return EqualCost(total[cheapest], cheapest[0], tuple(scores), tuple(found))


def _score_at(run: RecordedRun, label: str, cost: float) -> FloatArray:  # (K,)
    """Prompt by prompt, what a run scored when it had spent so much; it spent no less in all."""
    steps, table = _curve(run, label)
    spent = [run.spent(step, WORK) for step in steps]
    after = int(np.searchsorted(spent, cost))
    share = (cost - spent[after - 1]) / (spent[after] - spent[after - 1])
    found: FloatArray = table[after - 1] + share * (table[after] - table[after - 1])
    return found


def correct(
    study: Study, contrasts: Sequence[Contrast], equal: EqualCost | None
) -> tuple[tuple[Contrast, ...], EqualCost | None]:
    """Contrasts corrected for their number: those of a label for each other, at equal cost as after the last step."""
    found: list[Contrast] = []
    there: list[Contrast] = []
    for label in study.labels:
        of_label = [each for each in contrasts if each.label == label]
        family = corrected([*of_label, *(equal.compared(label) if equal is not None else ())])
        found += family[: len(of_label)]
        there += family[len(of_label) :]
    return tuple(found), None if equal is None else replace(equal, contrasts=tuple(there))


def target_of(study: Study, rows: Sequence[Score]) -> Target | None:
    """What arms are timed to; None where it would not lie above the base."""
    best = max(rows, key=lambda row: row.gain, default=None)
    if best is None:
        return None
    given = study.verdict.target
    target = Target(best.base + TARGET_SHARE * best.gain, best.arm) if given is None else Target(given, None)
    return target if target.score > max(row.base for row in rows) else None


def not_timed(study: Study, rows: Sequence[Score], target: Target | None) -> Iterator[str]:
    """Why no arm is timed to the target that the file gives."""
    given = study.verdict.target
    if given is not None and target is None and rows:
        base = max(row.base for row in rows)
        yield f"no arm is timed to the target {given:g} on {rows[0].label}: the base scores {base:.3f} already"
