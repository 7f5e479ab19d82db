"""Credit of trained transitions: closed forms, and BranchGRPO's own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_trees import questions, trees
from worlds import GaussianSpec, plan_of, small_experiment

from aegpo.core.records import Prompt, RolloutPlan, Rollouts, Scores
from aegpo.method.advantages import DepthAdvantage, GroupAdvantage, ProcessAdvantage, RunningAdvantage
from aegpo.method.trained_edges import TrainedEdges
from aegpo.method.trees import BranchingTree, IndependentTree, TrunkTree
from aegpo.train.edges import edge_table

DATA = Path(__file__).parents[1] / "data"


def rollouts_of(plan: RolloutPlan, log_prob=None, prompts=(0, 1, 2, 3)) -> Rollouts:
    """What an advantage reads of an execution: the plan and its log-probabilities."""
    nothing = torch.zeros(0)
    log_prob = log_prob or tuple(torch.zeros(len(parent)) for parent in plan.parent)
    edges = edge_table(plan, TrainedEdges.of(plan), log_prob, nothing)
    return Rollouts(plan, nothing, nothing, log_prob, edges, tuple(Prompt(index, "") for index in prompts))


def credit(advantage, scores, plan: RolloutPlan, weights=(1.0,), log_prob=None) -> torch.Tensor:
    rewards = torch.as_tensor(scores, dtype=torch.float32)
    rewards = rewards[:, None] if rewards.ndim == 1 else rewards
    return advantage.estimate(Scores(rewards), torch.tensor(weights), rollouts_of(plan, log_prob))


SIDE_BY_SIDE = plan_of(IndependentTree(), [3, 2], [[1, 0], [1, 0]])  # one trained edge a rollout, in order
SCORES = np.array([1.0, 2.0, 6.0, 0.0, 4.0])
CENTRED = np.array([-2.0, -1.0, 3.0, -2.0, 2.0])


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("std", ["none", "group", "batch"])
def test_group_advantage_is_the_centred_reward_over_the_chosen_std(std, unbiased):
    advantage = GroupAdvantage(std=std, unbiased=unbiased, epsilon=0.01, clip=None)
    ddof = int(unbiased)
    group = np.repeat([SCORES[:3].std(ddof=ddof), SCORES[3:].std(ddof=ddof)], [3, 2])
    divisor = {"none": np.ones(5), "group": group + 0.01, "batch": np.full(5, SCORES.std(ddof=ddof) + 0.01)}[std]
    expected = torch.from_numpy(CENTRED / divisor).float()
    torch.testing.assert_close(credit(advantage, SCORES, SIDE_BY_SIDE), expected, atol=1e-6, rtol=1e-6)


# Three leaves below one child and two below the other: their means round differently, as sums of weights do.
UNEVEN = RolloutPlan(
    prompt=(np.array([0, 1]), np.array([0, 0, 1, 1]), np.array([0] * 5 + [1] * 5)),
    parent=(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 3])),
    noisy=(np.ones(4, bool), np.ones(10, bool)),
    trained=(np.ones(4, bool), np.ones(10, bool)),
)
EVERY_KIND = [
    *(GroupAdvantage(std=std, epsilon=1e-30, clip=None) for std in ("none", "group")),
    GroupAdvantage(combine="per-reward"),
    *(DepthAdvantage(weighting=how, least_std=0.0, epsilon=1e-30) for how in ("mean", "path")),
    ProcessAdvantage(epsilon=1e-30),
    RunningAdvantage(least=2, epsilon=1e-30),
]


@pytest.mark.parametrize("value", [0.1, 0.38 * 0.3 + 0.07, -7.7e5])
@pytest.mark.parametrize("advantage", EVERY_KIND, ids=repr)
def test_equal_rewards_of_a_prompt_earn_no_credit_at_all(advantage, value):
    scores = np.stack([[value] * 5 + [0.1, 0.2, 0.3, 0.4, 0.5]] * 2, axis=1)
    log_prob = (torch.linspace(-1, 1, 4), torch.linspace(-2, 0.3, 10))
    found = credit(advantage.build(), scores, UNEVEN, (0.3, 0.7), log_prob)
    of_first = torch.tensor([True, True, False, False] + [True] * 5 + [False] * 5)
    assert not found[of_first].any()
    assert found[~of_first].any()


def test_rewards_are_summed_by_weight_first():
    scores = np.stack([SCORES, -SCORES, SCORES**2], axis=1)
    found = credit(GroupAdvantage(std="none"), scores, SIDE_BY_SIDE, weights=(2.0, 1.5, 0.0))
    torch.testing.assert_close(found, torch.from_numpy(0.5 * CENTRED).float())


def test_advantages_are_cut_off_at_the_clip():
    found = credit(GroupAdvantage(std="none", clip=1.5), SCORES, SIDE_BY_SIDE)
    assert found.tolist() == [-1.5, -1.0, 1.5, -1.5, 1.5]
    assert credit(GroupAdvantage(std="none", clip=None), SCORES, SIDE_BY_SIDE).abs().max() == 3.0


def test_a_group_without_differences_gets_no_credit():
    for std in ("none", "group", "batch"):
        found = credit(GroupAdvantage(std=std), [0.7, 0.7, 0.7, 0.0, 4.0], SIDE_BY_SIDE)
        assert found[:3].abs().max() < 1e-6
        assert found[3:].abs().min() > 0.1
    assert credit(DepthAdvantage(), [0.7, 0.7, 0.7, 0.0, 4.0], SIDE_BY_SIDE)[:3].tolist() == [0.0] * 3


def test_an_epsilon_of_zero_is_refused_because_equal_rewards_would_divide_by_it():
    with pytest.raises(ValidationError, match="greater than 0"):
        GroupAdvantage(epsilon=0.0)


scores_of = st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed).normal(size=80))
advantages = st.one_of(
    st.builds(GroupAdvantage, std=st.sampled_from(["none", "group", "batch"]), unbiased=st.booleans()),
    st.builds(DepthAdvantage),
    st.builds(ProcessAdvantage, unbiased=st.booleans()),
)


@given(questions(), trees, scores_of, advantages, st.floats(-10, 10))
def test_a_constant_added_to_every_reward_changes_nothing(question, tree, noise, advantage, shift):
    plan = tree.plan(*question, np.random.default_rng(0))
    scores = torch.from_numpy(noise[: plan.num_rollouts, None])  # float64, so that the shift itself is exact enough
    weights, rollouts = torch.ones(1), rollouts_of(plan)
    before = advantage.estimate(Scores(scores), weights, rollouts)
    after = advantage.estimate(Scores(scores + shift), weights, rollouts)
    assert before.shape == (plan.trained_edges,)
    assert before.dtype == torch.float32
    torch.testing.assert_close(after, before, atol=2e-6, rtol=2e-6)


@given(questions(), scores_of, st.sampled_from(["none", "group", "batch"]))
def test_the_credit_of_each_group_sums_to_zero(question, noise, std):
    counts, steps = question
    steps[:] = False
    steps[:, 0] = True  # one trained edge a rollout
    plan = IndependentTree().plan(counts, steps, np.random.default_rng(0))
    found = credit(GroupAdvantage(std=std, clip=None), noise[: plan.num_rollouts], plan)
    for prompt in range(len(counts)):
        assert float(found[torch.from_numpy(plan.group == prompt)].sum()) == pytest.approx(0, abs=1e-4)


@given(questions(), scores_of)
def test_an_edge_gets_the_mean_advantage_of_the_rollouts_that_pass_through(question, noise):
    counts, steps = question
    plan = BranchingTree().plan(counts, steps, np.random.default_rng(0))
    scores = noise[: plan.num_rollouts]
    found = credit(GroupAdvantage(std="none", clip=None), scores, plan).tolist()
    means = np.bincount(plan.group, weights=scores) / counts
    expected = []
    for level in range(plan.num_steps):
        below = np.arange(plan.num_rollouts)
        for deeper in reversed(range(level + 1, plan.num_steps)):
            below = plan.parent[deeper][below]
        for child in np.flatnonzero(plan.trained[level]):
            leaves = np.flatnonzero(below == child)
            expected.append((scores[leaves] - means[plan.group[leaves]]).mean())
    np.testing.assert_allclose(found, expected, atol=1e-5)


def tree_of(reference) -> tuple[RolloutPlan, tuple[torch.Tensor, ...]]:
    """A reference file's tree with every edge trained, and the log-probability of every edge."""
    parents = [np.array(level["parent"], dtype=np.int64) for level in reference["levels"][1:]]
    prompt = (np.zeros(1, dtype=np.int64), *(np.zeros(len(parent), dtype=np.int64) for parent in parents))
    every = tuple(np.ones(len(parent), dtype=bool) for parent in parents)
    log_prob = tuple(torch.tensor(level["log_prob"]) for level in reference["levels"][1:])
    return RolloutPlan(prompt, tuple(parents), every, every), log_prob


