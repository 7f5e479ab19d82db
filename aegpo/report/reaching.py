"""What arms spent until a seed's curve first reached a score; seeds that never did are censored, not left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aegpo.core.records import FloatArray
from aegpo.report.pooled import Spread, spread_of
from aegpo.report.statistics import combined_interval, first_reach

TARGET_SHARE = 0.8  # of the best arm's gain, where no target is given: our choice


@dataclass(frozen=True)
class Target:
    """The score that arms are timed to."""

    score: float
    share_of: str | None  # the arm of whose gain it is `TARGET_SHARE`; None: the file gives it


@dataclass(frozen=True)
class Path:
    """What one run had spent at each of its evaluations, and its mean score there; the base first, at nothing spent."""

    spent: Mapping[str, FloatArray]  # axis -> (evaluations,)
    score: FloatArray  # (evaluations,)


@dataclass(frozen=True)
class Spent:
    """What an arm's seeds spent on one axis until they reached the target."""

    by_seed: tuple[float | None, ...]  # None: not reached
    typical: float | None  # geometric mean over seeds; None where a seed did not reach it
    low: float | None  # of its interval for new seeds; None where seeds that vary are too few
    high: float | None  # None also where a seed did not reach it


@dataclass(frozen=True)
class Reach:
    """What an arm spent until it reached the target."""

    arm: str
    seeds: tuple[int, ...]
    reached: int  # of them
    spent: Mapping[str, Spent]  # axis: steps, forwards, cost, seconds


def reaching(paths: Mapping[str, Mapping[int, Path]], target: float) -> tuple[Reach, ...]:
    """When every arm reached a score that lies above the base's.

    Args:
        paths: arm -> seed -> what its run spent and scored.
        target: the score.

    Returns:
        An arm each. Costs differ by factors, so means and intervals are of logarithms, in the spread of all arms that
        reached it under each of these seeds. A seed that did not reach it counts with what it had spent in all: less
        than it would take, so that the low end of the interval holds; there is no high end.
    """
    axes = next((tuple(path.spent) for by_seed in paths.values() for path in by_seed.values()), ())
    found = {axis: _on_axis(paths, axis, target) for axis in axes}
    return tuple(
        Reach(
            arm,
            tuple(by_seed),
            sum(value is not None for value in found[axes[0]][arm].by_seed),
            {axis: found[axis][arm] for axis in axes},
        )
        for arm, by_seed in paths.items()
    )


def _on_axis(paths: Mapping[str, Mapping[int, Path]], axis: str, target: float) -> dict[str, Spent]:
    met = {
        arm: {seed: first_reach(path.spent[axis], path.score, target) for seed, path in by_seed.items()}
        for arm, by_seed in paths.items()
    }
    spent = {
        arm: {seed: _or_all(value, paths[arm][seed].spent[axis]) for seed, value in by_seed.items()}
        for arm, by_seed in met.items()
    }
    whole = [arm for arm, by_seed in met.items() if None not in by_seed.values()]
    return {
        arm: _spent(tuple(by_seed.values()), spent[arm], [spent[each] for each in whole])
        for arm, by_seed in met.items()
    }


def _or_all(value: float | None, spent: FloatArray) -> float:
    return float(spent[-1]) if value is None else value


def _spent(
    by_seed: tuple[float | None, ...], spent: Mapping[int, float], others: Sequence[Mapping[int, float]]
) -> Spent:
    if min(spent.values()) <= 0:  # no time was recorded
        return Spent(by_seed, None, None, None)
    mean = float(np.mean(np.log(list(spent.values()))))
    censored = None in by_seed
    typical = None if censored else math.exp(mean)
    spread = _spread(tuple(spent), others)
    if spread is None:
        return Spent(by_seed, typical, None, None)
    around = combined_interval(mean, spread.of_mean)
    return Spent(by_seed, typical, math.exp(around.low), None if censored else math.exp(around.high))


def _spread(seeds: Sequence[int], others: Sequence[Mapping[int, float]]) -> Spread | None:
    """Of logarithms, over the arms that have a value under each of these seeds."""
    rows = [[each[seed] for seed in seeds] for each in others if each.keys() >= set(seeds)]
    return spread_of(np.log(rows)) if rows and min(map(min, rows)) > 0 else None
