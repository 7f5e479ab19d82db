"""Plans in parts: the cheapest cuts against all there are, and parts that together are the plan, each edge once."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import plan_of

from aegpo.core.contracts import check_forest
from aegpo.core.records import RolloutPlan
from aegpo.core.sections import TailSpec
from aegpo.core.steps import passing
from aegpo.method.merging import with_merged
from aegpo.method.partition import Partition, ancestors, cuts, part, undivided
from aegpo.method.tails import with_tail
from aegpo.method.trees import BranchingTree, IndependentTree, TrunkTree
from aegpo.prompts.lists import numbered

# --- plans of every kind ---------------------------------------------------------------------------------------------


def wild(rng: np.random.Generator, steps: int, roots: int, most: int) -> RolloutPlan:
    """A forest that no tree grows: any prompts in turns, any splits, at most about `most` rollouts."""
    prompts = int(rng.integers(1, roots + 1))
    prompt, parent, noisy, trained = [rng.integers(0, prompts, roots)], [], [], []
    prompt[0][0] = prompts - 1
    for _ in range(steps):
        room = max(0, most - len(prompt[-1]))
        split = rng.random(len(prompt[-1])) < rng.choice([0.0, 0.3, 0.6])
        children = 1 + np.where(np.cumsum(split) <= room, split, 0) * rng.integers(1, 3, len(split))
        parent.append(np.repeat(np.arange(len(prompt[-1])), children))
        prompt.append(prompt[-1][parent[-1]])
        noisy.append((children[parent[-1]] > 1) | (rng.random(len(parent[-1])) < 0.4))
        trained.append(noisy[-1] & (rng.random(len(parent[-1])) < 0.7))
    scale = tuple(np.where(each, 2.0, 1.0) for each in noisy) if rng.random() < 0.3 else None
    start = rng.integers(0, roots, roots) if rng.random() < 0.3 else None
    return RolloutPlan(tuple(prompt), tuple(parent), tuple(noisy), tuple(trained), start, scale=scale)


def ends_of_runs(rng: np.random.Generator, prompts: int, steps: int) -> np.ndarray:  # (P, T)
    """Runs of joined steps, others for each prompt."""
    until = np.empty((prompts, steps), dtype=np.int64)
    for row in until:
        borders = [*(1 + np.flatnonzero(rng.random(steps - 1) < 0.6)).tolist(), steps]
        row[:] = np.repeat(borders, np.diff([0, *borders]))
    return until


def shipped(rng: np.random.Generator, steps: int, prompts: int, most: int) -> RolloutPlan:
    """What one of the trees grows."""
    counts = rng.integers(2, max(3, most // prompts + 1), prompts)
    chosen = rng.random((prompts, steps)) < 0.5
    chosen[np.arange(prompts), rng.integers(0, steps, prompts)] = True
    trees = [IndependentTree(start=start) for start in ("own", "shared", "batch")]
    trees += [BranchingTree(), BranchingTree(noise="all", split_noise=3.0, start="batch"), TrunkTree()]
    tree = trees[rng.integers(len(trees))]
    if isinstance(tree, TrunkTree):  # which needs two rollouts for every chosen step
        chosen = np.eye(steps, dtype=bool)[rng.integers(0, steps, prompts)]
    return tree.plan(counts, chosen, rng)


@st.composite
def plans(draw, most: int = 24, deepest: int = 7) -> RolloutPlan:
    """Any plan: grown or wild, with joined steps or a tail or neither."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps, roots = draw(st.integers(1, deepest)), draw(st.integers(1, 4))
    plan = draw(st.sampled_from([wild, shipped]))(rng, steps, roots, most)
    if draw(st.booleans()):
        plan = with_merged(plan, ends_of_runs(rng, int(plan.group.max()) + 1, steps))
    if draw(st.booleans()):
        plan = with_tail(plan, np.linspace(1, 0, steps + 1), TailSpec(solver="euler", ratio=0.5))
    check_forest("the test", plan, np.bincount(plan.group), plan.num_steps)
    return plan


def ways(plan: RolloutPlan) -> list[set[tuple[int, int]]]:
    """The states, (level, node), that the network is asked about on the way of each rollout, walked one by one."""
    inside, found = passing(plan), []
    for leaf in range(plan.num_rollouts):
        node, way = leaf, set()
        for level in reversed(range(plan.num_steps)):
            node = int(plan.parent[level][node])
            if not inside[level][node]:
                way.add((level, node))
        found.append(way)
    return found


def cost_of(way: list[set[tuple[int, int]]], bounds: list[int]) -> list[int]:
    """Forwards of each part."""
    return [len(set().union(*way[first:end])) for first, end in pairwise(bounds)]


def borders(plan: RolloutPlan, seed: int) -> np.ndarray:
    """Some rollouts at which parts may begin."""
    may_begin = np.random.default_rng(seed).random(plan.num_rollouts) < 0.5
    may_begin[0] = True
    return may_begin