@pytest.mark.parametrize(("name", "weighting"), [("depth-mean", "mean"), ("depth-path-weighted", "path")])
def test_depth_advantages_are_branchgrpos(name, weighting):
    # Outputs of BranchGRPO's compute_node_rewards_from_leaves and compute_hierarchical_advantages_by_depth.
    reference = json.loads((DATA / f"{name}.json").read_text())
    plan, log_prob = tree_of(reference)
    advantage = DepthAdvantage(weighting=weighting)
    scores = torch.tensor(reference["leaf_rewards"])
    rollouts = rollouts_of(plan, log_prob)
    for found, level in zip(advantage.node_values(scores.double(), rollouts), reference["levels"], strict=True):
        torch.testing.assert_close(found.float(), torch.tensor(level["reward"]), atol=1e-6, rtol=0)
    expected = torch.cat([torch.tensor(level["advantage"]) for level in reference["levels"][1:]])
    found = advantage.estimate(Scores(scores[:, None]), torch.ones(1), rollouts)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_path_weights_are_a_softmax_over_siblings():
    plan = plan_of(BranchingTree(), [4], [[1, 1]])
    log_prob = (torch.zeros(2), torch.tensor([0.0, np.log(3.0), 1000.0, 0.0]))  # large values must not overflow
    advantage = DepthAdvantage(weighting="path")
    scores = torch.tensor([1.0, 5.0, 2.0, 9.0], dtype=torch.float64)
    values = advantage.node_values(scores, rollouts_of(plan, log_prob))
    torch.testing.assert_close(values[1], torch.tensor([0.25 * 1 + 0.75 * 5, 2.0], dtype=torch.float64))


