"""Which denoising steps explore and learn."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
import worlds
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from worlds import GaussianSpec, small_experiment

from aegpo.core.contracts import check_selection
from aegpo.core.records import Signal
from aegpo.core.sections import RolloutsSpec
from aegpo.core.signals import Signals
from aegpo.method.planning import made_up_signals
from aegpo.method.samplers import CpsSampler, DanceSde, FlowSde
from aegpo.method.selectors import (
    DepthPrunedSelector,
    EntropyPeakSelector,
    FirstSelector,
    FixedSelector,
    FractionSelector,
    LowestEntropySelector,
    PeaksSelector,
    RandomSelector,
    SlidingWindowSelector,
    TopStdSelector,
    UniformSelector,
    WindowSelector,
)


def signals(entropy) -> Signals:
    entropy = np.asarray(entropy, dtype=np.float64)
    return worlds.signals(3, *entropy.shape, entropy=entropy)


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
    assert signals(GAPS).measured("entropy").tolist() == [0, 2, 4, 5]
    assert chosen(EntropyPeakSelector(top_k=2, local_maxima=local_maxima), GAPS) == [[2, 4], [0, 2]]
    assert chosen(EntropyPeakSelector(top_k=2, scope="batch", local_maxima=local_maxima), GAPS) == [[0, 2], [0, 2]]


def test_a_slope_towards_the_last_step_is_no_local_maximum():
    curve = [[1.0, 2.0, 1.0, 3.0, 4.0]]  # rises into its last step, which is never chosen: step 3 is a slope
    assert chosen(EntropyPeakSelector(top_k=1, local_maxima=True), curve) == [[1]]


def test_local_maxima_are_those_among_the_measured_steps():
    entropy = [[2.0, np.nan, 1.0, np.nan, 1.5, np.nan, 1.2, 0.0]]
    assert chosen(EntropyPeakSelector(top_k=2, local_maxima=True), entropy) == [[0, 4]]


def test_only_what_a_selector_reads_is_measured():
    parts = (UniformSelector(), RandomSelector(), EntropyPeakSelector(), PeaksSelector(signal="knee"), TopStdSelector())
    assert [part.reads for part in parts] == [(), (), ("entropy",), ("knee",), ("step-noise",)]


@given(curves(), st.data(), st.booleans())
def test_the_entropy_peaks_are_the_peaks_of_that_signal(entropy, data, local_maxima):
    top_k = data.draw(st.integers(1, entropy.shape[1] - 1))
    named = EntropyPeakSelector(top_k=top_k, local_maxima=local_maxima)
    assert chosen(named, entropy) == chosen(
        PeaksSelector(signal="entropy", top_k=top_k, local_maxima=local_maxima), entropy
    )


def test_peaks_of_a_signal_of_steps_are_the_same_for_every_prompt():
    known = worlds.signals(1, 3, 4, step_noise=[0.1, 0.4, 0.2, 0.3])
    selected = PeaksSelector(signal="step-noise", top_k=2).select(known, np.random.default_rng(0))
    assert selected.tolist() == [[False, True, True, False]] * 3


def steps_of(selector, num_steps: int, step: int = 1, seed: int = 0, prompts: int = 1) -> list[list[int]]:
    """The chosen steps of each prompt, where no entropy is known."""
    known = Signals(step, prompts, np.linspace(1, 0, num_steps + 1))
    selected = selector.select(known, np.random.default_rng(seed))
    check_selection(selector.kind, selected, known)
    return [np.flatnonzero(row).tolist() for row in selected]


# --- controls --------------------------------------------------------------------------------------------------------


@given(curves(), st.data(), st.sampled_from(["prompt", "batch"]))
def test_the_lowest_entropies_are_the_peaks_of_the_negative(entropy, data, scope):
    top_k = data.draw(st.integers(1, entropy.shape[1] - 1))
    lowest, peaks = (kind(top_k=top_k, scope=scope) for kind in (LowestEntropySelector, EntropyPeakSelector))
    assert chosen(lowest, entropy) == chosen(peaks, -entropy)
    assert lowest.reads == ("entropy",)


def test_first_and_fixed_steps_are_the_same_for_every_prompt():
    assert steps_of(FirstSelector(top_k=3), 6, prompts=2) == [[0, 1, 2]] * 2
    assert steps_of(FixedSelector(steps=(0, 3, 5)), 6, prompts=2) == [[0, 3, 5]] * 2


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (FlowSde(), [0, 1]),  # 0.7 and 0.71: MixGRPO's schedule
        (DanceSde(), [7, 8]),  # steps get longer, and so noisier; the last one may not be chosen
        (CpsSampler(), [0, 1]),  # noise follows sigma
    ],
)
def test_top_std_steps_are_where_the_sampler_adds_most_noise(sampler, expected):
    even = np.linspace(1, 0, 11)
    sigmas = 3 * even / (1 + 2 * even)
    known = Signals(1, 1, sigmas, {"step-noise": Signal("step", sampler.table(sigmas).std)})
    selected = TopStdSelector(top_k=2).select(known, np.random.default_rng(0))
    assert np.flatnonzero(selected[0]).tolist() == expected


def test_the_planner_knows_the_stds_of_the_run():
    experiment = small_experiment(
        GaussianSpec(), selector=TopStdSelector(top_k=2), sampler=CpsSampler(convention="gaussian")
    )
    known = next(made_up_signals(experiment))
    assert np.array_equal(known.by_step("step-noise")[0], experiment.sampler.table(experiment.sigmas).std)
    assert list(experiment.problems()) == []


# --- DanceGRPO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "fraction", "expected"), [(16, 0.6, 9), (20, 0.6, 11), (11, 0.3, 3), (5, 1.0, 4)])
def test_a_fraction_is_rounded_down_as_dancegrpo_does(steps, fraction, expected):
    found = steps_of(FractionSelector(fraction=fraction), steps, prompts=40)
    assert [len(row) for row in found] == [expected] * 40
    assert max(map(max, found)) == steps - 2  # never the last step
    assert expected == steps - 1 or len({tuple(row) for row in found}) > 10  # drawn for each prompt


# --- windows ---------------------------------------------------------------------------------------------------------


def test_a_window_starts_anywhere_in_its_range_and_is_the_same_for_all_prompts():
    selector = WindowSelector(width=3, low=1, high=6)
    found = [steps_of(selector, 10, seed=seed, prompts=3) for seed in range(60)]
    assert all(row[0] == row[1] == row[2] for row in found)
    assert sorted({tuple(row[0]) for row in found}) == [(1, 2, 3), (2, 3, 4), (3, 4, 5)]


def published_windows(steps: int, iterations: int, width: int, stay, roll_back: bool = False) -> list[list[int]]:
    """MixGRPO's state machine as its code describes it: count iterations, move, roll back beyond T - 2."""
    start = waited = 0
    found = []
    for _ in range(iterations):
        found.append(list(range(start, min(start + width, steps - 2))))
        waited += 1
        if waited >= stay(start):
            start, waited = start + 1, 0
        if start > steps - 2:
            start, waited = (0, 0) if roll_back else (steps - 2, waited)
    return found


