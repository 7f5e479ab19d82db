"""Credit of a step for what it gained: closed forms, and what it asks to be scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_advantages import rollouts_of
from test_trees import questions, trees
from worlds import GaussianSpec, plan_of, small_experiment

from aegpo.core.records import RolloutPlan, Scores
from aegpo.method.advantages import GainAdvantage
from aegpo.method.advantages.credit import Judged
from aegpo.method.objectives import NftObjective
from aegpo.method.trees import BranchingTree, IndependentTree


def made_up(plan: RolloutPlan, levels, rewards: int = 1, seed: int = 0) -> Scores:
    """Scores of the rollouts and of some levels, as exact in float64 as they come."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.randn((count, rewards), generator=generator, dtype=torch.float64)

    return Scores(draw(plan.num_rollouts), {int(level): draw(len(plan.prompt[level])) for level in levels})


def credit(advantage: GainAdvantage, scores: Scores, plan: RolloutPlan, weights=(1.0,)) -> torch.Tensor:
    return advantage.estimate(scores, torch.tensor(weights), rollouts_of(plan))


SIDE_BY_SIDE = plan_of(IndependentTree(), [2, 3], [[1, 1, 0], [1, 1, 0]])  # the last step is not trained
TO_THE_END = plan_of(IndependentTree(), [3], [[1, 1]])
TREE = plan_of(BranchingTree(), [4], [[1, 1]])


def test_levels_before_and_after_trained_steps_are_asked_for_and_no_others():
    assert GainAdvantage().levels(SIDE_BY_SIDE).tolist() == [0, 1, 2]
    assert GainAdvantage().levels(TO_THE_END).tolist() == [0, 1]  # after the last step there is the rollout itself
    late = plan_of(IndependentTree(), [2], [[0, 0, 0, 1, 0, 0]])
    assert GainAdvantage().levels(late).tolist() == [3, 4]
    assert GainAdvantage(over="nothing").levels(late).tolist() == [4]
    assert GainAdvantage(over="nothing").levels(TO_THE_END).tolist() == [1]


@given(questions(), trees, st.integers(0, 99))
def test_gains_along_a_rollout_add_up_to_its_score_less_the_first_predicted_one(question, tree, seed):
    plan = tree.plan(*question, np.random.default_rng(0))
    every = tuple(np.ones_like(mask) for mask in plan.trained)
    plan = RolloutPlan(plan.prompt, plan.parent, plan.noisy, every, plan.start)
    scores = made_up(plan, range(plan.num_steps), seed=seed)
    judged = Judged(scores.leaves[:, 0], {level: values[:, 0] for level, values in scores.nodes.items()})
    gains = GainAdvantage().gains(judged, plan)
    total, node = torch.zeros(plan.num_rollouts, dtype=torch.float64), np.arange(plan.num_rollouts)
    for level in reversed(range(plan.num_steps)):
        total += gains[level + 1][torch.from_numpy(node)]
        node = plan.parent[level][node]
    expected = judged.leaves - judged.nodes[0][torch.from_numpy(node)]
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=0)


# Three rollouts of one prompt. Predicted before the first step, after it, and the rollouts themselves.
FIRST, SECOND, LAST = [0.0, 1.0, 5.0], [1.0, 1.0, 7.0], [1.0, 4.0, 13.0]
THREE = Scores(torch.tensor(LAST)[:, None], {0: torch.tensor(FIRST)[:, None], 1: torch.tensor(SECOND)[:, None]})


