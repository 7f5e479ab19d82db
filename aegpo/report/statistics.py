"""Intervals and tests for a few seeds and some dozens of prompts, in numpy alone.

Scores come as a table with a row a seed and a column a prompt, the same prompts under every seed. S counts seeds and K
held-out prompts here; every function is pure.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

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


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), to about 1e-14.

    Continued fraction by Lentz's method (Numerical Recipes, 3rd ed., Sec. 6.4), on the side of the mean where it
    converges fast.
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    d = 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    c, fraction = 1.0, d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 + term * d
            c = 1 + term / c
            d = 1 / (d if abs(d) > tiny else tiny)
            c = c if abs(c) > tiny else tiny
            fraction *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a


def t_cdf(value: float, df: float) -> float:
    """P(T <= value) for Student's t with `df` > 0 degrees of freedom, whole or not."""
    tail = incomplete_beta(df / (df + value * value), df / 2, 0.5) / 2
    return tail if value < 0 else 1 - tail


@functools.cache
def t_quantile(probability: float, df: float) -> float:
    """The value that Student's t stays below with a probability in (0, 1), by bisection of `t_cdf`."""
    if probability < 0.5:
        return -t_quantile(1 - probability, df)
    return _bisect(lambda value: t_cdf(value, df), probability)


def _bisect(rising: Callable[[float], float], target: float) -> float:
    """Where a rising function of [0, inf) reaches the target, to the last bit."""
    low, high = 0.0, 1.0
    while rising(high) < target:
        low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return middle
        low, high = (middle, high) if rising(middle) < target else (low, middle)


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

    The noncentral t distribution as a mean of normal probabilities over the chi distribution of the sample's standard
    deviation (Johnson, Kotz and Balakrishnan, Continuous Univariate Distributions 2, 1995, Sec. 31.5), by Simpson's
    rule.
    """
    df = count - 1
    critical = t_quantile((1 + LEVEL) / 2, df)
    deviations = np.linspace(0, 1 + 12 / math.sqrt(2 * df), 1001)[1:]  # sample over true; density 0 at 0 but for df 1
    log_density = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    density = np.exp(log_density + (df - 1) * np.log(deviations) - df * deviations**2 / 2)
    normal = NormalDist().cdf
    reject = [normal(shift - critical * each) + normal(-shift - critical * each) for each in deviations]
    values = np.concatenate([[_density_at_zero(df)], density * np.asarray(reject)])
    weights = np.tile([4.0, 2.0], 500)
    weights[-1] = 1.0
    return float((values[0] + values[1:] @ weights) * deviations[0] / 3)


def _density_at_zero(df: int) -> float:
    """Density of the scaled chi distribution at 0, where the t test always rejects."""
    return 2 * NormalDist().pdf(0) if df == 1 else 0.0


@functools.cache
def detectable_shift(count: int) -> float:
    """Standard errors the true mean must lie from 0 for a test of `count` >= 2 values to see it with chance POWER."""
    return _bisect(lambda shift: t_test_power(shift, count), POWER)


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


def ranks(values: FloatArray) -> FloatArray:  # (..., n)
    """Ranks along the last axis, counted from 0; equal values share the mean of their places."""
    ordered = np.sort(values, axis=-1)
    table = ordered.reshape(-1, values.shape[-1]), values.reshape(-1, values.shape[-1])
    found = [
        (np.searchsorted(each, row, side="left") + np.searchsorted(each, row, side="right") - 1) / 2
        for each, row in zip(*table, strict=True)
    ]
    shared: FloatArray = np.array(found, dtype=np.float64).reshape(values.shape)
    return shared


def spearman(one: FloatArray, other: FloatArray) -> float:
    """Rank correlation of two (n,) arrays, in [-1, 1]; NaN for fewer than 2 values or where all of one are equal."""
    if len(one) < 2:
        return math.nan
    left, right = ranks(one), ranks(other)
    left, right = left - left.mean(), right - right.mean()
    size = math.sqrt(float(left @ left) * float(right @ right))
    return float(left @ right) / size if size > 0 else math.nan


def bootstrap_interval(statistic: Callable[[IntArray], float], count: int, rng: np.random.Generator) -> Interval | None:
    """The percentile interval of a statistic of `count` independent things, given the chosen ones by index.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), Sec. 13.3. None for fewer than 3 things, or where
    the statistic is undefined for a tenth of the samples.
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

    The observed pairing counts as one of them, so p is never 0 (Phipson and Smyth 2010).
    """
    observed = spearman(one, other)
    if math.isnan(observed):
        return math.nan
    left, right = ranks(one), ranks(other)
    left, right = left - left.mean(), right - right.mean()
    shuffled = rng.permuted(np.tile(right, (RESAMPLES, 1)), axis=1) @ left
    extreme = np.abs(shuffled) >= abs(float(left @ right)) * (1 - 1e-12)
    return float((1 + extreme.sum()) / (1 + RESAMPLES))