def slid(selector, steps: int = 25, iterations: int = 200) -> list[list[int]]:
    return [steps_of(selector, steps, step=step)[0] for step in range(1, iterations + 1)]


STAYS = {
    "progressive": lambda start: 25,
    "decay": lambda start: max(6, int(25 * (1 - start / 23) + 6 * start / 23)),
    "exp-decay": lambda start: np.ceil(25 * np.exp(-0.1 * max(0, start - 13))),
}


@pytest.mark.parametrize("strategy", STAYS)
def test_200_iterations_of_mixgrpos_window_are_the_published_ones(strategy):
    # MixGRPO's script: 25 steps, a window of 4 that moves by one every 25 iterations.
    found = slid(SlidingWindowSelector(strategy=strategy))
    assert found == published_windows(25, 200, 4, STAYS[strategy])
    lengths = [len(list(group)) for _, group in groupby(found)]
    decayed = [25, 24, 23, 22, 21, 20, 20, 19, 18, 8]  # by hand: 25 down to 6 over 23 places, rounded down
    assert lengths == (decayed if strategy == "decay" else [25] * 8)
    assert found[0] == [0, 1, 2, 3]


def test_exponential_decay_hastens_after_its_threshold_to_the_shortened_last_window():
    found = slid(SlidingWindowSelector(strategy="exp-decay", interval=10), iterations=206)
    runs = [(window, len(list(group))) for window, group in groupby(found)]
    assert [length for _, length in runs[:14]] == [10] * 14
    assert [length for _, length in runs[14:-1]] == [10, 9, 8, 7, 7, 6, 5, 5]  # ceil(10 exp(-0.1 (start - 13)))
    assert runs[-2:] == [([21, 22], 5), ([22], 9)]  # without the last two steps; there is nothing to move to


