import math

import numpy as np
import pytest

from aegpo.report.statistics import (
    Interval,
    Part,
    bootstrap_interval,
    combined_interval,
    crossed_interval,
    detectable_shift,
    first_reach,
    holm,
    mean_interval,
    p_of_not_below,
    p_of_zero,
    part_of,
    permutation_p,
    smallest_detectable,
    spearman,
    spread_range,
    t_cdf,
    t_quantile,
    t_test_power,
)


@pytest.mark.parametrize(
    ("probability", "df", "table"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 3, 3.18245),
        (0.975, 10, 2.22814),
        (0.975, 63, 1.99834),
        (0.8, 2, 1.06066),
        (0.95, 4, 2.13185),
        (0.995, 9, 3.24984),
        (0.975, 1e6, 1.95997),
    ],
)
def test_t_quantiles_are_those_of_the_printed_tables(probability, df, table):
    assert t_quantile(probability, df) == pytest.approx(table, abs=6e-6)
    assert t_quantile(1 - probability, df) == pytest.approx(-table, abs=6e-6)


@pytest.mark.parametrize("value", [-7.5, -1.0, 0.0, 0.3, 2.0, 40.0])
def test_t_cdf_has_its_closed_forms_for_one_and_two_degrees_of_freedom(value):
    assert t_cdf(value, 1) == pytest.approx(0.5 + math.atan(value) / math.pi, rel=1e-12)
    assert t_cdf(value, 2) == pytest.approx(0.5 + value / (2 * math.sqrt(2 + value * value)), rel=1e-10)


def test_quantile_and_cdf_are_inverse_for_broken_degrees_of_freedom():
    for df in (0.7, 2.37, 17.9):
        for probability in (0.51, 0.8, 0.975, 0.9999):
            assert t_cdf(t_quantile(probability, df), df) == pytest.approx(probability, abs=1e-12)


def test_mean_interval_is_the_textbook_t_interval():
    interval = mean_interval(np.array([1.0, 2.0, 3.0]))
    assert interval.low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-5)
    assert interval.high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-5)


def test_one_value_has_no_interval():
    assert mean_interval(np.array([0.3])) is None
    assert crossed_interval(np.zeros((1, 8))) is None
    assert crossed_interval(np.zeros((8, 1))) is None


def test_p_is_five_percent_where_the_interval_touches_zero():
    values = np.array([0.0, 1.0, 2.0])
    error, edge = part_of(values), mean_interval(values).low
    assert p_of_zero(values.mean() - edge, error) == pytest.approx(0.05, abs=1e-9)
    assert p_of_zero(0.0, Part(0.0, 2)) == 1
    assert p_of_zero(1.0, Part(0.0, 2)) == 0


@pytest.mark.parametrize("mean", [0.3, -0.3])
def test_two_are_equal_at_five_percent_where_the_interval_of_90_percent_ends_at_the_margin(mean):
    """Schuirmann's theorem."""
    error = Part(0.04, 6)
    margin = 0.3 + t_quantile(0.95, 6) * 0.2
    nearest = abs(mean)
    assert p_of_not_below(nearest - margin, (error,)) == pytest.approx(0.05, abs=1e-9)
    assert p_of_not_below(nearest - 0.3, (error,)) == pytest.approx(0.5)
    assert p_of_not_below(nearest - 0.2, (error,)) > 0.5
    assert p_of_not_below(-0.3, (Part(0.0, 6),)) == 0
    assert p_of_not_below(nearest - 0.3, (Part(0.0, 6),)) == 1


def test_a_one_sided_p_is_the_one_whose_interval_ends_at_zero():
    parts = (Part(0.04, 2), Part(0.09, 10))
    edge = combined_interval(0.0, parts).half_width
    assert p_of_not_below(-edge, parts) == pytest.approx(0.025, rel=1e-6)
    assert p_of_not_below(edge, parts) == pytest.approx(0.975, rel=1e-6)
    assert p_of_not_below(0.0, parts) == pytest.approx(0.5)
    assert p_of_not_below(-1.0, (parts[0], Part(1e-18, 10))) == pytest.approx(p_of_not_below(-1.0, parts[:1]), rel=1e-6)
    assert p_of_not_below(-1e60, (Part(0.04, 20), Part(0.09, 30))) == 0


def test_an_interval_excludes_zero_only_if_both_ends_are_on_one_side():
    assert Interval(0.1, 0.2).excludes_zero
    assert Interval(-0.2, -0.1).excludes_zero
    assert not Interval(-0.1, 0.2).excludes_zero
    assert not Interval(0.0, 0.2).excludes_zero


