"""Which denoising steps explore and learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from worlds import GaussianSpec, small_experiment

from aegpo.contracts import check_selection
from aegpo.interfaces import Signals
from aegpo.selectors import EntropyPeakSelector, RandomSelector, UniformSelector
from aegpo.specs import RolloutsSpec


def signals(entropy) -> Signals:
    entropy = np.asarray(entropy, dtype=np.float64)
    return Signals(3, len(entropy), np.linspace(1, 0, entropy.shape[1] + 1), entropy, entropy)


def chosen(selector, entropy, seed: int = 0) -> list[list[int]]:
    """The chosen steps of each prompt."""
    selected = selector.select(signals(entropy), np.random.default_rng(seed))
    check_selection(selector.kind, selected, signals(entropy))
    return [np.flatnonzero(row).tolist() for row in selected]


@st.composite
def curves(draw):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(2, 12)))
    return draw(arrays(np.float64, shape, elements=st.integers(0, 6).map(float)))  # integers: ties are common


@given(curves(), st.data(), st.booleans(), st.sampled_from(["prompt", "batch"]), st.booleans())
def test_peaks_are_top_k_steps_none_of_them_below_one_left_out(entropy, data, last, scope, local_maxima):
    eligible = entropy.shape[1] - (not last)
    top_k = data.draw(st.integers(1, eligible))
    selector = EntropyPeakSelector(top_k=top_k, last=last, scope=scope, local_maxima=local_maxima)
    found = chosen(selector, entropy)
    curve_of = (lambda row: entropy[row]) if scope == "prompt" else (lambda row: entropy.mean(axis=0))
    for row, steps in enumerate(found):
        assert len(steps) == top_k
        assert max(steps) < eligible
        if not local_maxima:
            left_out = [curve_of(row)[step] for step in range(eligible) if step not in steps]
            assert min(curve_of(row)[steps]) >= max(left_out, default=-1)


@given(curves())
def test_all_steps_as_peaks_are_the_uniform_selection(entropy):
    steps = entropy.shape[1]
    peaks = EntropyPeakSelector(top_k=steps, last=True).select(signals(entropy), np.random.default_rng(0))
    assert np.array_equal(peaks, UniformSelector(last=True).select(signals(entropy), np.random.default_rng(0)))
    drawn = RandomSelector(top_k=steps, last=True).select(signals(entropy), np.random.default_rng(0))
    assert np.array_equal(peaks, drawn)
    without_last = EntropyPeakSelector(top_k=steps - 1).select(signals(entropy), np.random.default_rng(0))
    assert np.array_equal(without_last, UniformSelector().select(signals(entropy), np.random.default_rng(0)))


@pytest.mark.parametrize("local_maxima", [False, True])
def test_earlier_steps_win_ties(local_maxima):
    selector = EntropyPeakSelector(top_k=2, local_maxima=local_maxima)
    assert chosen(selector, [[1.0, 1.0, 1.0, 1.0, 1.0]]) == [[0, 1]]
    assert chosen(selector, [[0.0, 2.0, 0.0, 2.0, 0.0, 2.0, 0.0]]) == [[1, 3]]


@given(curves(), st.integers(1, 3), st.integers(1, 4))
def test_chosen_steps_keep_their_distance(entropy, min_gap, top_k):
    selector = EntropyPeakSelector(top_k=top_k, min_gap=min_gap, last=True)
    if (2 * min_gap - 1) * (top_k - 1) + 1 > entropy.shape[1]:
        return  # refused at load
    for steps in chosen(selector, entropy):
        assert len(steps) == top_k
        assert (np.diff(steps) >= min_gap).all()


def test_a_gap_keeps_neighbours_of_the_highest_peak_out():
    curve = [[0.0, 8.0, 9.0, 7.0, 0.5, 1.0, 2.0, 0.0]]
    assert chosen(EntropyPeakSelector(top_k=3), curve) == [[1, 2, 3]]
    assert chosen(EntropyPeakSelector(top_k=3, min_gap=2), curve) == [[2, 4, 6]]
    assert chosen(EntropyPeakSelector(top_k=2, min_gap=3), curve) == [[2, 6]]


def test_local_maxima_come_before_higher_slopes():
    curve = [[0.0, 8.0, 9.0, 7.0, 0.0, 2.0, 0.0, 0.0]]
    assert chosen(EntropyPeakSelector(top_k=2), curve) == [[1, 2]]
    assert chosen(EntropyPeakSelector(top_k=2, local_maxima=True), curve) == [[2, 5]]
    assert chosen(EntropyPeakSelector(top_k=3, local_maxima=True), curve) == [[1, 2, 5]]


def test_a_step_at_the_edge_is_a_local_maximum_of_what_may_be_chosen():
    rising = [[1.0, 2.0, 3.0, 4.0, 9.0]]
    assert chosen(EntropyPeakSelector(top_k=1, local_maxima=True), rising) == [[3]]
    assert chosen(EntropyPeakSelector(top_k=1, local_maxima=True, last=True), rising) == [[4]]


def test_batch_scope_gives_every_prompt_the_peaks_of_the_mean_curve():
    entropy = [[5.0, 0.0, 1.0, 0.0], [0.0, 3.0, 1.0, 0.0], [0.0, 3.0, 1.0, 0.0]]
    assert chosen(EntropyPeakSelector(top_k=1), entropy) == [[0], [1], [1]]
    assert chosen(EntropyPeakSelector(top_k=1, scope="batch"), entropy) == [[1], [1], [1]]


def test_random_steps_come_from_the_generator_alone_and_differ_between_prompts():
    entropy = np.zeros((6, 10))
    selector = RandomSelector(top_k=3)
    assert chosen(selector, entropy, seed=1) == chosen(selector, entropy + 7, seed=1)
    assert chosen(selector, entropy, seed=1) != chosen(selector, entropy, seed=2)
    assert len({tuple(steps) for steps in chosen(selector, entropy)}) > 1
    counts = np.bincount(np.concatenate([np.concatenate(chosen(selector, entropy, seed)) for seed in range(200)]))
    assert len(counts) == 9  # never the last step
    assert counts.min() > 0.8 * 200 * 6 * 3 / 9  # and every other about as often


GAPS = [[1.0, np.nan, 3.0, np.nan, 2.0, 9.0], [4.0, np.nan, 3.0, np.nan, 2.0, 9.0]]


@pytest.mark.parametrize("local_maxima", [False, True])
def test_steps_that_were_not_measured_are_never_peaks(local_maxima):
    assert signals(GAPS).measured.tolist() == [0, 2, 4, 5]
    assert chosen(EntropyPeakSelector(top_k=2, local_maxima=local_maxima), GAPS) == [[2, 4], [0, 2]]
    assert chosen(EntropyPeakSelector(top_k=2, scope="batch", local_maxima=local_maxima), GAPS) == [[0, 2], [0, 2]]


def test_local_maxima_are_those_among_the_measured_steps():
    entropy = [[2.0, np.nan, 1.0, np.nan, 1.5, np.nan, 1.2, 0.0]]
    assert chosen(EntropyPeakSelector(top_k=2, local_maxima=True), entropy) == [[0, 4]]


def test_delta_is_the_mean_over_the_measured_steps():
    entropy, base = np.array([[1.0, np.nan, 3.0]]), np.array([[2.0, np.nan, 3.5]])
    assert Signals(1, 1, np.linspace(1, 0, 4), entropy, base).delta.tolist() == [0.75]


def test_only_entropy_peaks_need_the_probe():
    needs = [selector.needs_entropy for selector in (UniformSelector(), RandomSelector(), EntropyPeakSelector())]
    assert needs == [False, False, True]


def problems(selector, steps: int) -> list[str]:
    rollouts = RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=steps)
    found = list(small_experiment(GaussianSpec(), selector=selector, rollouts=rollouts).problems())
    assert all(problem.location == ("selector",) for problem in found)
    return [problem.message for problem in found]


def test_more_steps_than_there_are_are_refused():
    assert problems(RandomSelector(top_k=9), 10) == []
    assert problems(RandomSelector(top_k=10, last=True), 10) == []
    assert problems(RandomSelector(top_k=10), 10) == [
        "'top_k' is 10, but a trajectory has 9 steps without the last ('last: true' would add it); at most 9"
    ]
    assert problems(EntropyPeakSelector(top_k=11, last=True), 10) == [
        "'top_k' is 11, but a trajectory has 10 steps; at most 10"
    ]
    assert problems(EntropyPeakSelector(top_k=4, min_gap=2), 11) == []
    assert problems(EntropyPeakSelector(top_k=4, min_gap=2), 10) == [
        "4 steps at least 2 apart may not fit in 9, whatever the entropies; 'top_k' of at most 3 always does"
    ]
