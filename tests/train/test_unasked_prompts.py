"""Prompts of a step that an allocator gives no rollouts: every tree, credit and loss bears them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from settling import SettlingSignal
from test_engine import run
from worlds import SOURCES, GaussianSpec, signals, small_experiment

from aegpo.core.contracts import check_counts
from aegpo.core.sections import CheckpointSpec, PromptsSpec, RolloutsSpec
from aegpo.errors import ContractError
from aegpo.method.advantages import DepthAdvantage, GainAdvantage, GroupAdvantage, ProcessAdvantage, RunningAdvantage
from aegpo.method.allocators import EntropyAllocator, MedianSplitAllocator, RandomAllocator
from aegpo.method.costs import cost
from aegpo.method.objectives import NftObjective
from aegpo.method.selectors import EntropyPeakSelector, FirstSelector, MergedSelector, UniformSelector
from aegpo.method.signals import EntropySignal
from aegpo.method.trees import BranchingTree, IndependentTree, TrunkTree
from aegpo.train.engine import Engine

ROLLOUTS = RolloutsSpec(prompts_per_step=4, rollouts_per_step=16, denoising_steps=4)
HALF = MedianSplitAllocator(signal="restlessness", low=0, high=8, warmup=0)
FIRST = {"selector": FirstSelector(top_k=2)}
ARMS = {
    "own starts": {},
    "shared start": {"tree": IndependentTree(start="shared")},
    "one start for all": {"tree": IndependentTree(start="batch")},
    "branching": {"tree": BranchingTree(), **FIRST},
    "branching from one start": {"tree": BranchingTree(start="batch", noise="all"), "advantage": DepthAdvantage()},
    "children of a trunk": {"tree": TrunkTree(), "advantage": ProcessAdvantage(), **FIRST},
    "a running mean": {"advantage": RunningAdvantage(buffer=4, least=2)},
    "gains": {"advantage": GainAdvantage()},
    "gains in a tree": {"tree": BranchingTree(), "advantage": GainAdvantage(std="prompt"), **FIRST},
    "std of the batch": {"advantage": GroupAdvantage(std="batch")},
    "joined steps": {"selector": MergedSelector(start=1, length=2), "tree": BranchingTree(split_noise=2)},
    "forward process": {"objective": NftObjective(), "tree": IndependentTree(noise="none")},
}


def experiment(**parts):
    sources = {**SOURCES, "settling": SettlingSignal()}
    fields = {"rollouts": ROLLOUTS, "allocator": HALF, "signals": sources, "selector": UniformSelector()}
    return small_experiment(GaussianSpec(), **(fields | parts))


@pytest.mark.parametrize("parts", ARMS.values(), ids=ARMS)
def test_half_of_the_prompts_may_be_left_out(parts):
    spec = experiment(**parts)
    assert [problem for problem in spec.problems() if not problem.warning] == []
    engine = Engine.build(spec)
    for number in (1, 2):
        report = engine.step(number)
        restless = report.signals["restlessness"].values
        assert np.array_equal(report.counts, np.where(restless > np.median(restless), 8, 0))
        assert report.metrics["trained_edges"] > 0
        assert all(math.isfinite(value) for value in report.metrics.values())


def test_what_is_left_out_is_remembered_as_not_seen_and_a_run_resumes(tmp_path):
    spec = experiment(
        allocator=RandomAllocator(low=0, high=8),
        prompts=PromptsSpec(train_count=4, evaluation_count=2),
        advantage=RunningAdvantage(buffer=4, least=2),
        checkpoint=CheckpointSpec(every=1),
    )
    straight, told, _ = run(spec, tmp_path / "straight")
    _, before, _ = run(spec, tmp_path / "broken", stop_after=2)
    resumed, after, _ = run(spec, tmp_path / "broken")
    counts = [report.counts.tolist() for report in told.reports]
    assert counts == [report.counts.tolist() for report in before.reports + after.reports]
    assert sorted(counts[0]) == [0, 0, 8, 8]
    weights = [engine.policy.model.policy.state_dict() for engine in (straight, resumed)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("train_count", [4, 8])
def test_trunks_of_prompts_that_are_left_out_are_not_taken_over(tiny_spec, train_count):
    spec = small_experiment(
        tiny_spec,
        rollouts=ROLLOUTS,
        prompts=PromptsSpec(train_count=train_count, evaluation_count=2),
        allocator=EntropyAllocator(low=0, high=8),
        selector=EntropyPeakSelector(top_k=2),
        tree=BranchingTree(),
        signals={"entropy": EntropySignal(source="rollout")},
    )
    engine = Engine.build(spec)
    reports = [engine.step(number) for number in (1, 2, 3)]
    assert sorted(reports[2].counts) == [0, 0, 8, 8]
    assert cost(spec).forwards.low <= reports[2].metrics["forwards"] <= cost(spec).forwards.high


def test_one_rollout_is_still_no_group():
    known = signals(1, 2, 4)
    with pytest.raises(ContractError, match="a group needs at least 2 to be compared, or none: then the prompt is not"):
        check_counts("odd", np.array([1, 7]), known, 8)
    check_counts("even", np.array([0, 8]), known, 8)
    (problem,) = (
        found for found in experiment(allocator=RandomAllocator(low=1, high=7)).problems() if not found.warning
    )
    assert problem.message == "'low' is 1, which has nothing to be compared with; 0 does not ask the prompt, 2 compares"
