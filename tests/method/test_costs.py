"""What an arm costs, from plans alone."""

from __future__ import annotations

import numpy as np
import pytest
from worlds import GaussianSpec, signals, small_experiment

from aegpo.core.parts import AllocatorSpec
from aegpo.core.sections import OptimizerSpec, PromptsSpec, RolloutsSpec
from aegpo.errors import AegpoError, ContractError
from aegpo.method.allocators import EntropyAllocator, KnapsackAllocator, RandomAllocator
from aegpo.method.costs import Range, cost
from aegpo.method.objectives import ClippedObjective
from aegpo.method.planning import LATE, made_up_signals, plan_step, problems
from aegpo.method.selectors import EntropyPeakSelector, RandomSelector, UniformSelector
from aegpo.method.signals import EntropySignal
from aegpo.method.trees import BranchingTree, IndependentTree

MODEL = GaussianSpec()
ROLLOUTS = RolloutsSpec(prompts_per_step=4, rollouts_per_step=48, denoising_steps=10)


def test_independent_rollouts_cost_leaves_times_steps():
    spent = cost(small_experiment(MODEL, rollouts=ROLLOUTS))
    assert spent.leaves == Range(48, 48)
    assert spent.forwards == Range(480, 480)
    assert spent.trained_edges == Range(48 * 9, 48 * 9)
    assert spent.work == Range(480 + 3 * 432, 480 + 3 * 432)
    assert spent.per_rollout == 10
    assert (spent.signals, spent.signals_base) == (0, 0)


def test_splits_at_fixed_steps_cost_what_the_tree_has_nodes():
    """16 leaves by four splits at the first steps of T = 10: 1 + 2 + 4 + 8 + 6 x 16 velocity evaluations a prompt."""
    experiment = small_experiment(
        MODEL,
        rollouts=RolloutsSpec(prompts_per_step=4, rollouts_per_step=64, denoising_steps=10),
        tree=BranchingTree(),
        selector=EntropyPeakSelector(top_k=4),
    )
    (falling, rising, *_) = (signals for signals in made_up_signals(experiment) if signals.step >= LATE)
    assert plan_step(experiment, falling).forwards == 4 * (1 + 2 + 4 + 8 + 6 * 16)
    assert plan_step(experiment, rising).forwards == 4 * (6 + 2 + 4 + 8 + 16)  # splits at steps 5 to 8
    spent = cost(experiment)
    assert (spent.forwards.low, spent.forwards.high) == (4 * 36, 4 * 111)
    assert spent.trained_edges == Range(4 * 30, 4 * 30)


def test_inner_epochs_and_a_kl_to_the_base_multiply_the_updates():
    plain = cost(small_experiment(MODEL, rollouts=ROLLOUTS))
    twice = cost(small_experiment(MODEL, rollouts=ROLLOUTS, optimizer=OptimizerSpec(inner_epochs=2)))
    with_kl = cost(small_experiment(MODEL, rollouts=ROLLOUTS, objective=ClippedObjective(beta=0.1)))
    update = plain.work.low - plain.forwards.low
    assert twice.work.low == plain.forwards.low + 2 * update
    assert with_kl.work.low == plain.forwards.low + update * 4 // 3


def test_the_probe_costs_the_policy_in_every_step_and_the_base_once_a_prompt():
    experiment = small_experiment(
        MODEL, rollouts=ROLLOUTS, allocator=EntropyAllocator(), training_steps=10, prompts=PromptsSpec(train_count=16)
    )
    spent = cost(experiment)
    assert spent.signals == 4 * 10
    assert spent.signals_base == 16 * 10  # 40 prompts are drawn from 16
    assert spent.total_work(10).low == 10 * (spent.work.low + 40) + 160
    few = cost(experiment.model_copy(update={"training_steps": 2}))
    assert few.signals_base == 2 * 4 * 10  # 8 prompts are drawn, each once


PEAKS = {"tree": BranchingTree(), "selector": EntropyPeakSelector(top_k=4), "rollouts": ROLLOUTS}


def test_a_probe_of_fewer_steps_or_more_samples_costs_what_its_trajectories_do():
    def spent(**probe):
        experiment = small_experiment(MODEL, training_steps=10, signals={"entropy": EntropySignal(**probe)}, **PEAKS)
        return cost(experiment).signals, cost(experiment).signals_base

    assert spent() == (4 * 10, 8 * 10)  # of the policy in every step; of the base once for each of the 8 prompts
    assert spent(steps=(0, 1, 2, 5)) == (4 * 6, 8 * 6)
    assert spent(stride=3) == (4 * 4, 8 * 4)
    assert spent(samples=3) == (4 * 30, 8 * 30)
    # 8 prompts, 4 a step: each comes every second step, so a curve that holds for 4 steps is taken every fourth
    assert spent(refresh=4)[0] == pytest.approx(4 * 10 / 2, rel=0.25)
    assert spent(refresh=100) == (8 * 10 / 10, 8 * 10)


def test_a_base_on_the_policys_latents_costs_as_often_as_the_policy_is_measured():
    def spent(**probe):
        entropy = EntropySignal(base_on="policy", **probe)
        return cost(small_experiment(MODEL, training_steps=10, signals={"entropy": entropy}, **PEAKS))

    every = spent()
    assert (every.signals, every.signals_again, every.signals_base) == (4 * 10, 4 * 10, 0)
    assert every.total_work(10).low == 10 * (every.work.low + 2 * 40)
    some = spent(steps=(0, 1, 2, 5), samples=2)
    assert (some.signals, some.signals_again) == (4 * 2 * 6, 4 * 2 * 4)
    assert spent(refresh=100).signals_again == 8 * 10 / 10


