"""Intervals and tests for a few seeds and some dozens of prompts; the distributions are scipy's.

Scores come as a table with a row a seed and a column a prompt, the same prompts under every seed. S counts seeds and K
held-out prompts here; every function is pure.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from aegpo.core.records import FloatArray, IntArray

LEVEL = 0.95  # of every interval
POWER = 0.8  # of the smallest difference that could have shown
RESAMPLES = 2000  # of a bootstrap or permutation: ends of an interval to about 5 % of its width


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if 0 lies outside, ends included."""
        return self.low > 0 or self.high < 0

    @property
    def half_width(self) -> float:
        """Half the distance between the ends."""
        return (self.high - self.low) / 2


# --- Student's t -----------------------------------------------------------------------------------------------------


def t_cdf(value: float, df: float) -> float:
    """P(T <= value) for Student's t with `df` > 0 degrees of freedom, whole or not."""
    from scipy.special import stdtr

    return float(stdtr(df, value))


@functools.cache
def t_quantile(probability: float, df: float) -> float:
    """The value that Student's t stays below with a probability in (0, 1)."""
    from scipy.special import stdtrit

    return float(stdtrit(df, probability))


# --- intervals -------------------------------------------------------------------------------------------------------


def mean_interval(values: FloatArray) -> Interval | None:
    """The t interval of the mean of (n,) independent values; None for fewer than 2."""
    count = len(values)
    if count < 2:
        return None
    half = t_quantile((1 + LEVEL) / 2, count - 1) * float(values.std(ddof=1)) / math.sqrt(count)
    return Interval(float(values.mean()) - half, float(values.mean()) + half)


def crossed_interval(table: FloatArray) -> Interval | None:
    """The interval of the mean of an (S, K) table for new seeds and new prompts alike; None for S < 2 or K < 2.

    The squared standard error is var(seed means) / S + var(prompt means) / K, with Satterthwaite's degrees of freedom
    (Satterthwaite 1946; the combination is that of Clark's min F', 1973). It counts the residual twice, so it errs on
    the wide side. Bootstrapping prompts crossed with seeds is the usual alternative, and far too narrow here: three
    resampled seeds cannot show how much seeds vary.
    """
    seeds, prompts = table.shape
    if seeds < 2 or prompts < 2:
        return None
    by_seed = float(table.mean(axis=1).var(ddof=1)) / seeds
    by_prompt = float(table.mean(axis=0).var(ddof=1)) / prompts
    mean, total = float(table.mean()), by_seed + by_prompt
    if total == 0:
        return Interval(mean, mean)
    # as shares of the total: their squares would underflow for scores that are all but equal
    df = 1 / ((by_seed / total) ** 2 / (seeds - 1) + (by_prompt / total) ** 2 / (prompts - 1))
    half = t_quantile((1 + LEVEL) / 2, df) * math.sqrt(total)
    return Interval(mean - half, mean + half)


def p_value(values: FloatArray) -> float | None:
    """Two-sided p of the t test that the mean of (n,) independent values is 0; None for fewer than 2."""
    if len(values) < 2:
        return None
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    if error == 0:
        return 1.0 if values.mean() == 0 else 0.0
    return 2 * t_cdf(-abs(float(values.mean())) / error, len(values) - 1)


def holm(values: Sequence[float]) -> tuple[float, ...]:
    """p-values corrected for how many there are (Holm 1979): below 0.05 holds for all of them together."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    corrected, worst = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = worst
    return tuple(corrected)


# --- power -----------------------------------------------------------------------------------------------------------


def t_test_power(shift: float, count: int) -> float:
    """Chance that the two-sided one-sample t test at 1 - LEVEL sees a true mean `shift` standard errors from 0.

    The square of a noncentral t is a noncentral F (Johnson, Kotz and Balakrishnan, Continuous Univariate Distributions
    2, 1995, Sec. 31.1), which has both tails in one; scipy's own noncentral t is NaN far out in the smaller one.
    """
    from scipy.special import ncfdtr

    critical = t_quantile((1 + LEVEL) / 2, count - 1)
    return 1 - float(ncfdtr(1, count - 1, shift**2, critical**2))


@functools.cache
def detectable_shift(count: int) -> float:
    """Standard errors the true mean must lie from 0 for a test of `count` >= 2 values to see it with chance POWER."""
    from scipy.optimize import brentq

    # two values need 16.3, and more values less
    return float(brentq(lambda shift: t_test_power(shift, count) - POWER, 0, 20, xtol=1e-12))


def smallest_detectable(values: FloatArray) -> float | None:
    """The true mean that a two-sided t test of (n,) values with this spread sees with chance POWER; None below 2.

    It takes the observed standard deviation for the true one, which few values know only roughly.
    """
    if len(values) < 2:
        return None
    return detectable_shift(len(values)) * float(values.std(ddof=1)) / math.sqrt(len(values))


# --- curves ----------------------------------------------------------------------------------------------------------


def first_reach(x: FloatArray, y: FloatArray, target: float) -> float | None:
    """The smallest x at which a curve through (n,) points, straight between them, reaches the target; None if never."""
    for index in range(len(x)):
        if y[index] >= target:
            if index == 0:
                return float(x[0])
            share = (target - y[index - 1]) / (y[index] - y[index - 1])
            return float(x[index - 1] + share * (x[index] - x[index - 1]))
    return None


# --- ranks -----------------------------------------------------------------------------------------------------------


def spearman(one: FloatArray, other: FloatArray) -> float:
    """Rank correlation of two (n,) arrays, in [-1, 1]; NaN for fewer than 2 values or where all of one are equal."""
    from scipy.stats import spearmanr

    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(spearmanr(one, other).statistic)


def bootstrap_interval(statistic: Callable[[IntArray], float], count: int, rng: np.random.Generator) -> Interval | None:
    """The percentile interval of a statistic of `count` independent things, given the chosen ones by index.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), Sec. 13.3. None for fewer than 3 things, or where
    the statistic is undefined for a tenth of the samples; scipy's gives up at the first of them.
    """
    if count < 3:
        return None
    found = np.array([statistic(rng.integers(count, size=count)) for _ in range(RESAMPLES)])
    known = found[~np.isnan(found)]
    if len(known) < 0.9 * RESAMPLES:
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def permutation_p(one: FloatArray, other: FloatArray, rng: np.random.Generator) -> float:
    """Two-sided p of the rank correlation of two (n,) arrays under random pairings; NaN where it is undefined.

    The observed pairing counts as one of them, so p is never 0 (Phipson and Smyth 2010). Both tails count together,
    where scipy doubles the smaller one.
    """
    from scipy.stats import rankdata

    observed = spearman(one, other)
    if math.isnan(observed):
        return math.nan
    left, right = rankdata(one), rankdata(other)
    left, right = left - left.mean(), right - right.mean()
    shuffled = rng.permuted(np.tile(right, (RESAMPLES, 1)), axis=1) @ left
    extreme = np.abs(shuffled) >= abs(float(left @ right)) * (1 - 1e-12)
    return float((1 + extreme.sum()) / (1 + RESAMPLES))