def test_a_gain_is_compared_with_the_gains_of_the_group_at_the_same_step():
    # DenseGRPO, Eq. 7: gains 1, 0, 2 and 0, 3, 6; Eq. 10: less their mean, over their std (n).
    found = credit(GainAdvantage(epsilon=1e-9), THREE, TO_THE_END).tolist()
    one = np.sqrt(1.5)  # (2 - 1) / std(1, 0, 2), and (6 - 3) / std(0, 3, 6)
    np.testing.assert_allclose(found, [0, -one, one, -one, 0, one], atol=1e-6)
    centred = credit(GainAdvantage(std="none", clip=None), THREE, TO_THE_END)
    assert centred.tolist() == [0, -1, 1, -3, 0, 3]
    whole = credit(GainAdvantage(std="prompt", epsilon=1e-9), THREE, TO_THE_END)
    np.testing.assert_allclose(whole, np.array([0, -1, 1, -3, 0, 3]) / np.sqrt(20 / 6), atol=1e-6)
    unbiased = credit(GainAdvantage(unbiased=True, epsilon=1e-9), THREE, TO_THE_END)
    np.testing.assert_allclose(unbiased, [0, -1, 1, -1, 0, 1], atol=1e-6)


def test_over_nothing_the_score_after_a_step_is_its_reward():
    # DenseGRPO, Sec. 5.3, "Dense Reward (Baseline)": 1, 1, 7 and 1, 4, 13.
    scores = Scores(THREE.leaves, {1: THREE.nodes[1]})
    found = credit(GainAdvantage(over="nothing", std="none", clip=None), scores, TO_THE_END)
    assert found.tolist() == [-2, -2, 4, -5, -2, 7]


def test_edges_of_a_tree_are_compared_within_their_prompt_and_step():
    # One root that splits in two, each of which splits in two: children gain over the parent they share.
    leaves = torch.tensor([[3.0], [5.0], [0.0], [4.0]])
    scores = Scores(leaves, {0: torch.tensor([[1.0]]), 1: torch.tensor([[2.0], [4.0]])})
    found = credit(GainAdvantage(std="none", clip=None), scores, TREE)
    gains = [[1.0, 3.0], [1.0, 3.0, -4.0, 0.0]]
    assert found.tolist() == [-1.0, 1.0, 1.0, 3.0, -4.0, 0.0]
    assert [value - np.mean(level) for level in gains for value in level] == found.tolist()


def test_prompts_do_not_see_each_other_and_every_step_has_a_scale_of_its_own():
    scores = made_up(SIDE_BY_SIDE, range(3))
    found = credit(GainAdvantage(epsilon=1e-9), scores, SIDE_BY_SIDE).reshape(2, 5)  # (step, rollout)
    louder = {level: 100 + 1000 * values for level, values in scores.nodes.items()}
    second = torch.cat([scores.nodes[2][:2], louder[2][2:]])
    first = torch.cat([scores.nodes[1][:2], louder[1][2:]])
    root = torch.cat([scores.nodes[0][:2], louder[0][2:]])
    again = credit(GainAdvantage(epsilon=1e-9), Scores(scores.leaves, {0: root, 1: first, 2: second}), SIDE_BY_SIDE)
    torch.testing.assert_close(again.reshape(2, 5), found, atol=1e-5, rtol=0)
    for rows in (slice(0, 2), slice(2, 5)):
        torch.testing.assert_close(found[:, rows].mean(dim=1), torch.zeros(2), atol=1e-6, rtol=0)
        torch.testing.assert_close(found[:, rows].std(dim=1, correction=0), torch.ones(2), atol=1e-5, rtol=0)


def test_the_rollouts_scores_do_not_matter_where_the_last_step_is_not_trained():
    scores = made_up(SIDE_BY_SIDE, range(3))
    other = Scores(scores.leaves + 7 * scores.leaves**2, scores.nodes)
    assert torch.equal(credit(GainAdvantage(), scores, SIDE_BY_SIDE), credit(GainAdvantage(), other, SIDE_BY_SIDE))


