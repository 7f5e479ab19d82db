"""How a step's rollouts are split over its prompts."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
import worlds
from hypothesis import given
from hypothesis import strategies as st
from worlds import GaussianSpec, small_experiment

from aegpo.core.contracts import check_counts
from aegpo.core.records import Prompt
from aegpo.core.sections import PromptsSpec, RolloutsSpec
from aegpo.core.signals import Signals
from aegpo.errors import PlanError
from aegpo.method.allocators import (
    EntropyAllocator,
    InvertedAllocator,
    KnapsackAllocator,
    MedianSplitAllocator,
    RandomAllocator,
    RewardStdAllocator,
    UniformAllocator,
    VarianceAllocator,
    most_valuable,
    proportional,
)
from aegpo.method.signals.rewards import RewardHistory
from aegpo.train.engine import Engine


def signals(delta, step: int = 100) -> Signals:
    """Signals of P prompts with the given delta-entropies."""
    return worlds.signals(step, len(delta), 4, entropy_delta=delta)


halves = st.integers(1, 8)
bounds = st.tuples(st.integers(2, 12), st.integers(2, 12)).map(sorted).filter(lambda pair: sum(pair) % 2 == 0)


@given(st.integers(1, 16), st.integers(2, 20))
def test_uniform_gives_every_prompt_the_same(prompts, each):
    counts = UniformAllocator().allocate(signals(np.zeros(prompts)), prompts * each, np.random.default_rng(0))
    assert counts.tolist() == [each] * prompts
    assert counts.dtype == np.int64


@given(halves, bounds, st.integers(0, 1000))
def test_random_gives_a_drawn_half_more_and_spends_the_budget(half, pair, seed):
    low, high = pair
    allocator = RandomAllocator(low=low, high=high)
    counts = allocator.allocate(signals(np.zeros(2 * half)), half * (low + high), np.random.default_rng(seed))
    assert sorted(counts) == [low] * half + [high] * half
    check_counts("random", counts, signals(np.zeros(2 * half)), half * (low + high))


def test_random_draws_another_half_each_time_and_the_same_from_the_same_generator():
    allocator, given_signals = RandomAllocator(low=2, high=4), signals(np.zeros(8))
    first = [allocator.allocate(given_signals, 24, np.random.default_rng(seed)).tolist() for seed in range(20)]
    again = [allocator.allocate(given_signals, 24, np.random.default_rng(seed)).tolist() for seed in range(20)]
    assert first == again
    assert len({tuple(counts) for counts in first}) > 10
    assert set(np.sum(first, axis=0)) - {40, 80}  # no prompt is always low or always high


@given(st.data(), halves, bounds)
def test_a_prompt_that_moved_further_never_gets_less(data, half, pair):
    low, high = pair
    deltas = st.floats(0, 1, allow_nan=False).map(lambda value: round(value, 2))
    delta = np.array(data.draw(st.lists(deltas, min_size=2 * half, max_size=2 * half)))
    given_signals = signals(delta)
    counts = EntropyAllocator(low=low, high=high).allocate(given_signals, half * (low + high), np.random.default_rng(0))
    assert counts.sum() == half * (low + high)
    check_counts("entropy", counts, given_signals, half * (low + high))
    ranked = counts[np.argsort(given_signals.by_prompt("entropy-delta"), kind="stable")]
    assert (np.diff(ranked) >= 0).all()


def test_the_upper_half_of_distinct_deltas_gets_high():
    counts = EntropyAllocator().allocate(signals([0.3, 0.1, 0.4, 0.2]), 48, np.random.default_rng(0))
    assert counts.tolist() == [16, 8, 16, 8]


def test_a_tie_away_from_the_median_does_not_matter():
    counts = EntropyAllocator().allocate(signals([0.1, 0.1, 0.4, 0.4]), 48, np.random.default_rng(0))
    assert counts.tolist() == [8, 8, 16, 16]


@pytest.mark.parametrize("delta", [[0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.2, 0.3], [0.2, 0.2, 0.2, 0.9]])
def test_a_tie_at_the_median_gives_every_prompt_the_same(delta):
    counts = EntropyAllocator().allocate(signals(delta, step=9), 48, np.random.default_rng(0))
    assert counts.tolist() == [12, 12, 12, 12]


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_warm_up_is_uniform_and_then_over(warmup):
    allocator, uniform = EntropyAllocator(warmup=warmup), UniformAllocator()
    for step in range(1, 6):
        given_signals = signals([0.3, 0.1, 0.4, 0.2], step=step)
        counts = allocator.allocate(given_signals, 48, np.random.default_rng(0))
        equal = uniform.allocate(given_signals, 48, np.random.default_rng(0))
        assert np.array_equal(counts, equal) == (step <= warmup)


def test_only_what_an_allocator_reads_is_measured():
    parts = (UniformAllocator(), RandomAllocator(), EntropyAllocator(), MedianSplitAllocator(signal="words"))
    assert [part.reads for part in parts] == [(), (), ("entropy-delta",), ("words",)]


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4, unique=True), st.integers(1, 4))
def test_the_entropy_allocator_is_a_median_split_of_delta(delta, step):
    named = EntropyAllocator().allocate(signals(delta, step), 48, np.random.default_rng(0))
    split = MedianSplitAllocator(signal="entropy-delta").allocate(signals(delta, step), 48, np.random.default_rng(0))
    assert np.array_equal(named, split)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([5, 9, 2, 7], [8, 16, 8, 16]),
        ([np.nan, 9, 2, 1], [16, 16, 8, 8]),  # unknown counts as the mean of the others
        ([np.nan] * 4, [12] * 4),
    ],
)
def test_any_signal_of_prompts_may_split_them(words, expected):
    allocator, known = MedianSplitAllocator(signal="words"), worlds.signals(9, 4, 4, words=words)
    assert allocator.allocate(known, 48, np.random.default_rng(0)).tolist() == expected


def problems(allocator, prompts: int, budget: int) -> list[str]:
    rollouts = RolloutsSpec(prompts_per_step=prompts, rollouts_per_step=budget)
    experiment = small_experiment(GaussianSpec(), allocator=allocator, rollouts=rollouts)
    found = list(experiment.problems())
    assert all(problem.location == ("allocator",) for problem in found)
    return [problem.message for problem in found]


def test_impossible_splits_are_refused_with_the_nearest_possible_ones():
    assert problems(UniformAllocator(), 8, 96) == []
    assert problems(UniformAllocator(), 8, 100) == [
        "100 rollouts cannot be split equally over 8 prompts; nearest that can: 96 and 104"
    ]
    assert problems(UniformAllocator(), 3, 7) == [
        "7 rollouts cannot be split equally over 3 prompts; nearest that can: 6 and 9"
    ]
    assert problems(RandomAllocator(), 8, 96) == []
    assert problems(RandomAllocator(), 7, 84) == [
        "a median split needs an even number of prompts per step, not 7; nearest: 6 and 8"
    ]
    assert problems(RandomAllocator(), 1, 12) == [
        "a median split needs an even number of prompts per step, not 1; nearest: 2"
    ]
    assert problems(EntropyAllocator(), 8, 64) == [
        "half of 8 prompts with 8 rollouts and half with 16 spend 96, but rollouts_per_step is 64; set it to 96, or "
        "change 'low' and 'high'"
    ]
    assert problems(RandomAllocator(low=9, high=7), 8, 64) == ["'high' (7) is below 'low' (9)"]
    assert problems(RandomAllocator(low=7, high=8), 2, 15) == []
    assert problems(EntropyAllocator(low=7, high=8), 2, 15) == [
        "'low' + 'high' must be even for the equal split of the warm-up, not 7 + 8"
    ]


def test_the_inverted_split_is_the_entropy_split_upside_down():
    given_signals, rng = signals([0.3, 0.1, 0.4, 0.2]), np.random.default_rng(0)
    assert InvertedAllocator().allocate(given_signals, 48, rng).tolist() == [8, 16, 8, 16]
    assert InvertedAllocator(warmup=200).allocate(given_signals, 48, rng).tolist() == [12] * 4


# --- Neyman ----------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 12), st.integers(2, 8), st.integers(0, 10))
def test_proportional_counts_keep_the_budget_the_bounds_and_the_order(data, prompts, low, more):
    high = low + more
    budget = data.draw(st.integers(prompts * low, prompts * high))
    weights = np.array(data.draw(st.lists(st.integers(0, 50), min_size=prompts, max_size=prompts)), dtype=np.float64)
    weights = weights if weights.any() else weights + 1
    counts = proportional(weights, budget, low, high)
    assert counts.dtype == np.int64
    assert counts.sum() == budget
    assert counts.min() >= low
    assert counts.max() <= high
    ranked = counts[np.argsort(weights, kind="stable")]
    assert (np.diff(ranked) >= -1).all()  # equal weights may differ by a remainder


def test_proportional_counts_are_neymans():
    assert proportional(np.array([1.0, 2.0, 3.0]), 60, 2, 60).tolist() == [10, 20, 30]
    assert proportional(np.array([1.0, 1.0, 1.0]), 10, 2, 8).tolist() == [4, 3, 3]  # the first remainder wins ties
    assert proportional(np.array([1.0, 2.0, 9.0]), 24, 4, 12).tolist() == [4, 8, 12]  # bounds bind at both ends


def known(std) -> Signals:
    return worlds.signals(5, len(std), 4, reward_std=std)


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.2], [6, 12, 18, 12]),
        ([np.nan, 0.2, 0.2, 0.2], [12, 12, 12, 12]),  # unknown counts as the mean
        ([np.nan] * 4, [12] * 4),
        ([0.0] * 4, [12] * 4),
        ([0.0, 0.0, 1.0, 1.0], [6, 6, 18, 18]),
    ],
)
def test_more_rollouts_where_rewards_vary_more(std, expected):
    allocator = RewardStdAllocator(low=6, high=18)
    assert allocator.allocate(known(std), 48, np.random.default_rng(0)).tolist() == expected


# --- the best whole numbers -----------------------------------------------------------------------------------------


def every_split(prompts: int, budget: int, low: int, high: int) -> list[np.ndarray]:
    """All counts within the bounds that spend the budget."""
    splits = product(range(low, high + 1), repeat=prompts)
    return [np.array(split) for split in splits if sum(split) == budget]


small = st.tuples(st.integers(1, 4), st.integers(3, 5), st.integers(0, 4))


@given(st.data(), small)
def test_no_split_has_less_variance_of_the_gradient(data, sizes):
    prompts, low, more = sizes
    budget = data.draw(st.integers(prompts * low, prompts * (low + more)))
    std = np.array(data.draw(st.lists(st.integers(0, 20), min_size=prompts, max_size=prompts))) / 10
    allocator = VarianceAllocator(low=low, high=low + more)
    counts = allocator.allocate(known(std), budget, np.random.default_rng(0))
    check_counts("variance", counts, known(std), budget)
    splits = every_split(prompts, budget, low, low + more)
    assert any((counts == split).all() for split in splits)  # so within the bounds
    assert min((std**2 * (n - 1) / n**2).sum() for n in splits) == pytest.approx(
        (std**2 * (counts - 1) / counts**2).sum()
    )


@given(st.data(), st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(0, 4)))
def test_no_split_is_worth_more_by_the_knapsack(data, sizes):
    prompts, low, more = sizes
    budget = data.draw(st.integers(prompts * low, prompts * (low + more)))
    rate = np.array(data.draw(st.lists(st.integers(0, 16), min_size=prompts, max_size=prompts))) / 16
    signals = worlds.signals(5, prompts, 4, reward_mean=rate)
    counts = KnapsackAllocator(low=low, high=low + more).allocate(signals, budget, np.random.default_rng(0))
    check_counts("knapsack", counts, signals, budget)

    def worth(numbers) -> float:
        mixed = 1 - rate**numbers - (1 - rate) ** numbers  # a group with both success and failure
        return float((rate * (1 - rate) ** 2 * mixed).sum())

    splits = every_split(prompts, budget, low, low + more)
    assert any((counts == split).all() for split in splits)
    assert worth(counts) == pytest.approx(max(map(worth, splits)))


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        ([0.05, 0.5, 0.95, 1.0], [24, 8, 8, 8]),  # rare success is worth most, certain success nothing
        ([0.5] * 4, [12] * 4),
        ([0.0, 1.0, 0.0, 1.0], [12] * 4),  # nothing to learn anywhere
        ([np.nan] * 4, [12] * 4),
        ([np.nan, 0.25, 0.25, 0.25], [12] * 4),  # unknown counts as the mean
    ],
)
def test_the_knapsack_is_filled_with_rare_success(rate, expected):
    signals = worlds.signals(5, 4, 4, reward_mean=rate)
    assert KnapsackAllocator(low=8, high=24).allocate(signals, 48, np.random.default_rng(0)).tolist() == expected


def test_before_anything_is_known_all_get_the_same():
    blank = worlds.signals(1, 4, 4, reward_mean=[np.nan] * 4, reward_std=[np.nan] * 4)
    for allocator in (KnapsackAllocator(), VarianceAllocator(), RewardStdAllocator()):
        assert allocator.allocate(blank, 48, np.random.default_rng(0)).tolist() == [12] * 4


@pytest.mark.parametrize(("rate", "shown"), [([0.5, 5.6], "5.6"), ([-0.25, 0.5], "-0.25")])
def test_a_knapsack_of_rewards_that_are_no_rates_is_refused(rate, shown):
    signals = worlds.signals(5, 2, 4, reward_mean=rate)
    with pytest.raises(PlanError, match=rf"rate of success, but found {shown}; give it rewards between 0 and 1"):
        KnapsackAllocator().allocate(signals, 24, np.random.default_rng(0))


def test_of_equal_gains_prompts_with_fewest_rollouts_come_first():
    assert most_valuable(np.zeros((3, 4)), 11, 3).tolist() == [4, 4, 3]
    assert most_valuable(np.zeros((3, 1)), 9, 3).tolist() == [3, 3, 3]


def test_reward_history_is_the_mean_variance_over_visits_and_survives_a_checkpoint():
    history, rng = RewardHistory(), np.random.default_rng(0)
    prompts, group = (Prompt(4, "a"), Prompt(2, "b")), np.array([0, 0, 0, 1, 1])
    seen = [rng.normal(size=5) for _ in range(3)]
    for scores in seen:
        history.rewarded(prompts, torch.from_numpy(scores), group)
    expected = [np.sqrt(np.mean([s[rows].var(ddof=1) for s in seen])) for rows in (slice(0, 3), slice(3, 5))]
    restored = RewardHistory()
    restored.load_state_dict(json.loads(json.dumps(history.state_dict())))
    for found in (history, restored):
        np.testing.assert_allclose(found.std(prompts), expected)
        np.testing.assert_allclose(found.mean(prompts), np.mean([[s[:3].mean(), s[3:].mean()] for s in seen], axis=0))
        assert np.isnan([found.std([Prompt(0, "c")]), found.mean([Prompt(0, "c")])]).all()
    older = RewardHistory()
    older.load_state_dict({"variances": history.state_dict()["variances"]})  # a checkpoint from before means were kept
    np.testing.assert_allclose(older.std(prompts), expected)
    assert np.isnan(older.mean(prompts)).all()


@pytest.mark.parametrize("allocator", [RewardStdAllocator(low=2, high=10), VarianceAllocator(low=3, high=9)])
def test_a_run_allocates_by_the_rewards_it_has_seen(allocator):
    rollouts = RolloutsSpec(prompts_per_step=2, rollouts_per_step=12, denoising_steps=4)
    experiment = small_experiment(
        GaussianSpec(), allocator=allocator, rollouts=rollouts, prompts=PromptsSpec(train_count=2, evaluation_count=2)
    )
    engine = Engine.build(experiment)
    first, second = (engine.step(number) for number in (1, 2))
    assert first.counts.tolist() == [6, 6]  # nothing is known yet
    assert second.counts.tolist() != [6, 6]


def test_a_budget_outside_the_bounds_and_prompts_that_never_come_again_are_reported():
    bounded = small_experiment(GaussianSpec(), allocator=RewardStdAllocator(), training_steps=40)
    assert [found.message for found in bounded.problems()] == [
        "2 prompts with 8 to 16 rollouts spend 16 to 32, but rollouts_per_step is 8; set it within, or change 'low' "
        "and 'high'"
    ]
    once = small_experiment(GaussianSpec(), allocator=RewardStdAllocator(low=2, high=6))
    assert [(found.location, found.warning) for found in once.problems()] == [(("allocator",), True)]
    often = once.model_copy(update={"training_steps": 40})
    assert list(often.problems()) == []