def test_equal_log_probabilities_make_path_weights_the_mean_of_a_balanced_tree():
    plan = plan_of(BranchingTree(), [8], [[1, 0, 1, 1]])
    scores = np.random.default_rng(0).normal(size=8)
    assert torch.allclose(
        credit(DepthAdvantage(weighting="path"), scores, plan), credit(DepthAdvantage(), scores, plan)
    )


def test_depths_are_normalised_within_each_prompt():
    plan = plan_of(BranchingTree(), [4, 4], [[1, 1], [1, 1]])
    scores = np.random.default_rng(0).normal(size=4)
    found = credit(DepthAdvantage(), np.concatenate([scores, 100 + 10 * scores]), plan)
    torch.testing.assert_close(found[:2], found[2:4], atol=1e-5, rtol=0)  # level 1: two nodes a prompt
    torch.testing.assert_close(found[4:8], found[8:12], atol=1e-5, rtol=0)
    assert abs(float(found[:2].sum())) < 1e-6
    assert float(found[4:8].std()) == pytest.approx(1.0, abs=1e-5)


def test_depths_that_hardly_vary_get_no_credit():
    plan = plan_of(IndependentTree(), [2], [[1, 0]])
    scores = [0.5, 0.5 + 1e-6]
    assert credit(DepthAdvantage(), scores, plan).tolist() == [0.0, 0.0]
    assert credit(DepthAdvantage(least_std=1e-8), scores, plan).abs().min() > 0.6


