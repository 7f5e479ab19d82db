"""How a step's rollouts are split over its prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import GaussianSpec, small_experiment

from aegpo.allocators import EntropyAllocator, RandomAllocator, UniformAllocator
from aegpo.contracts import check_counts
from aegpo.interfaces import Signals
from aegpo.specs import RolloutsSpec


def signals(delta, step: int = 100) -> Signals:
    """Signals of P prompts with the given delta-entropies over 4 denoising steps."""
    delta = np.asarray(delta, dtype=np.float64)
    base = np.linspace(1.0, 3.0, 4)[None].repeat(len(delta), axis=0)
    signs = np.array([1.0, -1.0, 1.0, -1.0])  # movements in both directions count
    return Signals(step, len(delta), np.linspace(1, 0, 5), base + delta[:, None] * signs, base)


halves = st.integers(1, 8)
bounds = st.tuples(st.integers(2, 12), st.integers(2, 12)).map(sorted).filter(lambda pair: sum(pair) % 2 == 0)


def test_delta_is_the_mean_absolute_difference_over_steps():
    entropy, base = np.array([[1.0, 2.0], [3.0, 3.0]]), np.array([[1.5, 1.0], [3.0, 3.0]])
    found = Signals(1, 2, np.array([1.0, 0.5, 0.0]), entropy, base).delta
    assert found.tolist() == [0.75, 0.0]


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
    ranked = counts[np.argsort(given_signals.delta, kind="stable")]
    assert (np.diff(ranked) >= 0).all()


def test_the_upper_half_of_distinct_deltas_gets_high():
    counts = EntropyAllocator().allocate(signals([0.3, 0.1, 0.4, 0.2]), 48, np.random.default_rng(0))
    assert counts.tolist() == [16, 8, 16, 8]


def test_a_tie_away_from_the_median_does_not_matter():
    counts = EntropyAllocator().allocate(signals([0.1, 0.1, 0.4, 0.4]), 48, np.random.default_rng(0))
    assert counts.tolist() == [8, 8, 16, 16]


@pytest.mark.parametrize("delta", [[0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.2, 0.3], [0.2, 0.2, 0.2, 0.9]])
def test_a_tie_at_the_median_gives_every_prompt_the_same(delta):
    base = np.ones((4, 4))
    tied = Signals(9, 4, np.linspace(1, 0, 5), base + np.array(delta)[:, None], base)
    counts = EntropyAllocator().allocate(tied, 48, np.random.default_rng(0))
    assert counts.tolist() == [12, 12, 12, 12]


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_warm_up_is_uniform_and_then_over(warmup):
    allocator, uniform = EntropyAllocator(warmup=warmup), UniformAllocator()
    for step in range(1, 6):
        given_signals = signals([0.3, 0.1, 0.4, 0.2], step=step)
        counts = allocator.allocate(given_signals, 48, np.random.default_rng(0))
        equal = uniform.allocate(given_signals, 48, np.random.default_rng(0))
        assert np.array_equal(counts, equal) == (step <= warmup)


def test_only_the_entropy_allocator_needs_the_probe():
    needs = [allocator.needs_entropy for allocator in (UniformAllocator(), RandomAllocator(), EntropyAllocator())]
    assert needs == [False, False, True]


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
