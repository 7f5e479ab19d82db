"""What it took to reach a score: by hand, and what is said of seeds that never did."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aegpo.report.pooled import spread_of
from aegpo.report.reaching import Path, reaching
from aegpo.report.statistics import combined_interval


def path(*scores, cost=100.0, seconds=1.0):
    steps = np.arange(len(scores), dtype=np.float64)
    return Path({"steps": steps, "cost": cost * steps, "seconds": seconds * steps}, np.array(scores))


def test_arms_are_timed_by_seed_with_the_geometric_mean_and_the_pooled_interval():
    paths = {
        "a": {0: path(0.2, 0.4, 0.6), 1: path(0.2, 0.6, 0.8)},
        "b": {0: path(0.2, 0.3, 0.5, cost=30), 1: path(0.2, 0.45, 0.7, cost=30)},
    }
    one, other = reaching(paths, 0.5)
    assert (one.arm, one.seeds, one.reached) == ("a", (0, 1), 2)
    assert one.spent["steps"].by_seed == pytest.approx((1.5, 0.75))
    assert other.spent["cost"].by_seed == pytest.approx((60, 30 * 1.2))
    assert one.spent["cost"].typical == pytest.approx(100 * math.sqrt(1.5 * 0.75))
    table = np.log([[150, 75], [60, 36]])
    around = combined_interval(table[0].mean(), spread_of(table).of_mean)
    assert (one.spent["cost"].low, one.spent["cost"].high) == pytest.approx(
        (math.exp(around.low), math.exp(around.high))
    )


def test_a_seed_that_never_reached_it_counts_with_all_it_spent_and_opens_the_interval():
    paths = {
        "a": {0: path(0.2, 0.4, 0.6), 1: path(0.2, 0.6, 0.8)},
        "b": {0: path(0.2, 0.3, 0.6), 1: path(0.2, 0.3, 0.4)},
        "c": {0: path(0.2, 0.3, 0.4), 1: path(0.2, 0.3, 0.4)},
    }
    whole, part, none = reaching(paths, 0.5)
    assert [each.reached for each in (whole, part, none)] == [2, 1, 0]
    steps = part.spent["steps"]
    assert steps.by_seed == pytest.approx((1 + 2 / 3, None))
    assert (steps.typical, steps.high) == (None, None)
    spread = spread_of(np.log([[1.5, 0.75]]))  # of the arm whose every seed reached it, alone
    low = combined_interval(np.log([5 / 3, 2]).mean(), spread.of_mean).low
    assert steps.low == pytest.approx(math.exp(low))
    assert none.spent["steps"].by_seed == (None, None)
    assert none.spent["steps"].low > 0


def test_where_no_arm_reached_it_with_every_seed_no_interval_is_known():
    (only,) = reaching({"a": {0: path(0.2, 0.6), 1: path(0.2, 0.3)}}, 0.5)
    assert (only.spent["cost"].typical, only.spent["cost"].low, only.spent["cost"].high) == (None, None, None)


def test_one_seed_has_a_value_without_an_interval():
    (only,) = reaching({"a": {4: path(0.2, 0.6)}}, 0.5)
    assert only.spent["cost"].typical == pytest.approx(75)
    assert only.spent["cost"].low is None


def test_seconds_that_nobody_recorded_are_not_a_time():
    (only,) = reaching({"a": {0: path(0.2, 0.6, seconds=0), 1: path(0.2, 0.7, seconds=0)}}, 0.5)
    assert only.spent["seconds"].typical is None
    assert only.spent["steps"].typical is not None


def test_without_runs_nothing_is_timed():
    assert reaching({}, 0.5) == ()