def test_depth_advantages_are_cut_off_at_the_clip():
    plan = plan_of(IndependentTree(), [40], [[1, 0]])
    scores = [1.0, *[0.0] * 39]
    assert credit(DepthAdvantage(), scores, plan).max() == 5.0
    assert credit(DepthAdvantage(clip=None), scores, plan).max() > 6.0


# --- several rewards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "advantage", [GroupAdvantage(epsilon=1e-8), GroupAdvantage(std="batch", clip=None), DepthAdvantage(clip=None)]
)
def test_rewards_can_be_normalised_one_by_one_first(advantage):
    # MixGRPO's advantage_aggr and GDPO: the weighted sum of what each reward alone would give.
    scores = np.stack([SCORES, 1000 * SCORES**2], axis=1)
    each = [credit(advantage, column, SIDE_BY_SIDE) for column in scores.T]
    combined = advantage.model_copy(update={"combine": "per-reward"})
    found = credit(combined, scores, SIDE_BY_SIDE, weights=(0.25, 0.75))
    torch.testing.assert_close(found, 0.25 * each[0] + 0.75 * each[1])
    summed = credit(advantage, scores, SIDE_BY_SIDE, weights=(0.25, 0.75))
    assert not torch.allclose(found, summed, atol=1e-3)  # where the reward of larger scale decides alone
    torch.testing.assert_close(credit(combined, scores[:, :1], SIDE_BY_SIDE), each[0])


# --- DanceGRPO's subset ----------------------------------------------------------------------------------------------


def test_the_best_and_the_worst_of_the_batch_get_credit():
    plan = plan_of(IndependentTree(), [4, 4], [[1, 0], [1, 0]])
    scores = [0.0, 1.0, 2.0, 9.0, 0.0, 0.1, 0.2, 0.3]
    whole = credit(GroupAdvantage(std="none"), scores, plan)
    found = credit(GroupAdvantage(std="none", best_of=4), scores, plan)
    assert found.nonzero().flatten().tolist() == [0, 1, 3, 7]  # -3, -2 and 6, 0.15: the first prompt has the extremes
    assert torch.equal(found[[0, 1, 3, 7]], whole[[0, 1, 3, 7]])
    fair = credit(GroupAdvantage(std="none", best_of=2, best_of_scope="prompt"), scores, plan)
    assert fair.nonzero().flatten().tolist() == [0, 3, 4, 7]
    assert torch.equal(credit(GroupAdvantage(std="none", best_of=8), scores, plan), whole)


def test_more_best_rollouts_than_there_are_are_refused():
    found = list(small_experiment(GaussianSpec(), advantage=GroupAdvantage(best_of=10)).problems())
    assert [(problem.location, problem.message) for problem in found] == [
        (("advantage",), "'best_of' keeps 10 rollouts of a step, but there are 8; at most 8")
    ]


# --- BranchGRPO's width pruning --------------------------------------------------------------------------------------

BRANCH = plan_of(BranchingTree(splits=(0, 3, 6, 9), noise="all"), [16], [[1] * 20])
LEVELS = np.repeat(np.arange(20), [int(level.sum()) for level in BRANCH.trained])
LEAF_SCORES = np.random.default_rng(3).normal(size=16)


def test_best_per_branch_keeps_the_earliest_steps_of_every_chain():
    # BranchGRPO's mode 1 at ratio 0.5: 80 of 218 edges go, 138 / 16 = 8.625 stay; all of them in the last five steps.
    found = credit(DepthAdvantage(pruning="chain-start"), LEAF_SCORES, BRANCH)
    assert int((found != 0).sum()) == 138
    assert sorted(set(LEVELS[(found == 0).numpy()])) == [15, 16, 17, 18, 19]
    whole = credit(DepthAdvantage(), LEAF_SCORES, BRANCH)
    assert torch.equal(found[found != 0], whole[found != 0])


