"""Gains of arms and the differences of two arms' gains, with their intervals and tests.

Gains are given by arm and seed, (K,) each: a held-out prompt's score less the base's. The spread of seeds is that of
all arms that have the seeds in question (`pooled`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from aegpo.core.records import FloatArray
from aegpo.report.pooled import Spread, spread_of
from aegpo.report.statistics import (
    Interval,
    combined_interval,
    holm,
    mean_interval,
    p_of_not_below,
    p_of_zero,
    part_of,
    smallest_detectable,
    spread_range,
)

MARGIN_SHARE = 0.2  # of the reference's gain, where no margin is given: our choice

Gains = Mapping[str, Mapping[int, FloatArray]]  # arm -> seed -> (K,)


@dataclass(frozen=True)
class Contrast:
    """How much more an arm gained than another, seed by seed: both start from the same base and prompts."""

    label: str
    arm: str
    reference: str
    seeds: tuple[int, ...]  # finished in both arms
    by_seed: tuple[float, ...]
    mean: float
    margin: float | None  # a difference below it counts as none; None: not given, and the reference gained nothing
    # for two seeds and more:
    df: int = 0  # degrees of freedom of the pooled spread
    over_seeds: Interval | None = None  # new seeds, these prompts: t of the pooled spread
    over_both: Interval | None = None  # new seeds and new prompts; never narrower
    p: float | None = None  # of there being no difference, over seeds
    p_holm: float | None = None  # corrected for all contrasts of this label
    p_equal: float | None = None  # of the difference being as large as the margin or larger
    p_equal_holm: float | None = None  # corrected in the same way
    smallest_detectable: float | None = None  # true difference that the t test would have seen with 80 % chance
    detectable_range: Interval | None = None  # of it, for the spread is an estimate


def gain_interval(gains: Gains, arm: str) -> Interval | None:
    """The interval of an arm's mean gain, for new seeds and new prompts; for one seed: for new prompts alone."""
    table = np.stack(list(gains[arm].values()))
    spread = _spread(gains, tuple(gains[arm]))
    if spread is None:
        return mean_interval(table[0])
    prompts = (part_of(table.mean(axis=0)),) if table.shape[1] > 1 else ()
    return combined_interval(float(table.mean()), (*spread.of_mean, *prompts)) if prompts else None


def contrasts(label: str, gains: Gains, pairs: Sequence[tuple[str, str]], margin: float | None) -> tuple[Contrast, ...]:
    """The difference of each pair of an arm and its reference that share a seed; not corrected yet.

    Args:
        label: what was scored.
        gains: of all arms.
        pairs: those to compare.
        margin: the difference that counts as none; None: `MARGIN_SHARE` of the reference's gain.
    """
    return tuple(each for pair in pairs if (each := _contrast(label, gains, *pair, margin)) is not None)


def corrected(found: Sequence[Contrast]) -> tuple[Contrast, ...]:
    """Contrasts with both kinds of p corrected for how many of them are tested."""
    unequal = iter(holm([each.p for each in found if each.p is not None]))
    equal = iter(holm([each.p_equal for each in found if each.p_equal is not None]))
    return tuple(
        replace(
            each,
            p_holm=None if each.p is None else next(unequal),
            p_equal_holm=None if each.p_equal is None else next(equal),
        )
        for each in found
    )


def table_of_means(gains: Gains, seeds: Sequence[int]) -> tuple[tuple[str, ...], FloatArray]:
    """The arms that have all of these seeds, and their mean gains, (A, S)."""
    arms = tuple(arm for arm, by_seed in gains.items() if by_seed.keys() >= set(seeds))
    return arms, np.array([[gains[arm][seed].mean() for seed in seeds] for arm in arms])


def _spread(gains: Gains, seeds: Sequence[int]) -> Spread | None:
    return spread_of(table_of_means(gains, seeds)[1]) if len(seeds) > 1 else None


def _contrast(label: str, gains: Gains, arm: str, reference: str, margin: float | None) -> Contrast | None:
    one, other = gains.get(arm, {}), gains.get(reference, {})
    seeds = tuple(seed for seed in one if seed in other)
    if not seeds:
        return None
    table = np.stack([one[seed] - other[seed] for seed in seeds])  # (S, K)
    by_seed, mean = table.mean(axis=1), float(table.mean())
    gained = float(np.mean([other[seed].mean() for seed in seeds]))
    limit = margin if margin is not None else MARGIN_SHARE * gained if gained > 0 else None
    alone = Contrast(label, arm, reference, seeds, tuple(by_seed.tolist()), mean, limit)
    spread = _spread(gains, seeds)
    if spread is None:
        return alone
    (error,) = spread.of_difference()
    detectable = smallest_detectable(error)
    known = spread_range(error.df)
    return replace(
        alone,
        df=error.df,
        over_seeds=combined_interval(mean, (error,)),
        over_both=combined_interval(mean, (error, part_of(table.mean(axis=0)))) if table.shape[1] > 1 else None,
        p=p_of_zero(mean, error),
        p_equal=None if limit is None else _p_equal(spread, mean, gained, margin),
        smallest_detectable=detectable,
        detectable_range=Interval(known.low * detectable, known.high * detectable),
    )


def _p_equal(spread: Spread, mean: float, gained: float, margin: float | None) -> float:
    """p of a difference being as large as the margin or larger, either way: below 0.05, it is smaller.

    The larger p of two one-sided tests, TOST (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15, 657-680). Where the
    margin is a share of the reference's gain, that gain is an estimate, too: an arm is then compared with 1 - share and
    1 + share times the reference, as in tests of ratios (Hauschke et al. 1999, Stat. Med. 18, 93-105).
    """
    if margin is not None:
        parts = spread.of_difference()
        return max(p_of_not_below(mean - margin, parts), p_of_not_below(-mean - margin, parts))
    limit = MARGIN_SHARE * gained
    above, below = spread.of_difference(1 + MARGIN_SHARE), spread.of_difference(1 - MARGIN_SHARE)
    return max(p_of_not_below(mean - limit, above), p_of_not_below(-mean - limit, below))
