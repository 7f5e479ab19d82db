"""The pooled spread of seeds, and the differences that are judged by it, against calculations by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from aegpo.report.contrasts import contrasts, corrected, gain_interval
from aegpo.report.pooled import spread_of, uneven_p
from aegpo.report.statistics import (
    crossed_interval,
    detectable_shift,
    mean_interval,
    p_of_not_below,
    t_cdf,
    t_quantile,
)

RNG = np.random.default_rng(5)
# arm -> seed -> (K,)
GAINS = {
    arm: {seed: RNG.normal(0.1 * place, 0.1, 12) + 0.05 * seed for seed in range(3)}
    for place, arm in enumerate(("grpo", "b", "c", "d"))
}
PAIRS = (("b", "grpo"), ("c", "grpo"), ("d", "grpo"))


def means(gains=GAINS):
    return np.array([[values.mean() for values in by_seed.values()] for by_seed in gains.values()])


def test_the_spread_is_that_of_the_analysis_of_variance_by_hand():
    table = means()
    spread = spread_of(table)
    squares = sum(
        (table[a, s] - table[a].mean() - table[:, s].mean() + table.mean()) ** 2
        for a, s in itertools.product(range(4), range(3))
    )
    assert spread.df == 6
    assert spread.rest == pytest.approx(squares / 6)
    assert spread.between == pytest.approx(4 * np.var([table[:, s].mean() for s in range(3)], ddof=1))


def test_the_two_parts_of_a_means_error_add_to_the_variance_within_arms():
    table = means()
    assert sum(part.variance for part in spread_of(table).of_mean) == pytest.approx(
        table.var(axis=1, ddof=1).mean() / table.shape[1]
    )


@pytest.mark.parametrize("times", [1.0, 0.8, 1.2])
def test_the_parts_of_the_error_of_an_arm_minus_some_of_another_add_to_its_variance(times):
    """Of tables whose rests and seeds have the variances that the spread says: (1 + times^2) rests, what is left."""
    spread = spread_of(means())
    of_seeds = (spread.between - spread.rest) / 4
    variance = ((1 + times**2) * spread.rest + (1 - times) ** 2 * of_seeds) / 3
    assert sum(part.variance for part in spread.of_difference(times)) == pytest.approx(variance)


def test_of_two_arms_the_contrast_is_the_paired_t_test():
    gains = {arm: GAINS[arm] for arm in ("grpo", "b")}
    (each,) = contrasts("palette", gains, PAIRS[:1], None)
    paired = mean_interval(np.subtract(*means(gains)[::-1]))
    assert (each.over_seeds.low, each.over_seeds.high) == pytest.approx((paired.low, paired.high))
    assert each.df == 2


def test_of_one_arm_the_gain_has_the_crossed_interval_of_its_table():
    gains = {"grpo": GAINS["grpo"]}
    alone = crossed_interval(np.stack(list(GAINS["grpo"].values())))
    found = gain_interval(gains, "grpo")
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))


def test_a_contrast_is_the_calculation_by_hand():
    each = contrasts("palette", GAINS, PAIRS, 0.03)[0]
    table = np.stack([GAINS["b"][seed] - GAINS["grpo"][seed] for seed in range(3)])
    error = np.sqrt(2 * spread_of(means()).rest / 3)
    assert each.mean == pytest.approx(table.mean())
    assert each.by_seed == pytest.approx(table.mean(axis=1))
    assert each.over_seeds.half_width == pytest.approx(t_quantile(0.975, 6) * error)
    prompts = t_quantile(0.975, 11) ** 2 * table.mean(axis=0).var(ddof=1) / 12
    assert each.over_both.half_width == pytest.approx(np.sqrt((t_quantile(0.975, 6) * error) ** 2 + prompts))
    assert each.p == pytest.approx(2 * t_cdf(-abs(table.mean()) / error, 6))
    assert each.p_equal == pytest.approx(t_cdf((abs(table.mean()) - 0.03) / error, 6))
    assert each.smallest_detectable == pytest.approx(detectable_shift(6) * error)
    assert each.detectable_range.low < each.smallest_detectable < each.detectable_range.high


def test_the_margin_is_a_fifth_of_what_the_reference_gained_unless_it_is_given():
    gained = np.mean([values.mean() for values in GAINS["b"].values()])
    each = contrasts("palette", GAINS, (("c", "b"),), None)[0]
    assert each.margin == pytest.approx(gained / 5)
    spread = spread_of(means())
    sides = [p_of_not_below(way * each.mean - gained / 5, spread.of_difference(1 + way / 5)) for way in (1, -1)]
    assert each.p_equal == pytest.approx(max(sides))
    assert contrasts("palette", GAINS, (("c", "b"),), 0.07)[0].margin == 0.07


def test_a_reference_that_lost_has_no_margin_and_equality_to_it_is_not_tested():
    gains = {"grpo": {seed: values - 1 for seed, values in GAINS["grpo"].items()}, "b": GAINS["b"]}
    (each,) = contrasts("palette", gains, PAIRS[:1], None)
    assert each.p is not None
    assert (each.margin, each.p_equal, each.p_equal_holm) == (None, None, None)


def test_corrections_count_the_pairs_that_could_be_tested():
    pairs = (*PAIRS[:2], ("absent", "grpo"))
    one, other = corrected(contrasts("palette", GAINS, pairs, None))
    assert one.p_holm == pytest.approx(max(2 * one.p, other.p) if one.p < other.p else max(one.p, 2 * other.p))
    (single,) = corrected(contrasts("palette", GAINS, PAIRS[:1], None))
    assert single.p_holm == single.p


def test_a_pair_is_judged_on_the_seeds_it_shares_with_all_arms_that_have_them():
    gains = {**GAINS, "d": {seed: GAINS["d"][seed] for seed in (1, 2)}}
    whole, part = contrasts("palette", gains, (("b", "grpo"), ("d", "grpo")), None)
    assert (whole.seeds, whole.df) == ((0, 1, 2), 4)
    assert (part.seeds, part.df) == ((1, 2), 3)
    assert part.over_seeds.half_width == pytest.approx(t_quantile(0.975, 3) * np.sqrt(spread_of(means()[:, 1:]).rest))


def test_one_seed_has_a_difference_without_interval_or_test():
    gains = {**GAINS, "d": {2: GAINS["d"][2]}}
    (each,) = contrasts("palette", gains, (("d", "grpo"),), None)
    assert each.mean == pytest.approx((GAINS["d"][2] - GAINS["grpo"][2]).mean())
    assert each.margin is not None
    assert (each.df, each.over_seeds, each.over_both, each.p, each.p_equal, each.smallest_detectable) == (
        0,
        *[None] * 5,
    )


def test_equal_arms_are_equal_and_their_difference_is_a_point():
    gains = dict.fromkeys(("grpo", "b", "c"), GAINS["grpo"])
    for each in contrasts("palette", gains, PAIRS[:2], 0.01):
        assert (each.over_seeds.low, each.over_seeds.high, each.p, each.p_equal) == (0, 0, 1, 0)


def test_an_arm_that_varies_more_is_found_and_even_ones_are_not():
    rng = np.random.default_rng(1)
    even = rng.normal(size=(200, 5, 3))
    loud = even * np.array([1, 1, 6, 1, 1])[:, None]
    assert np.mean([uneven_p(table)[1] < 0.05 for table in even]) < 0.1
    found = [uneven_p(table) for table in loud]
    assert np.mean([arm == 2 and p < 0.05 for arm, p in found]) > 0.5
    assert uneven_p(even[0][:2]) is None
    assert uneven_p(np.ones((4, 3))) is None