def test_trees_that_start_from_the_probe_cost_less_by_their_trunks():
    def forwards(**probe):
        return cost(small_experiment(MODEL, signals={"entropy": EntropySignal(**probe)}, **PEAKS)).forwards

    own, shared = forwards(), forwards(source="rollout")
    assert (own.low - shared.low, own.high - shared.high) == (4 * 6, 4 * 1)  # splits from step 5, and from step 0
    assert forwards(source="rollout", steps=(0, 1, 2, 3)).high == own.high - 4
    held = forwards(source="rollout", refresh=3)
    assert (held.low, held.high) == (shared.low, own.high)


def test_the_made_up_signals_are_in_and_after_every_warm_up_and_have_unequal_deltas():
    experiment = small_experiment(MODEL, rollouts=ROLLOUTS, allocator=EntropyAllocator(warmup=1000))
    seen = set()
    for known in made_up_signals(experiment):
        assert len(set(known.by_prompt("entropy-delta"))) == 4
        counts = experiment.allocator.allocate(known, 48, np.random.default_rng(0))
        assert sorted(counts) == ([8, 8, 16, 16] if known.step >= LATE else [12, 12, 12, 12])
        seen.add(known.step >= LATE)
    assert seen == {True, False}


def test_a_warm_up_step_is_part_of_the_range():
    """With 3 splits 12 leaves need two trees, 8 and 16 need one and two: warm-up costs what no later step does."""
    parts = {"tree": BranchingTree(), "selector": EntropyPeakSelector(top_k=3), "rollouts": ROLLOUTS}
    split = cost(small_experiment(MODEL, allocator=EntropyAllocator(), **parts))
    uniform = cost(small_experiment(MODEL, **parts))
    assert split.forwards.high == uniform.forwards.high  # two trees for each prompt, and splits at the first steps


def test_beside_signals_that_are_measured_rewards_are_unknown_at_first_and_then_within_0_and_1():
    twelve = RolloutsSpec(prompts_per_step=12, rollouts_per_step=48, denoising_steps=4)
    parts = {"selector": EntropyPeakSelector(top_k=2), "tree": BranchingTree(), "rollouts": twelve}
    parts["prompts"] = PromptsSpec(train_count=12, evaluation_count=2)
    experiment = small_experiment(MODEL, allocator=KnapsackAllocator(low=2, high=9), **parts)
    for known in made_up_signals(experiment):
        values = known.by_prompt("reward-mean")
        assert np.isnan(values).all() if known.step < LATE else ((values >= 0) & (values <= 1)).all()
        assert len(set(known.by_step("entropy")[:, 0])) == 12
    assert not list(problems(experiment))
    edges, equal = cost(experiment).trained_edges, cost(small_experiment(MODEL, **parts)).trained_edges
    assert edges.low == equal.low == equal.high < edges.high  # the first step gives every prompt the same


def test_an_arm_that_draws_at_random_is_planned_many_times():
    parts = {"tree": BranchingTree(), "selector": RandomSelector(), "rollouts": ROLLOUTS}
    experiment = small_experiment(MODEL, allocator=RandomAllocator(), **parts)
    assert len(list(made_up_signals(experiment))) > 20
    assert cost(experiment).forwards.low < cost(experiment).forwards.high


def test_nothing_is_made_up_that_no_part_reads():
    assert all(signals.known == {} for signals in made_up_signals(small_experiment(MODEL)))


@pytest.mark.parametrize("allocator", [RandomAllocator(), EntropyAllocator()])
@pytest.mark.parametrize("selector", [UniformSelector(), EntropyPeakSelector()])
@pytest.mark.parametrize("tree", [IndependentTree(), IndependentTree(start="shared"), BranchingTree()])
def test_the_range_holds_the_plan_of_any_entropies(allocator, selector, tree):
    experiment = small_experiment(MODEL, rollouts=ROLLOUTS, allocator=allocator, selector=selector, tree=tree)
    spent = cost(experiment)
    rng = np.random.default_rng(1)
    for step in range(20):
        entropy = rng.random((4, 10))
        plan = plan_step(experiment, signals(step + 2, 4, 10, entropy=entropy, entropy_delta=rng.random(4)))
        assert plan.num_rollouts == spent.leaves.low == spent.leaves.high == 48
        assert spent.trained_edges.low <= plan.trained_edges <= spent.trained_edges.high
        if selector.reads:
            assert spent.forwards.low <= plan.forwards <= spent.forwards.high


class Wasteful(AllocatorSpec):
    """One rollout too many."""

    kind: str = "wasteful"

    def allocate(self, signals, budget, rng):
        return np.full(signals.num_prompts, budget // signals.num_prompts + 1, dtype=np.int64)


def test_a_part_that_breaks_its_contract_is_found_before_anything_runs():
    experiment = small_experiment(MODEL, allocator=Wasteful())
    with pytest.raises(ContractError, match=r"^allocator 'wasteful' returned 10 rollouts for a budget of 8$"):
        cost(experiment)


def test_a_file_of_prompts_that_is_missing_or_too_short_is_found(tmp_path):
    with pytest.raises(AegpoError, match="cannot read"):
        cost(small_experiment(MODEL, prompts=PromptsSpec(train=tmp_path / "nope.txt")))
    (tmp_path / "one.txt").write_text("0.5\n")
    with pytest.raises(AegpoError, match="1 training prompts are fewer than the 2 of a step"):
        cost(small_experiment(MODEL, prompts=PromptsSpec(train=tmp_path / "one.txt")))


def test_a_range_is_printed_as_one_number_where_its_ends_agree():
    assert str(Range(1234, 1234)) == "1,234"
    assert str(Range(1000, 2000)) == "1,000-2,000"
    assert Range(2, 3).times(5) == Range(10, 15)