def test_the_window_stays_or_rolls_back_where_the_published_one_is_empty():
    published = published_windows(8, 60, 3, lambda start: 2, roll_back=True)
    assert [] in published  # at T - 2
    assert (
        slid(SlidingWindowSelector(width=3, interval=2, roll_back=True), 8, 60)
        == [window for window in published_windows(8, 80, 3, lambda start: 2, roll_back=True) if window][:60]
    )
    assert slid(SlidingWindowSelector(width=3, interval=2), 8, 60)[12:] == [[5]] * 48


def test_a_random_window_is_drawn_anew_within_the_published_range():
    found = [steps_of(SlidingWindowSelector(strategy="random"), 25, seed=seed, prompts=2) for seed in range(200)]
    assert all(row[0] == row[1] == list(range(row[0][0], row[0][0] + 4)) for row in found)
    assert {row[0][0] for row in found} == set(range(20))  # integers(0, T - 2 - width + 1)


def test_a_window_that_does_not_move_stays_at_the_first_steps():
    assert slid(SlidingWindowSelector(shift=0, interval=20)) == [[0, 1, 2, 3]] * 200  # MixGRPO-Flash*


# --- BranchGRPO ------------------------------------------------------------------------------------------------------


def test_depth_pruning_slides_shallower_until_its_stop():
    # BranchGRPO: depths 15 to 18 of 20, one shallower every 30 iterations, down to 9. Depth d is the step d - 1.
    selector = DepthPrunedSelector(last=True)
    pruned = {step: sorted(set(range(20)) - set(steps_of(selector, 20, step=step)[0])) for step in (1, 29, 30, 60, 999)}
    assert pruned == {
        1: [14, 15, 16, 17],
        29: [14, 15, 16, 17],
        30: [13, 14, 15, 16],
        60: [12, 13, 14, 15],
        999: [8, 9, 10, 11],
    }
    assert len(steps_of(DepthPrunedSelector(last=True, until=29), 20, step=30)[0]) == 20
    assert steps_of(DepthPrunedSelector(interval=None), 20, step=999) == steps_of(DepthPrunedSelector(), 20, step=1)


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
        "4 steps at least 2 apart may not fit in 9, whatever the values; 'top_k' of at most 3 always does"
    ]


@pytest.mark.parametrize(
    ("selector", "steps", "message"),
    [
        (WindowSelector(high=10), 10, "'high' is 10, but a trajectory has 9 steps without the last ('last: true' "),
        (WindowSelector(width=6), 10, "a window of 6 does not fit between 'low' 0 and 'high' 5; 'width' of at most 5"),
        (SlidingWindowSelector(), 5, "a window of 4 does not fit in the 3 steps without the last two of a trajectory"),
        (
            SlidingWindowSelector(strategy="decay", least_interval=30),
            10,
            "'least_interval' (30) is above 'interval' (25)",
        ),
        (FractionSelector(fraction=0.1), 10, "'fraction' 0.1 of 9 steps is less than one step; at least 0.12"),
        (FixedSelector(steps=(0, 10)), 10, "'steps' names step 10, but a trajectory has the steps 0 to 9"),
        (FixedSelector(steps=(3, 0, 3)), 10, "'steps' must rise, each step once, not [3, 0, 3]; [0, 3] would"),
        (DepthPrunedSelector(), 5, "4 depths up to 3 are not all between 1 and 5; 'deepest' from 4 to 5 would be"),
        (DepthPrunedSelector(width=5, deepest=5), 6, "pruning 5 of 5 steps may leave none to learn from"),
        (FirstSelector(top_k=10), 10, "'top_k' is 10, but a trajectory has 9 steps without the last"),
    ],
)
def test_windows_and_steps_outside_the_trajectory_are_refused(selector, steps, message):
    found = problems(selector, steps)
    assert len(found) == 1
    assert found[0].startswith(message)