def test_extremes_keep_the_best_and_worst_edges_of_all_trees():
    whole = credit(DepthAdvantage(), LEAF_SCORES, BRANCH)
    found = credit(DepthAdvantage(pruning="extremes"), LEAF_SCORES, BRANCH)
    assert int((found != 0).sum()) == 138
    late = torch.from_numpy(LEVELS >= 10)
    kept, dropped = whole[late & (found != 0)], whole[late & (found == 0)]
    assert torch.equal(found[~late], whole[~late])
    assert kept[kept > dropped.median()].min() >= dropped.max()
    assert kept[kept < dropped.median()].max() <= dropped.min()


# --- TempFlow-GRPO ---------------------------------------------------------------------------------------------------


def test_process_rewards_compare_the_children_of_one_step():
    plan = plan_of(TrunkTree(), [5, 4], [[1, 1, 0], [0, 1, 0]])
    scores = np.array([5.0, 1.0, 9.0, 2.0, 4.0, 7.0, 7.0, 1.0, 1.0])
    found = credit(ProcessAdvantage(epsilon=1e-6, clip=None), scores, plan).numpy()
    order = np.concatenate([plan.first_leaf[level + 1][mask] for level, mask in enumerate(plan.trained)])
    groups = np.repeat([0, 1, 2], [3, 2, 4])  # first step of prompt 0; second steps of prompts 0 and 1
    for group in range(3):
        values = scores[order[groups == group]]
        expected = (values - values.mean()) / (values.std() + 1e-6)
        np.testing.assert_allclose(found[groups == group], expected, atol=1e-5)


def test_process_advantages_of_side_by_side_rollouts_are_group_advantages():
    process, group = ProcessAdvantage(), GroupAdvantage(unbiased=False)
    torch.testing.assert_close(credit(process, SCORES, SIDE_BY_SIDE), credit(group, SCORES, SIDE_BY_SIDE))


# --- DDPO ------------------------------------------------------------------------------------------------------------


def test_running_statistics_are_those_of_the_prompts_own_last_rewards():
    # DDPO's tracker: until a prompt has `least` rewards, the step's own mean and std; then those of its buffer.
    advantage = RunningAdvantage(buffer=6, least=4, clip=None).build()
    weights, rng = torch.ones(1), np.random.default_rng(0)
    remembered: dict[int, list[float]] = {}
    for _ in range(4):
        scores = rng.normal(size=5)
        rollouts = rollouts_of(SIDE_BY_SIDE, prompts=(7, 9))
        found = advantage.estimate(Scores(torch.from_numpy(scores)[:, None]), weights, rollouts).numpy()
        for prompt, rows in ((7, slice(0, 3)), (9, slice(3, 5))):
            kept = remembered[prompt] = [*remembered.get(prompt, []), *scores[rows]][-6:]
            compared = np.array(kept) if len(kept) >= 4 else scores
            expected = (scores[rows] - compared.mean()) / (compared.std() + 1e-6)
            np.testing.assert_allclose(found[rows], expected, atol=1e-5)


def test_a_prompt_that_a_step_asks_twice_is_one_prompt_to_running_statistics():
    advantage = RunningAdvantage(buffer=4, least=4, clip=None).build()
    scores, rollouts = Scores(torch.from_numpy(SCORES)[:, None]), rollouts_of(SIDE_BY_SIDE, prompts=(7, 7))
    found = advantage.estimate(scores, torch.ones(1), rollouts)
    kept = SCORES[-4:]
    np.testing.assert_allclose(found.numpy(), (SCORES - kept.mean()) / (kept.std() + 1e-6), atol=1e-5)
    assert advantage.report() == {"known_prompts": 1.0, "settled_prompts": 1.0}


def test_running_statistics_go_on_after_a_checkpoint():
    first, second = (RunningAdvantage(buffer=6, least=4).build() for _ in range(2))
    weights, rollouts = torch.ones(1), rollouts_of(SIDE_BY_SIDE)
    scores = torch.from_numpy(SCORES)[:, None]
    first.estimate(Scores(scores), weights, rollouts)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    ahead, resumed = (part.estimate(Scores(scores**2), weights, rollouts) for part in (first, second))
    assert torch.equal(ahead, resumed)
    fresh = RunningAdvantage(buffer=6, least=4).build().estimate(Scores(scores**2), weights, rollouts)
    assert not torch.equal(ahead, fresh)