def test_holm_multiplies_the_smallest_p_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx((0.04, 0.09, 0.09, 0.5))
    assert holm([0.6, 0.7]) == (1.0, 1.0)
    assert holm([]) == ()


def test_a_crossed_interval_is_never_narrower_than_the_one_over_seeds_or_over_prompts():
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 5):
        for spread in (0.0, 0.02, 0.2):
            table = rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.1, (1, 24)) + rng.normal(0, 0.1, (seeds, 24))
            crossed = crossed_interval(table).half_width
            assert crossed >= mean_interval(table.mean(axis=1)).half_width
            assert crossed >= mean_interval(table.mean(axis=0)).half_width


def test_parts_of_an_error_add_as_squares_each_with_the_quantile_of_its_degrees_of_freedom():
    interval = combined_interval(1.0, (Part(0.04, 2), Part(0.09, 10), Part(0.0, 1)))
    half = math.sqrt(4.30265**2 * 0.04 + 2.22814**2 * 0.09)
    assert (interval.low, interval.high) == pytest.approx((1 - half, 1 + half), abs=1e-5)


def test_a_crossed_interval_is_the_t_interval_over_whatever_alone_varies():
    values = np.random.default_rng(1).normal(size=5)
    for table in (np.repeat(values[:, None], 7, axis=1), np.repeat(values[None], 7, axis=0)):
        crossed, plain = crossed_interval(table), mean_interval(values)
        assert (crossed.low, crossed.high) == pytest.approx((plain.low, plain.high), rel=1e-9)


def test_a_crossed_interval_of_equal_scores_is_a_point():
    assert crossed_interval(np.full((3, 4), 0.25)) == Interval(0.25, 0.25)


@pytest.mark.parametrize("df", [1, 2, 4, 11])
def test_a_test_without_an_effect_rejects_five_times_in_a_hundred(df):
    assert t_test_power(0.0, df) == pytest.approx(0.05, abs=1e-6)


def test_detectable_shifts_are_those_of_the_noncentral_t_distribution():
    # scipy 1.16: root of stats.nct.sf(t_crit, n - 1, shift) = 0.8
    for df, shift in ((2, 5.653489), (4, 3.761060), (9, 3.149636), (19, 2.953588)):
        assert detectable_shift(df) == pytest.approx(shift, abs=1e-5)


@pytest.mark.parametrize("count", [3, 6])
def test_a_true_mean_of_the_detectable_size_is_seen_four_times_in_five(count):
    rng, spread, trials = np.random.default_rng(2), 0.7, 4000
    truth = smallest_detectable(Part(spread**2 / count, count - 1))
    drawn = rng.normal(truth, spread, (trials, count))
    seen = sum(p_of_zero(values.mean(), part_of(values)) < 0.05 for values in drawn)
    assert seen / trials == pytest.approx(0.8, abs=0.025)


def test_the_smallest_detectable_mean_scales_with_the_spread():
    values = np.array([0.1, 0.2, 0.4])
    found = smallest_detectable(part_of(values))
    assert smallest_detectable(part_of(10 * values + 3)) == pytest.approx(10 * found)
    assert found == pytest.approx(5.653489 * values.std(ddof=1) / math.sqrt(3), rel=1e-5)


def test_a_standard_deviation_is_known_within_the_factors_of_the_printed_tables_of_chi_squared():
    for df, low, high in ((2, 7.377759, 0.050636), (8, 17.534546, 2.179731), (30, 46.979242, 16.790772)):
        found = spread_range(df)
        assert (found.low, found.high) == pytest.approx((math.sqrt(df / low), math.sqrt(df / high)), rel=1e-5)


def test_first_reach_interpolates_and_says_never():
    x, y = np.array([0.0, 10.0, 20.0]), np.array([0.2, 0.4, 0.3])
    assert first_reach(x, y, 0.3) == pytest.approx(5)
    assert first_reach(x, y, 0.4) == 10
    assert first_reach(x, y, 0.1) == 0
    assert first_reach(x, y, 0.41) is None


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_rank_correlation_is_that_of_monotone_relations():
    x = np.array([0.1, 0.5, 0.2, 0.9])
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    # with d the differences of ranks, 1 - 6 sum d^2 / (n (n^2 - 1)) = 1 - 6 * 6 / 60
    assert spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 4.0, 3.0])) == pytest.approx(1 - 6 * 4 / 60)
    assert math.isnan(spearman(x, np.ones(4)))
    assert math.isnan(spearman(x[:1], x[:1]))


def test_a_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        sample = rng.normal(1.0, 2.0, 40)
        found = bootstrap_interval(lambda rows, sample=sample: float(sample[rows].mean()), 40, rng)
        covered += found.low < 1.0 < found.high
    assert covered >= 86
    assert bootstrap_interval(lambda rows: 0.0, 2, rng) is None
    assert bootstrap_interval(lambda rows: math.nan, 9, rng) is None


