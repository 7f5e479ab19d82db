"""How much seeds vary, from all arms together: the analysis of variance of arms crossed with seeds.

The mean score of arm a under seed s is taken for ``mean_a + seed_s + rest_as``: what an arm is worth, what a seed does
to every arm alike (they share its noise), and a rest. **Assumed**: rests are normal, independent and spread alike in
every arm. Then one spread is known from (A - 1)(S - 1) degrees of freedom, 8 for 5 arms and 3 seeds, where each pair of
arms alone has S - 1, 2 (Scheffe, The Analysis of Variance, 1959, Ch. 8; arms fixed, seeds random). `uneven_p` asks
the data whether one arm's rests are larger than the others'. A counts arms and S seeds; all functions are pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aegpo.core.records import FloatArray
from aegpo.report.statistics import RESAMPLES, Part


@dataclass(frozen=True)
class Spread:
    """The two mean squares of an (A, S) table of means, which are independent of each other and of the arms' means."""

    arms: int
    seeds: int  # >= 2
    between: float  # of seeds: estimates A var(seed) + var(rest), with S - 1 degrees of freedom
    rest: float  # estimates var(rest), with (A - 1)(S - 1); 0 for one arm

    @property
    def df(self) -> int:
        """Degrees of freedom of the rest."""
        return (self.arms - 1) * (self.seeds - 1)

    def of_difference(self, times: float = 1.0) -> tuple[Part, ...]:
        """The error of one arm's mean minus `times` another's, in independent parts; for two arms or more.

        What a seed does to both is not in it for `times` 1; else (1 - times) of it is, which `between` knows.
        """
        left = 1 - times
        shared = Part(left**2 * self.between / (self.arms * self.seeds), self.seeds - 1)
        own = Part((1 + times**2 - left**2 / self.arms) * self.rest / self.seeds, self.df)
        return (own, shared) if left else (own,)

    @property
    def of_mean(self) -> tuple[Part, ...]:
        """The error of one arm's mean, (var(seed) + var(rest)) / S, as the two parts it is known from.

        An arm's mean is that of all arms, whose error is `between` / (A S), plus its own distance from it, whose error
        is (1 - 1/A) `rest` / S.
        """
        shared = Part(self.between / (self.arms * self.seeds), self.seeds - 1)
        return (shared, Part((1 - 1 / self.arms) * self.rest / self.seeds, self.df)) if self.df else (shared,)


def spread_of(table: FloatArray) -> Spread | None:
    """The spread of an (A, S) table of means, complete; None for one seed."""
    arms, seeds = table.shape
    if seeds < 2:
        return None
    between = arms * float(table.mean(axis=0).var(ddof=1))
    df = (arms - 1) * (seeds - 1)
    return Spread(arms, seeds, between, float((_rests(table) ** 2).sum()) / df if df else 0.0)


def _rests(table: FloatArray) -> FloatArray:  # (..., A, S) of each (A, S)
    left = table - table.mean(axis=-1, keepdims=True)
    rests: FloatArray = left - left.mean(axis=-2, keepdims=True)
    return rests


def uneven_p(table: FloatArray) -> tuple[int, float] | None:
    """The arm whose rests are largest in an (A, S) table, and p of their being so by chance; None for A < 3 or S < 2.

    The largest share of the sum of squares (Cochran 1941, Annals of Eugenics 11, 47-52). Rests of arms that share seeds
    are not independent, so its distribution is drawn, from normal tables of this size: nothing else enters into it.
    """
    if table.shape[0] < 3 or table.shape[1] < 2 or not (_rests(table) ** 2).sum():
        return None
    chance = _largest_share(np.random.default_rng(0).normal(size=(RESAMPLES, *table.shape)))
    squares = (_rests(table) ** 2).sum(axis=-1)
    p = (1 + (chance >= squares.max() / squares.sum()).sum()) / (1 + RESAMPLES)
    return int(squares.argmax()), float(p)


def _largest_share(tables: FloatArray) -> FloatArray:  # (n, A, S) -> (n,)
    squares = (_rests(tables) ** 2).sum(axis=-1)
    share: FloatArray = squares.max(axis=-1) / squares.sum(axis=-1)
    return share
