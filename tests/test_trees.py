"""Plans as data: every forest of every tree has the properties the executor and the budget rely on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import plan_of

from aegpo.contracts import check_plan
from aegpo.trees import BranchingTree, IndependentTree, forest, trunk_levels

RNG = np.random.default_rng(0)


@st.composite
def questions(draw, most: int = 20):
    """(P,) counts and (P, T) chosen steps, at least one a prompt."""
    prompts, steps = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    counts = draw(st.lists(st.integers(2, most), min_size=prompts, max_size=prompts))
    rows = st.lists(st.booleans(), min_size=steps, max_size=steps).filter(any)
    chosen = draw(st.lists(rows, min_size=prompts, max_size=prompts))
    return np.array(counts, dtype=np.int64), np.array(chosen, dtype=bool)


elsewhere = st.sampled_from(["ode", "sde"])
trees = st.one_of(
    st.builds(IndependentTree, elsewhere=elsewhere, start=st.sampled_from(["own", "shared"])),
    st.builds(BranchingTree, elsewhere=elsewhere, factor=st.integers(2, 5)),
)


@given(questions(), trees)
def test_every_prompt_gets_exactly_its_rollouts(question, tree):
    counts, steps = question
    plan = tree.plan(counts, steps, RNG)
    assert np.bincount(plan.group, minlength=len(counts)).tolist() == counts.tolist()
    assert plan.num_rollouts == counts.sum()
    assert plan.num_steps == steps.shape[1]
    check_plan(tree.kind, plan, counts, steps)


@given(questions(), trees)
def test_every_child_has_a_parent_of_its_prompt_and_every_node_a_child(question, tree):
    plan = tree.plan(*question, RNG)
    for level, parent in enumerate(plan.parent):
        assert len(parent) == len(plan.prompt[level + 1])
        assert set(parent) == set(range(len(plan.prompt[level])))
        assert (plan.prompt[level][parent] == plan.prompt[level + 1]).all()


@given(questions(), trees)
def test_nodes_stay_in_the_order_of_prompts_and_parents(question, tree):
    plan = tree.plan(*question, RNG)
    assert all((np.diff(prompts) >= 0).all() for prompts in plan.prompt)
    assert all((np.diff(parents) >= 0).all() for parents in plan.parent)


@given(questions(), trees)
def test_only_noisy_chosen_steps_are_trained(question, tree):
    counts, steps = question
    plan = tree.plan(counts, steps, RNG)
    for level in range(plan.num_steps):
        chosen = steps[plan.prompt[level + 1], level]
        assert (plan.trained[level] <= plan.noisy[level]).all()
        assert (plan.trained[level] <= chosen).all()
        assert (chosen <= plan.noisy[level]).all()


@given(questions(), trees)
def test_siblings_are_told_apart_by_noise(question, tree):
    plan = tree.plan(*question, RNG)
    for level, parent in enumerate(plan.parent):
        children = np.bincount(parent)
        assert plan.noisy[level][children[parent] > 1].all()


@given(questions(), trees)
def test_steps_elsewhere_are_deterministic_or_noisy_as_asked(question, tree):
    counts, steps = question
    plan = tree.plan(counts, steps, RNG)
    for level in range(plan.num_steps):
        others = ~steps[plan.prompt[level + 1], level]
        last = level == plan.num_steps - 1
        assert (plan.noisy[level][others] == (tree.elsewhere == "sde" and not last)).all()


@given(questions(), trees)
def test_leaves_and_first_leaf_agree_with_a_walk_from_each_leaf(question, tree):
    plan = tree.plan(*question, RNG)
    below: list[list[list[int]]] = [[[] for _ in prompts] for prompts in plan.prompt]
    for leaf in range(plan.num_rollouts):
        node = leaf
        below[-1][node].append(leaf)
        for level in reversed(range(plan.num_steps)):
            node = plan.parent[level][node]
            below[level][node].append(leaf)
    for level, nodes in enumerate(below):
        assert [len(members) for members in nodes] == plan.leaves[level].tolist()
        assert [min(members) for members in nodes] == plan.first_leaf[level].tolist()


@given(questions(), trees)
def test_forwards_count_the_nodes_that_are_not_leaves(question, tree):
    plan = tree.plan(*question, RNG)
    widths = [len(prompts) for prompts in plan.prompt]
    assert plan.forwards == sum(widths) - plan.num_rollouts
    assert plan.forwards <= plan.num_rollouts * plan.num_steps
    assert plan.trained_edges == sum(int(level.sum()) for level in plan.trained)


@given(questions(), st.integers(2, 5))
def test_a_branching_prompt_has_no_more_trees_than_it_needs(question, factor):
    counts, steps = question
    plan = BranchingTree(factor=factor).plan(counts, steps, RNG)
    roots = np.bincount(plan.prompt[0], minlength=len(counts))
    for count, trees_of_prompt, chosen in zip(counts, roots, steps.sum(axis=1), strict=True):
        assert trees_of_prompt == -(-int(count) // factor ** int(chosen))


@given(questions())
def test_independent_rollouts_with_own_noise_never_meet(question):
    counts, steps = question
    plan = IndependentTree().plan(counts, steps, RNG)
    assert all((parent == np.arange(counts.sum())).all() for parent in plan.parent)
    assert plan.forwards == counts.sum() * plan.num_steps


def assert_same(one, other):
    for name in ("prompt", "parent", "noisy", "trained"):
        for mine, yours in zip(getattr(one, name), getattr(other, name), strict=True):
            assert mine.dtype == yours.dtype
            assert np.array_equal(mine, yours), name


@given(questions(), elsewhere)
def test_independent_rollouts_with_shared_noise_are_the_tree_split_once(question, elsewhere):
    counts, steps = question
    steps[:, 0] = True
    shared = IndependentTree(start="shared", elsewhere=elsewhere).plan(counts, steps, RNG)
    split = BranchingTree(factor=int(counts.max()), elsewhere=elsewhere).plan(counts, steps, RNG)
    assert_same(shared, split)


@pytest.mark.parametrize("rollouts", [31, 62, 63, 100])
@pytest.mark.parametrize("chosen", [1, 3])
def test_large_factors_split_a_single_tree_too(rollouts, chosen):
    steps = [[1] * chosen + [0] * (4 - chosen)]
    shared = plan_of(IndependentTree(start="shared"), [rollouts], steps)
    assert_same(shared, plan_of(BranchingTree(factor=rollouts), [rollouts], steps))


def test_a_large_factor_reaches_its_leaves_from_one_root():
    plan = plan_of(BranchingTree(factor=32), [64], [[1, 1, 0]])
    assert [len(nodes) for nodes in plan.prompt] == [1, 32, 64, 64]


def test_many_chosen_steps_do_not_overflow():
    plan = plan_of(BranchingTree(factor=3), [9], [[1] * 60])
    assert [len(nodes) for nodes in plan.prompt[:4]] == [1, 3, 9, 9]


def test_branchgrpo_has_218_transitions_for_16_leaves():
    # BranchGRPO's script: 20 steps, binary splits at 0, 3, 6, 9; its README reports 13.68 evaluations a leaf.
    steps = [[int(step in (0, 3, 6, 9)) for step in range(20)]]
    plan = plan_of(BranchingTree(elsewhere="sde"), [16], steps)
    widths = [len(nodes) for nodes in plan.prompt]
    assert widths == [1, *[2] * 3, *[4] * 3, *[8] * 3, *[16] * 11]
    transitions = sum(len(parent) for parent in plan.parent)
    assert transitions == 218
    assert transitions / plan.num_rollouts == 13.625
    assert plan.forwards == 218 - 16 + 1  # the root instead of the leaves
    assert plan.trained_edges == 2 + 4 + 8 + 16


def test_a_low_prompt_fills_up_after_three_of_four_peaks():
    steps = [[1, 0, 1, 1, 0, 1, 0]] * 2
    plan = plan_of(BranchingTree(), [8, 16], steps)
    assert [np.bincount(nodes).tolist() for nodes in plan.prompt] == [
        [1, 1],
        [2, 2],
        [2, 2],
        [4, 4],
        [8, 8],
        [8, 8],
        [8, 16],
        [8, 16],
    ]
    assert plan.trained[5].all()  # the fourth peak still explores and learns where nothing splits any more


def test_a_partial_split_shares_its_leaves_out_evenly():
    plan = plan_of(BranchingTree(), [12], [[1, 1, 1, 1, 0]])
    assert [len(nodes) for nodes in plan.prompt] == [1, 2, 4, 8, 12, 12]
    assert plan.leaves[1].tolist() == [6, 6]
    assert plan.leaves[2].tolist() == [3, 3, 3, 3]


def test_a_shared_prefix_costs_one_forward_a_step():
    # A shared deterministic prefix of a steps costs a + (T - a) G forwards instead of T G; the edge of step a - 1 is
    # still shared, so with the first noisy step at index a - 1 the prefix has a nodes.
    plan = plan_of(IndependentTree(start="shared"), [8], [[0] * 5 + [1, 1, 1, 1, 0]])
    assert plan.forwards == 6 + (10 - 6) * 8 == 38


def test_a_noisy_step_that_was_not_chosen_is_not_trained():
    plan = plan_of(IndependentTree(start="shared", elsewhere="sde"), [4, 4], [[0, 1, 0], [1, 0, 0]])
    assert [level.tolist() for level in plan.trained] == [
        [False] * 4 + [True] * 4,
        [True] * 4 + [False] * 4,
        [False] * 8,
    ]
    assert plan.noisy[0].all()
    assert not plan.noisy[2].any()


def test_a_prompt_with_a_single_node_has_nothing_to_compare_and_is_not_trained():
    steps = np.array([[True, True], [True, True]])
    widths = {(0, 0): 1, (0, 1): 3, (1, 0): 2, (1, 1): 2}
    plan = forest(np.array([1, 1]), steps, steps, lambda prompt, level, nodes: widths[prompt, level])
    assert [level.tolist() for level in plan.trained] == [[False, True, True], [True] * 5]


@given(questions(), trees)
def test_a_trunk_is_the_levels_at_which_every_rollout_of_a_prompt_is_the_same(question, tree):
    counts, steps = question
    plan = tree.plan(counts, steps, RNG)
    lengths = trunk_levels(plan)
    assert lengths.shape == counts.shape
    for prompt, length in enumerate(lengths):
        sizes = [int((nodes == prompt).sum()) for nodes in plan.prompt]
        noisy = [bool(plan.noisy[i][plan.prompt[i + 1] == prompt].any()) for i in range(plan.num_steps)]
        same = [sizes[level] == 1 and not any(noisy[:level]) for level in range(plan.num_steps)]
        assert length == same.index(False) if False in same else plan.num_steps