def test_permutations_give_large_p_to_noise_and_small_p_to_a_relation():
    rng = np.random.default_rng(0)
    x = rng.random(30)
    assert permutation_p(x, x, rng) == pytest.approx(1 / 2001)
    values = [permutation_p(rng.random(20), rng.random(20), rng) for _ in range(40)]
    assert 0.3 < np.mean(values) < 0.7
    assert math.isnan(permutation_p(x, np.ones(30), rng))


# --- formulas this package once had of its own ------------------------------------------------------------------------

# What a continued fraction of the incomplete beta function, bisections of it and Simpson's rule gave. The rule was good
# to 1e-7 for two values and to 1e-9 for more, and the shifts found by it to 2e-9.
CDF = {
    (-3.5, 1): 0.08858553278290467,
    (-1.2, 2.5): 0.1657194188329389,
    (0.0, 3): 0.5,
    (0.7, 4): 0.738749917203275,
    (2.1, 9.3): 0.9679321083945643,
    (5.0, 29): 0.9999873168421323,
    (-40.0, 2): 0.00031220733609237014,
    (1e-06, 100): 0.5000003977871204,
}
QUANTILES = {
    (0.975, 1): 12.706204736174659,
    (0.975, 1.37): 6.88507315664169,
    (0.975, 2): 4.302652729749456,
    (0.975, 4.5): 2.658912347204401,
    (0.975, 9): 2.2621571627982027,
    (0.975, 99): 1.9842169515864239,
    (0.1, 3): -1.6377443536962093,
    (0.5, 5): 0.0,
    (0.9999, 2): 70.70007107494851,
}
POWERS = {
    (0.0, 1): 0.04999993986580353,
    (1.0, 1): 0.07298889393246706,
    (3.0, 2): 0.38740012868604806,
    (5.0, 1): 0.30516010274022937,
    (2.5, 4): 0.47726111718017733,
    (3.2, 9): 0.8121599359479205,
    (2.8, 29): 0.7722536333919406,
    (8.0, 3): 0.9982985646738799,
}
SHIFTS = {
    1: 16.334008869920957,
    2: 5.65348926474509,
    3: 4.255898686515296,
    4: 3.7610595548544694,
    7: 3.2697598403875308,
    9: 3.1496328864506147,
    19: 2.9535848698190517,
    49: 2.858005416507323,
    199: 2.815192566428081,
}
ONE = np.array([0.3, -1.2, -1.0, 1.6, 0.2, -1.7, -0.1, -1.2, -0.6, -0.5, -0.7, 0.6])
OTHER = np.array([0.0, -2.0, -1.0, 2.0, -1.0, -2.0, -1.0, -1.0, -2.0, -0.0, -1.0, 0.0])


def test_students_t_is_what_it_was():
    for asked, before in CDF.items():
        assert t_cdf(*asked) == pytest.approx(before, abs=1e-9)
    for asked, before in QUANTILES.items():
        assert t_quantile(*asked) == pytest.approx(before, abs=1e-9)
    assert p_of_zero(ONE.mean(), part_of(ONE)) == pytest.approx(0.20614680546993835, abs=1e-9)
    interval = mean_interval(ONE)
    assert (interval.low, interval.high) == pytest.approx((-0.9453408641386523, 0.22867419747198553), abs=1e-9)


def test_power_is_what_it_was():
    for (shift, df), before in POWERS.items():
        assert t_test_power(shift, df) == pytest.approx(before, abs=1e-9 if df > 1 else 1e-7)
    for df, before in SHIFTS.items():
        assert detectable_shift(df) == pytest.approx(before, abs=2e-9)


@pytest.mark.parametrize("df", [1, 2, 4, 9, 199])
def test_power_grows_with_the_shift_up_to_one(df):
    powers = [t_test_power(shift, df) for shift in np.linspace(0, 20, 201)]
    assert powers[0] == pytest.approx(0.05, abs=1e-9)
    assert np.diff(powers).min() >= -1e-15
    assert powers[-1] <= 1


def test_rank_correlations_with_their_intervals_and_p_are_what_they_were():
    assert spearman(ONE, OTHER) == pytest.approx(0.7891898487911895, abs=1e-9)
    assert permutation_p(ONE, OTHER, np.random.default_rng(1)) == 0.0034982508745627187
    found = bootstrap_interval(lambda rows: spearman(ONE[rows], OTHER[rows]), 12, np.random.default_rng(2))
    assert (found.low, found.high) == pytest.approx((0.39346988496601004, 0.96030859827546), abs=1e-9)
