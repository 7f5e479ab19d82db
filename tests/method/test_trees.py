"""Plans as data: every forest of every tree has the properties the executor and the budget rely on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import GaussianSpec, plan_of, small_experiment

from aegpo.core.contracts import check_plan
from aegpo.core.sections import RolloutsSpec
from aegpo.errors import PlanError
from aegpo.method.objectives import ClippedObjective
from aegpo.method.planning import problems as plan_problems
from aegpo.method.samplers import CpsSampler
from aegpo.method.selectors import FirstSelector, FixedSelector, UniformSelector
from aegpo.method.trees import BranchingTree, IndependentTree, TrunkTree, forest

RNG = np.random.default_rng(0)


@st.composite
def questions(draw, most: int = 20):
    """(P,) counts and (P, T) chosen steps, at least one a prompt."""
    prompts, steps = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    counts = draw(st.lists(st.integers(2, most), min_size=prompts, max_size=prompts))
    rows = st.lists(st.booleans(), min_size=steps, max_size=steps).filter(any)
    chosen = draw(st.lists(rows, min_size=prompts, max_size=prompts))
    return np.array(counts, dtype=np.int64), np.array(chosen, dtype=bool)


noise = st.sampled_from(["chosen", "all"])
trees = st.one_of(
    st.builds(IndependentTree, noise=noise, start=st.sampled_from(["own", "shared", "batch"])),
    st.builds(BranchingTree, noise=noise, factor=st.integers(2, 5), start=st.sampled_from(["own", "batch"])),
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
        assert (plan.noisy[level][others] == (tree.noise == "all" and not last)).all()


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


@given(questions(), noise)
def test_independent_rollouts_with_shared_noise_are_the_tree_split_once(question, noise):
    counts, steps = question
    steps[:, 0] = True
    shared = IndependentTree(start="shared", noise=noise).plan(counts, steps, RNG)
    split = BranchingTree(factor=int(counts.max()), noise=noise).plan(counts, steps, RNG)
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
    plan = plan_of(BranchingTree(noise="all"), [16], steps)
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
    plan = plan_of(IndependentTree(start="shared", noise="all"), [4, 4], [[0, 1, 0], [1, 0, 0]])
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
    lengths = plan.trunk_levels
    assert lengths.shape == counts.shape
    for prompt, length in enumerate(lengths):
        sizes = [int((nodes == prompt).sum()) for nodes in plan.prompt]
        noisy = [bool(plan.noisy[i][plan.prompt[i + 1] == prompt].any()) for i in range(plan.num_steps)]
        same = [sizes[level] == 1 and not any(noisy[:level]) for level in range(plan.num_steps)]
        expected = same.index(False) if False in same else plan.num_steps
        assert length == (expected if plan.start is None else 0)


# --- no noise, shared noise, fixed splits ----------------------------------------------------------------------------


def test_rollouts_for_the_forward_process_are_trained_without_noise():
    plan = plan_of(IndependentTree(noise="none"), [3, 2], [[1, 1, 0], [1, 0, 1]])
    assert not any(level.any() for level in plan.noisy)
    assert [level.tolist() for level in plan.trained] == [
        [True] * 5,
        [True] * 3 + [False] * 2,
        [False] * 3 + [True] * 2,
    ]


@pytest.mark.parametrize("tree", [IndependentTree(start="batch"), BranchingTree(start="batch")])
def test_one_start_noise_serves_all_prompts_of_the_step(tree):
    plan = plan_of(tree, [4, 6], [[1, 1, 0], [0, 1, 1]])
    assert plan.start.tolist() == [0] * len(plan.prompt[0])
    own = plan_of(type(tree)(), [4, 6], [[1, 1, 0], [0, 1, 1]])
    assert own.start is None
    if isinstance(tree, IndependentTree):
        assert_same(plan, plan_of(IndependentTree(start="shared"), [4, 6], [[1, 1, 0], [0, 1, 1]]))
    else:
        assert_same(plan, own)


def test_branchgrpo_trains_218_transitions_and_138_of_them_when_pruned():
    # 20 steps, splits at 0, 3, 6, 9, every step chosen: 218 / 16 = 13.625 a leaf; 5 pruned depths leave 8.625.
    tree = BranchingTree(splits=(0, 3, 6, 9), noise="all", start="batch")
    plan = plan_of(tree, [16], [[1] * 20])
    assert plan.trained_edges == 218
    assert plan.trained_edges / plan.num_rollouts == 13.625
    assert all(level.all() for level in plan.noisy)
    pruned = plan_of(tree, [16], [[1] * 13 + [0] * 5 + [1] * 2])
    assert pruned.trained_edges / pruned.num_rollouts == 8.625
    assert pruned.forwards == plan.forwards  # sampling is the same
    assert all(level.all() for level in pruned.noisy)


def test_splits_are_noisy_even_where_no_step_was_chosen():
    plan = plan_of(BranchingTree(splits=(1,), factor=4), [4], [[0, 0, 1]])
    assert [len(nodes) for nodes in plan.prompt] == [1, 1, 4, 4]
    assert [level.tolist() for level in plan.noisy] == [[False], [True] * 4, [True] * 4]
    assert [level.tolist() for level in plan.trained] == [[False], [False] * 4, [True] * 4]


# --- trunks ----------------------------------------------------------------------------------------------------------


@st.composite
def trunk_questions(draw):
    """Counts and steps that fit a drawn number of trunks."""
    _, steps = draw(questions())
    trunks = draw(st.integers(1, 3))
    least = steps.sum(axis=1) * max(2, trunks)
    more = draw(st.lists(st.integers(0, 9), min_size=len(least), max_size=len(least)))
    return trunks, least + np.array(more), steps


@given(trunk_questions())
def test_a_trunk_plan_has_exactly_its_leaves_and_trains_each_ones_first_edge(question):
    trunks, counts, steps = question
    plan = TrunkTree(trunks=trunks).plan(counts, steps, RNG)
    check_plan("trunk", plan, counts, steps)
    assert all((np.diff(prompts) >= 0).all() for prompts in plan.prompt)
    assert all((np.diff(parents) >= 0).all() for parents in plan.parent)
    assert plan.trained_edges == counts.sum()  # one edge a rollout
    for level in range(plan.num_steps):
        assert np.array_equal(plan.noisy[level], plan.trained[level])
        assert (plan.leaves[level + 1][plan.trained[level]] == 1).all()  # a reward of its own
        trained = np.bincount(plan.prompt[level + 1][plan.trained[level]], minlength=len(counts))
        assert ((trained > 0) == steps[:, level]).all()
        assert (trained[steps[:, level]] >= 2).all()  # something to compare


@given(trunk_questions())
def test_a_trunk_plan_costs_its_trunks_and_the_rest_of_every_childs_way(question):
    trunks, counts, steps = question
    plan = TrunkTree(trunks=trunks).plan(counts, steps, RNG)
    total = 0
    for count, chosen in zip(counts, steps, strict=True):
        levels = np.flatnonzero(chosen)
        shares = [count // len(levels) + (place < count % len(levels)) for place in range(len(levels))]
        total += trunks * (levels[-1] + 1) + sum(
            share * (len(chosen) - 1 - level) for share, level in zip(shares, levels, strict=True)
        )
    assert plan.forwards == total


def test_tempflow_has_6_children_at_each_of_9_states():
    # TempFlow-GRPO: 10 steps, 6 children at the first 9 states of a trunk.
    plan = plan_of(TrunkTree(), [54], [[1] * 9 + [0]])
    assert [int(level.sum()) for level in plan.trained] == [6] * 9 + [0]
    assert plan.forwards == 9 + 6 * sum(9 - level for level in range(9))


def test_unequal_counts_are_shared_out_as_equally_as_possible():
    plan = plan_of(TrunkTree(), [8, 16], [[1, 1, 1, 0], [1, 1, 1, 0]])
    shares = [np.bincount(plan.prompt[level + 1][plan.trained[level]]).tolist() for level in range(3)]
    assert shares == [[3, 6], [3, 5], [2, 5]]


def test_too_few_rollouts_for_the_chosen_steps_are_refused_with_what_would_fit():
    with pytest.raises(PlanError) as caught:
        plan_of(TrunkTree(), [8], [[1] * 5])
    assert str(caught.value) == (
        "tree 'trunk' cannot share 8 rollouts of prompt 0 out over 5 steps of 1 trunks, 2 a step; give each prompt at "
        "least 10, or choose at most 4 steps"
    )


@pytest.mark.parametrize(
    ("changes", "place", "message"),
    [
        ({"tree": TrunkTree(trunks=2)}, "tree", "tree 'trunk' cannot share 4 rollouts of prompt 0 out over 3 steps"),
        (
            {"sampler": CpsSampler(convention="gaussian"), "selector": FixedSelector(steps=(2, 3))},
            "sampler",
            "sampler 'cps' adds no noise at denoising step 3",
        ),
        ({"tree": IndependentTree(noise="none")}, "objective", "objective 'clipped' needs log-probabilities"),
    ],
)
def test_what_cannot_be_planned_is_refused_at_load(changes, place, message):
    experiment = small_experiment(GaussianSpec(), **changes)
    assert list(experiment.problems()) == []
    found = list(plan_problems(experiment))
    assert [problem.location for problem in found] == [(place,)]
    assert found[0].message.startswith(message)


def test_a_plan_that_fits_is_not_refused():
    rollouts = RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=4)
    for selector, tree in ((FirstSelector(top_k=2), TrunkTree()), (UniformSelector(), IndependentTree(start="batch"))):
        changes = {"selector": selector, "tree": tree, "rollouts": rollouts, "objective": ClippedObjective()}
        assert list(plan_problems(small_experiment(GaussianSpec(), sampler=CpsSampler(), **changes))) == []


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (IndependentTree(noise="none", start="shared"), "rollouts with 'start: shared' and no noise would be the same"),
        (BranchingTree(noise="none"), "children of a split without noise would be the same image; 'noise' must be"),
        (BranchingTree(splits=(0, 4)), "'splits' names step 4, but a trajectory has the steps 0 to 3"),
    ],
)
def test_trees_that_cannot_differ_are_refused(tree, message):
    found = list(small_experiment(GaussianSpec(), tree=tree).problems())
    assert [problem.location for problem in found] == [("tree",)]
    assert found[0].message.startswith(message)
