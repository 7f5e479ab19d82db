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


@dataclass(frozen=True)
class Part:
    """A part of an estimate's error that is independent of the others, as far as the data know it."""

    variance: float  # of the estimate, not of one value
    df: int  # degrees of freedom it was estimated with


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


def combined_interval(mean: float, parts: Sequence[Part]) -> Interval:
    """The interval around an estimate whose error is a sum of independent ones, each with a variance of its own.

    Half its width is sqrt(sum t_i^2 v_i), with t_i the quantile for the degrees of freedom that v_i was estimated with
    (Banerjee 1960, Sankhya 22, 357-358). For normal errors it covers at least as often as it says, and it is never
    narrower than the interval of any one part alone. Satterthwaite's degrees of freedom (1946), the usual way, cover
    .87 for 2 seeds and .92 for 3: few seeds that happen to lie close together pass for many that do.
    """
    half = math.sqrt(sum(t_quantile((1 + LEVEL) / 2, part.df) ** 2 * part.variance for part in parts if part.variance))
    return Interval(mean - half, mean + half)


def crossed_interval(table: FloatArray) -> Interval | None:
    """The interval of the mean of an (S, K) table for new seeds and new prompts alike; None for S < 2 or K < 2.

    The squared standard error is var(seed means) / S + var(prompt means) / K, as in Clark's min F' (1973), and counts
    the residual twice: wide rather than narrow. Bootstrapping prompts crossed with seeds is the usual alternative, and
    far too narrow here: three resampled seeds cannot show how much seeds vary.
    """
    if min(table.shape) < 2:
        return None
    return combined_interval(float(table.mean()), (part_of(table.mean(axis=1)), part_of(table.mean(axis=0))))


def part_of(means: FloatArray) -> Part:
    """The part of the error of a mean of (n,) >= 2 independent values that is theirs."""
    return Part(float(means.var(ddof=1)) / len(means), len(means) - 1)


# --- tests -----------------------------------------------------------------------------------------------------------


def p_of_zero(mean: float, error: Part) -> float:
    """Two-sided p of the t test that an estimate's true value is 0."""
    if error.variance == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * t_cdf(-abs(mean) / math.sqrt(error.variance), error.df)


def p_of_not_below(estimate: float, parts: Sequence[Part]) -> float:
    """One-sided p of the test that an estimate's true value is 0 or more, where its error is a sum of independent ones.

    The p whose bound, the estimate + sqrt(sum t_i^2 v_i) as in `combined_interval`, is 0; for one part, the t test's.
    """
    from scipy.optimize import brentq
    from scipy.special import stdtrit

    known = [part for part in parts if part.variance]
    if not known:
        return 0.0 if estimate < 0 else 1.0
    if len(known) == 1:
        return t_cdf(estimate / math.sqrt(known[0].variance), known[0].df)
    if estimate > 0:
        return 1 - p_of_not_below(-estimate, known)

    def short_of_zero(log_p: float) -> float:
        quantiles = stdtrit([part.df for part in known], math.exp(log_p))
        return estimate + math.sqrt(float(quantiles**2 @ [part.variance for part in known]))

    least = math.log(1e-100)
    return math.exp(brentq(short_of_zero, least, math.log(0.5))) if short_of_zero(least) > 0 else 0.0


def holm(values: Sequence[float]) -> tuple[float, ...]:
    """p-values corrected for how many there are (Holm 1979): below 0.05 holds for all of them together."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    corrected, worst = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = worst
    return tuple(corrected)


# --- power -----------------------------------------------------------------------------------------------------------


def t_test_power(shift: float, df: float) -> float:
    """Chance that the two-sided t test at 1 - LEVEL sees a true value `shift` standard errors from 0.

    The square of a noncentral t is a noncentral F (Johnson, Kotz and Balakrishnan, Continuous Univariate Distributions
    2, 1995, Sec. 31.1), which has both tails in one; scipy's own noncentral t is NaN far out in the smaller one.
    """
    from scipy.special import ncfdtr

    critical = t_quantile((1 + LEVEL) / 2, df)
    return 1 - float(ncfdtr(1, df, shift**2, critical**2))


@functools.cache
def detectable_shift(df: float) -> float:
    """Standard errors a true value must lie from 0 for a test with `df` >= 1 to see it with chance POWER."""
    from scipy.optimize import brentq

    # one degree of freedom needs 16.3, and more of them less
    return float(brentq(lambda shift: t_test_power(shift, df) - POWER, 0, 20, xtol=1e-12))


def smallest_detectable(error: Part) -> float:
    """The true value that the two-sided t test sees with chance POWER, if this spread is the true one."""
    return detectable_shift(error.df) * math.sqrt(error.variance)


def spread_range(df: float) -> Interval:
    """What a standard deviation that was estimated with `df` is to be multiplied by for its interval (chi-squared)."""
    from scipy.special import chdtri

    low, high = (math.sqrt(df / float(chdtri(df, tail))) for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(low, high)


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