@given(questions(), trees, st.sampled_from(["none", "step", "prompt"]), st.sampled_from(["before", "nothing"]))
def test_a_constant_added_to_every_score_changes_nothing(question, tree, std, over):
    plan = tree.plan(*question, np.random.default_rng(0))
    advantage = GainAdvantage(std=std, over=over)
    scores = made_up(plan, advantage.levels(plan))
    shifted = Scores(scores.leaves + 5, {level: values + 5 for level, values in scores.nodes.items()})
    found = credit(advantage, scores, plan)
    assert (found.shape, found.dtype) == ((plan.trained_edges,), torch.float32)
    torch.testing.assert_close(credit(advantage, shifted, plan), found, atol=2e-6, rtol=2e-6)


@given(questions(), trees, st.sampled_from(["step", "prompt"]))
def test_an_edge_that_is_alone_at_its_step_and_equal_gains_get_no_credit(question, tree, std):
    plan = tree.plan(*question, np.random.default_rng(0))
    advantage = GainAdvantage(std=std)
    level = {int(level): torch.full((len(plan.prompt[level]), 1), float(level)) for level in advantage.levels(plan)}
    equal = Scores(torch.full((plan.num_rollouts, 1), float(plan.num_steps)), level)
    assert credit(advantage, equal, plan).abs().max() == 0
    found = credit(advantage, made_up(plan, advantage.levels(plan)), plan)
    places = [(step, prompt) for step, mask in enumerate(plan.trained) for prompt in plan.prompt[step + 1][mask]]
    for value, place in zip(found.tolist(), places, strict=True):
        assert value == 0 or places.count(place) > 1


@pytest.mark.parametrize("std", ["none", "step", "prompt"])
def test_a_step_in_which_no_edge_is_trained_asks_for_no_level_and_has_no_credit(std):
    plan = plan_of(BranchingTree(splits=(1,)), [2, 2], [[1, 0, 0], [1, 0, 0]])
    assert not GainAdvantage(std=std).levels(plan).size
    assert credit(GainAdvantage(std=std), made_up(plan, []), plan).tolist() == []


def test_rewards_are_summed_by_weight_or_normalised_one_by_one():
    scores = made_up(SIDE_BY_SIDE, range(3), rewards=2)
    each = [
        credit(
            GainAdvantage(clip=None),
            Scores(scores.leaves[:, [column]], {level: values[:, [column]] for level, values in scores.nodes.items()}),
            SIDE_BY_SIDE,
        )
        for column in range(2)
    ]
    found = credit(GainAdvantage(clip=None, combine="per-reward"), scores, SIDE_BY_SIDE, weights=(0.25, 0.75))
    torch.testing.assert_close(found, 0.25 * each[0] + 0.75 * each[1])
    mixed = {level: values @ torch.tensor([[0.25], [0.75]]).double() for level, values in scores.nodes.items()}
    summed = Scores(scores.leaves @ torch.tensor([[0.25], [0.75]]).double(), mixed)
    torch.testing.assert_close(
        credit(GainAdvantage(), scores, SIDE_BY_SIDE, weights=(0.25, 0.75)),
        credit(GainAdvantage(), summed, SIDE_BY_SIDE),
    )


def test_credit_is_cut_off_at_the_clip():
    scores = Scores(torch.tensor([[0.0], [0.0], [9.0]]), {0: torch.zeros(3, 1), 1: torch.zeros(3, 1)})
    assert credit(GainAdvantage(std="none", clip=2.0), scores, TO_THE_END).tolist() == [0, 0, 0, -2, -2, 2]


def test_an_objective_that_learns_from_no_step_is_warned_about():
    experiment = small_experiment(GaussianSpec(), advantage=GainAdvantage(), objective=NftObjective())
    (caution,) = (each for each in experiment.problems() if each.location == ("advantage",))
    assert caution.warning
    assert caution.message.startswith("'gain' credits single steps, but objective 'nft' learns from clean images")
    assert not list(small_experiment(GaussianSpec(), advantage=GainAdvantage()).problems())


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_an_epsilon_that_is_not_above_zero_is_refused(value):
    with pytest.raises(ValueError, match="greater than 0"):
        GainAdvantage(epsilon=value)