parts_of = st.integers(1, 9)

# --- where plans are cut ---------------------------------------------------------------------------------------------


@given(plans(most=9, deepest=5), st.integers(1, 4), st.none() | st.integers(0, 99))
def test_no_other_cut_has_a_cheaper_dearest_part(plan, parts, seed):
    may_begin = None if seed is None else borders(plan, seed)
    way, begins = ways(plan), np.arange(plan.num_rollouts) if seed is None else np.flatnonzero(may_begin)
    inner = begins[1:].tolist()
    every = (chosen for size in range(parts) for chosen in combinations(inner, min(size, len(inner))))
    best = min(max(cost_of(way, [0, *chosen, plan.num_rollouts])) for chosen in every)
    found = cuts(plan, parts, may_begin)
    assert max(cost_of(way, found.tolist())) == best
    assert set(found.tolist()) <= {*begins.tolist(), plan.num_rollouts}


@given(plans(), parts_of, st.none() | st.integers(0, 99))
def test_the_dearest_part_keeps_the_bound(plan, parts, seed):
    may_begin = None if seed is None else borders(plan, seed)
    way, whole, found = ways(plan), plan.forwards, cuts(plan, parts, may_begin)
    pieces = [*np.flatnonzero(np.ones(len(way)) if seed is None else may_begin).tolist(), len(way)]
    dearest, piece, least = max(cost_of(way, found.tolist())), max(cost_of(way, pieces)), min(map(len, way))
    assert dearest <= piece + (whole - least) / parts
    if seed is None:
        assert dearest <= -(-whole // parts) + 2 * plan.num_steps - 1
    if seed is None and plan.until is None:
        assert dearest <= plan.num_steps + (whole - plan.num_steps) // parts


@given(plans(), parts_of, st.none() | st.integers(0, 99))
def test_parts_are_empty_only_where_there_is_too_little_to_cut(plan, parts, seed):
    may_begin = np.ones(plan.num_rollouts, dtype=bool) if seed is None else borders(plan, seed)
    bounds = cuts(plan, parts, may_begin)
    assert len(bounds) == parts + 1
    assert (bounds[0], bounds[-1]) == (0, plan.num_rollouts)
    filled = int((np.diff(bounds) > 0).sum())
    assert filled == min(parts, int(may_begin.sum()))


@pytest.mark.parametrize("shards", [8, 16, 64])
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_neighbouring_parts_share_the_work_out_as_evenly_as_single_ones(shards, processes):
    """48 full parts before 16 empty ones would leave a quarter of the processes without work."""
    plan = plan_of(IndependentTree(), [12] * 8, [[1] * 10] * 8)
    spent = np.reshape(Partition.of(plan, shards).forwards, (processes, -1)).sum(axis=1)
    assert spent.tolist() == [960 // processes] * processes


def test_independent_rollouts_are_cut_into_equal_numbers():
    plan = plan_of(IndependentTree(), [5, 6], [[1, 1, 0]] * 2)
    assert sorted(Partition.of(plan, 4).rollouts) == [2, 3, 3, 3]
    assert sorted(Partition.of(plan, 16).rollouts) == [0] * 5 + [1] * 11


def test_big_plans_are_cut_in_milliseconds():
    """Into 8 parts in 1 ms on an idle core, into 1024 in 4."""
    rng = np.random.default_rng(0)
    chosen = np.zeros((48, 50), dtype=bool)
    chosen[:, [3, 9, 20, 33]] = True
    plan = BranchingTree().plan(np.full(48, 24), chosen, rng)
    for parts in (8, 1024):
        spent = []
        for _ in range(5):
            begin = time.process_time()
            assert len(Partition.of(plan, parts).forwards) == parts
            spent.append(time.process_time() - begin)
        assert min(spent) < 0.1


# --- what parts are --------------------------------------------------------------------------------------------------


@given(plans(), parts_of)
def test_parts_have_every_rollout_once_and_cost_what_was_counted(plan, parts):
    cut, way = Partition.of(plan, parts), ways(plan)
    found = list(cut.parts)
    assert np.concatenate([each.nodes[-1] for each in found]).tolist() == [*range(plan.num_rollouts)]
    assert [each.num_rollouts for each in found] == cut.rollouts
    assert [each.forwards for each in found] == cut.forwards == cost_of(way, cut.bounds.tolist())
    assert np.array_equal(np.concatenate([each.group for each in found]), plan.group)


@given(plans(), parts_of)
def test_a_part_is_a_forest_and_its_nodes_are_those_of_the_whole(plan, parts):
    cut, prompts = Partition.of(plan, parts), int(plan.group.max()) + 1
    for each in cut.parts:
        assert each.tail is plan.tail
        counts = np.bincount(each.group, minlength=prompts)
        check_forest("the test", replace(each, start=None), counts, plan.num_steps)
        starts = np.arange(len(plan.prompt[0])) if plan.start is None else plan.start
        if each is not plan:
            assert np.array_equal(each.start, starts[each.nodes[0]])
        for level, rows in enumerate(each.nodes):
            assert np.array_equal(each.prompt[level], plan.prompt[level][rows])
            assert np.array_equal(each.leaves[level], plan.leaves[level][rows])
            assert np.array_equal(each.first_leaf[level], plan.first_leaf[level][rows])
        for level, (upper, rows) in enumerate(pairwise(each.nodes)):
            assert np.array_equal(upper[each.parent[level]], plan.parent[level][rows])
            assert np.array_equal(each.noisy[level], plan.noisy[level][rows])
            for mine, whole in ((each.scale, plan.scale), (each.until, plan.until)):
                assert (mine is None) == (whole is None)
                assert whole is None or np.array_equal(mine[level], whole[level][rows])


@given(plans(), parts_of)
def test_trunks_are_those_of_the_whole_where_something_of_the_prompt_is(plan, parts):
    cut = Partition.of(plan, parts)
    for each in cut.parts:
        there = np.isin(np.arange(len(plan.trunk_levels)), each.group)
        assert np.array_equal(each.trunk_levels, np.where(there, plan.trunk_levels, 0))


@given(plans(), parts_of)
def test_every_trained_edge_is_learned_from_once_in_the_part_that_edge_owner_names(plan, parts):
    cut = Partition.of(plan, parts)
    found = list(cut.parts)
    owner, first = cut.edge_owner(), 0
    for level, trained in enumerate(plan.trained):
        edges = np.flatnonzero(trained)
        told = owner[first : first + len(edges)]
        first += len(edges)
        for index, each in enumerate(found):
            own = each.nodes[level + 1][each.trained[level]]
            assert np.array_equal(own, edges[told == index])
    assert first == len(owner) == plan.trained_edges


@given(plans(), parts_of)
def test_every_node_belongs_to_the_first_part_that_has_it(plan, parts):
    cut = Partition.of(plan, parts)
    found = [each.nodes for each in cut.parts]
    for level in range(plan.num_steps + 1):
        owner = cut.owner(level)
        for node, index in enumerate(owner):
            assert index == next(row for row, nodes in enumerate(found) if node in nodes[level])
        owned = [cut.owned(level, index) for index in range(parts)]
        assert sorted(np.concatenate(owned)) == [*range(len(owner))]
        assert all((owner[nodes] == index).all() for index, nodes in enumerate(owned))


@given(plans())
def test_the_ancestors_are_those_of_a_walk_and_an_only_part_is_the_plan_itself(plan):
    above = ancestors(plan)
    for leaf, way in enumerate(ways(plan)):
        assert way <= set(enumerate(above[:-1, leaf].tolist()))
    assert Partition.of(plan, 1).parts[0] is plan
    one = part(plan, 0, plan.num_rollouts)
    assert one.forwards == plan.forwards
    assert [each.tolist() for each in one.trained] == [each.tolist() for each in plan.trained]


def test_an_empty_part_has_nothing_of_everything():
    plan = with_merged(plan_of(BranchingTree(split_noise=2), [2, 2], [[1, 0, 0]] * 2), np.array([[1, 3, 3]] * 2))
    cut = Partition.of(plan, 6)
    each = cut.parts[cut.rollouts.index(0)]
    assert (each.num_rollouts, each.forwards, each.trained_edges) == (0, 0, 0)
    assert each.trunk_levels.tolist() == [0, 0]
    arrays = (*each.prompt, *each.parent, *each.noisy, *each.trained, *each.leaves, *each.first_leaf, each.start)
    assert {len(array) for array in (*arrays, *each.scale, *each.until, *each.nodes)} == {0}


# --- groups that stay together ---------------------------------------------------------------------------------------


@given(plans(), parts_of, st.lists(st.sampled_from("ab"), min_size=4, max_size=4) | st.just("abcd"))
@settings(max_examples=200)
def test_what_asks_the_same_is_in_one_part_and_all_else_may_be_cut(plan, parts, texts):
    asked = [texts[prompt] for prompt in plan.group]
    cut = Partition.of(plan, parts, numbered(texts))
    where = np.repeat(np.arange(parts), cut.rollouts)
    assert all(len({part for part, text in zip(where, asked, strict=True) if text == one}) == 1 for one in set(asked))
    for row, begins in enumerate(undivided(plan, numbered(texts))):
        assert begins == (not set(asked[:row]) & set(asked[row:]))


def test_a_prompt_that_is_asked_twice_holds_what_lies_between():
    plan = plan_of(IndependentTree(), [2, 2, 2, 2], [[1]] * 4)
    assert np.flatnonzero(undivided(plan, numbered(["a", "b", "a", "c"]))).tolist() == [0, 6]
    assert Partition.of(plan, 4, numbered(["a", "b", "a", "c"])).rollouts.count(0) == 2
    assert Partition.of(plan, 4, numbered("abcd")).rollouts == [2, 2, 2, 2]
