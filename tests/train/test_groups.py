"""Objectives that compare the rollouts of a prompt: groups stay whole, in micro-batches and in optimizer steps."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine import assert_same_report, assert_same_weights, build, run
from test_forward_learning import quiet
from test_learning import BRANCHED, NO_CHANGE, UNEQUAL, assert_all_close, gradients, sampled
from worlds import GaussianSpec, asked, execution, learner, plan_of, recorded_gradients, small_experiment

from aegpo.core.records import Renoised, Scores, Update
from aegpo.core.sections import CheckpointSpec, OptimizerSpec, PolicySpec, RolloutsSpec
from aegpo.method.advantages import GroupAdvantage
from aegpo.method.allocators import RandomAllocator
from aegpo.method.dealing import deal
from aegpo.method.objectives import ClippedObjective, MatchingObjective, PreferenceObjective
from aegpo.method.selectors import RandomSelector
from aegpo.method.trees import IndependentTree
from aegpo.rewards.palette import PaletteReward
from aegpo.train.micro_batches import micro_batches
from aegpo.train.noise import StepNoise
from aegpo.train.replay import noise_again
from aegpo.train.rollouts import roll_out

CPU = torch.device("cpu")
THREE = quiet(plan_of(IndependentTree(), [2, 5, 3], [[1, 1, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0]]))
MILD = PreferenceObjective(sharpness=1.0)


@pytest.fixture
def how():
    return execution(GaussianSpec().build(CPU), 4)


def three_prompts(how, seed: int = 0):
    """Rollouts of `THREE`, with credit that sums to 0 in each prompt."""
    cond = how.model.encode(asked(["0.5", "-0.5", "0.1"]))
    rollouts = roll_out(how, THREE, cond, StepNoise(seed))
    scores = rollouts.images.mean(dim=(1, 2, 3))[:, None]
    return rollouts, GroupAdvantage().estimate(Scores(scores), torch.ones(1), rollouts), cond


class Watching(PreferenceObjective):
    """DGPO that notes the groups it is shown."""

    kind: Literal["watching"] = "watching"
    seen: ClassVar[list[Renoised]] = []

    def loss(self, update: Renoised):
        self.seen.append(update)
        return super().loss(update)


@pytest.fixture
def watching():
    Watching.seen.clear()
    return Watching(velocity_penalty=0.0)


# --- what a group is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [THREE, UNEQUAL, BRANCHED], ids=["three", "unequal", "branched"])
def test_a_group_is_the_trained_edges_of_a_prompt_at_a_denoising_step(how, plan):
    edges = (three_prompts(how) if plan is THREE else sampled(how, plan))[0].edges
    places = list(zip(edges.level.tolist(), edges.prompt.tolist(), strict=True))
    numbers = {place: number for number, place in enumerate(sorted(set(places)))}
    assert edges.group.tolist() == [numbers[place] for place in places]


def test_rollouts_that_share_their_noise_differ_in_nothing_but_their_clean_latents(how):
    rollouts, _, _ = three_prompts(how)
    edges = noise_again(how, rollouts, StepNoise(7), shared=True)
    sigma = how.sigmas[edges.level].view(-1, 1, 1, 1)
    noise = (edges.latents - (1 - sigma) * edges.next_latents) / sigma
    firsts = torch.stack([noise[edges.group == number][0] for number in range(7)])
    torch.testing.assert_close(noise, firsts[edges.group])
    assert len(firsts.flatten(1).unique(dim=0)) == 7  # a noise for each group
    places = [(int(edges.level[edges.group == n][0]), int(edges.prompt[edges.group == n][0])) for n in range(7)]
    levels, prompts = (np.array(each) for each in zip(*places, strict=True))
    torch.testing.assert_close(firsts, StepNoise(7).again(levels, prompts, how.model.latent_shape))


@pytest.mark.parametrize("noise", ["own", "group"])
def test_the_objective_chooses_whether_the_noise_is_shared(how, noise, watching):
    trained = learner(how, watching.model_copy(update={"noise": noise}))
    trained.update(*three_prompts(how), np.random.default_rng(0), StepNoise(0))
    (seen,) = Watching.seen
    added = (seen.latents - (1 - seen.sigma.view(-1, 1, 1, 1)) * seen.clean) / seen.sigma.view(-1, 1, 1, 1)
    for number in seen.group.unique():
        rows = added[seen.group == number]
        assert torch.allclose(rows, rows[:1].expand_as(rows), atol=1e-5) == (noise == "group")


# --- micro-batches ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.integers(1, 20), st.randoms(use_true_random=False))
def test_batches_of_whole_groups_are_as_large_as_fit(numbers, most, random):
    group = torch.tensor(numbers)
    rows = torch.tensor(sorted(random.sample(range(len(numbers)), random.randint(1, len(numbers)))))
    found = micro_batches(np.arange(len(numbers)), rows.numpy(), most, CPU, group.numpy())
    batches = [each.rows for each in found]
    assert sorted(torch.cat(batches).tolist()) == sorted(rows.tolist())
    inside = [set(group[batch].tolist()) for batch in batches]
    assert all(inside)
    assert sum(len(each) for each in inside) == len(set().union(*inside))  # no group is in two of them
    assert all(len(batch) <= most or len(each) == 1 for batch, each in zip(batches, inside, strict=True))
    for before, after in pairwise(batches):
        assert len(before) + int((group[after] == group[after][0]).sum()) > most


@pytest.mark.parametrize("micro_batch", [1, 5, 7, 64])
def test_the_objective_sees_every_group_whole_whatever_the_micro_batch(how, micro_batch, watching):
    batch = three_prompts(how)
    learner(how, watching, micro_batch=micro_batch).update(*batch, np.random.default_rng(0), StepNoise(0))
    sizes = torch.bincount(batch[0].edges.group)
    for seen in Watching.seen:
        own = torch.bincount(seen.group, minlength=len(sizes))
        assert torch.equal(own[own > 0], sizes[own > 0])
    assert len(Watching.seen) == {1: 7, 5: 6, 7: 4, 64: 1}[micro_batch]  # groups of 2, 5, 2, 3, 2, 5 and 3


@pytest.mark.parametrize("micro_batch", [1, 7])
def test_one_group_at_a_time_has_the_gradient_of_all_at_once(how, micro_batch):
    batch = three_prompts(how)
    with torch.no_grad():
        how.model.policy.mean.zero_()
    (whole,) = gradients(how, batch, MILD, micro_batch=64)
    (parts,) = gradients(how, batch, MILD, micro_batch=micro_batch)
    largest = max(float(gradient.abs().max()) for gradient in whole)
    assert largest > 0
    assert_all_close(parts, whole, atol=1e-6 * max(1.0, largest), rtol=1e-4)


def test_objectives_of_the_reverse_process_see_their_groups_too(how):
    class Comparing(ClippedObjective):
        """Whose loss is a group's mean."""

        kind: Literal["comparing"] = "comparing"
        scope: ClassVar[Literal["rows", "groups"]] = "groups"

        def loss(self, update: Update):
            loss, metrics = super().loss(update)
            sizes.append(torch.bincount(update.group).tolist())
            return torch.stack([loss[update.group == number].mean() for number in update.group]), metrics

    sizes: list[list[int]] = []
    rollouts, credit, cond = sampled(how, UNEQUAL)
    learner(how, Comparing(), micro_batch=2).update(rollouts, credit, cond, np.random.default_rng(0), StepNoise(0))
    assert sizes == [[0] * number + [size] for number, size in enumerate([3, 5] * 3)]


@pytest.mark.parametrize(("objective", "left"), [(MILD, 16 + 3), (MatchingObjective(), 16 + 1)])
def test_only_whole_groups_without_credit_are_left_out_where_groups_are_compared(how, objective, left):
    """Prompt 2 has no credit at its first level, and one of three edges has some at its second."""
    rollouts, credit, cond = three_prompts(how)
    edges = rollouts.edges
    credit[edges.prompt == 2] = 0
    credit[((edges.prompt == 2) & (edges.level == 2)).nonzero()[0]] = 1.0
    trained = learner(how, objective, drop_zero_credit=True)
    assert trained.update(rollouts, credit, cond, np.random.default_rng(0), StepNoise(0))["updated_edges"] == left


# --- optimizer steps -------------------------------------------------------------------------------------------------


def dealt(counts, seed: int = 0, **optimizer):
    group = np.repeat(np.arange(len(counts)), counts)
    return deal(group, OptimizerSpec(**optimizer), np.random.default_rng(seed)), group


def test_rollouts_are_dealt_as_ever():
    parts, _ = dealt([3, 5, 4], rollouts_per_update=4)
    expected = np.split(np.random.default_rng(0).permutation(12), 3)
    assert all(np.array_equal(part, wanted) for part, wanted in zip(parts, expected, strict=True))
    assert [len(part) for part in dealt([3, 5, 4])[0]] == [12]


@given(st.lists(st.integers(2, 12), min_size=1, max_size=12), st.integers(1, 144), st.integers(0, 99))
def test_whole_prompts_are_dealt_as_equally_as_their_counts_allow(counts, size, seed):
    total = sum(counts)
    parts, group = dealt(counts, seed, rollouts_per_update=min(size, total), deal="prompts")
    assert sorted(np.concatenate(parts).tolist()) == list(range(total))
    prompts = [set(group[part].tolist()) for part in parts]
    assert sum(len(each) for each in prompts) == len(counts)  # none is in two of them
    assert len(parts) == min(-(-total // min(size, total)), len(counts))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= max(counts)
    if len(set(counts)) == 1:
        assert max(sizes) - min(sizes) <= counts[0]
    again, _ = dealt(counts, seed, rollouts_per_update=min(size, total), deal="prompts")
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


def test_prompts_of_eight_and_sixteen_rollouts_make_equal_steps():
    parts, _ = dealt([16, 8, 8, 16], rollouts_per_update=24, deal="prompts")
    assert [len(part) for part in parts] == [24, 24]
    firsts = {tuple(dealt([8] * 4, seed, rollouts_per_update=16, deal="prompts")[0][0].tolist()) for seed in range(20)}
    assert len(firsts) > 3  # which prompts come together is drawn anew


def test_the_gradients_of_steps_with_whole_prompts_average_to_the_whole_gradient(how):
    batch = three_prompts(how)
    (whole,) = gradients(how, batch, MILD)
    parts = gradients(how, batch, MILD, rollouts_per_update=5, deal="prompts")
    assert len(parts) == 2
    averages = [torch.stack(gradient).mean(dim=0) for gradient in zip(*parts, strict=True)]
    largest = max(float(gradient.abs().max()) for gradient in whole)
    assert_all_close(averages, whole, atol=2e-6 * max(1.0, largest), rtol=1e-4)


def test_the_gradient_of_an_update_is_that_of_the_weighted_group_losses(how):
    """At the base policy s = 0: each row pulls with sigmoid(0) A times its squared error, over the group's mean."""
    rollouts, credit, cond = three_prompts(how)
    edges = noise_again(how, rollouts, StepNoise(3), shared=True)
    sigma = how.sigmas[edges.level]
    velocity = how.model.velocity(edges.latents, sigma, cond.select(edges.prompt))
    target = (edges.latents - edges.next_latents) / sigma.view(-1, 1, 1, 1)
    error = (velocity - target).square().flatten(1).mean(dim=1)
    weight = 1 / torch.bincount(edges.prompt)[edges.prompt] / 3  # each prompt the same
    (expected,) = torch.autograd.grad((weight * 0.5 * credit * error).sum(), how.model.policy.mean)
    trained = learner(how, PreferenceObjective(), **NO_CHANGE)
    with recorded_gradients() as seen:
        metrics = trained.update(rollouts, credit, cond, np.random.default_rng(3), StepNoise(3))
    torch.testing.assert_close(seen[0][0], expected, atol=1e-6, rtol=1e-4)
    assert metrics["preference"] == pytest.approx(0.5, abs=1e-6)


# --- whole runs ------------------------------------------------------------------------------------------------------


def preferring(model, **changes):
    """DGPO with deterministic rollouts and two optimizer steps of whole prompts."""
    arm = {
        "rollouts": RolloutsSpec(prompts_per_step=3, rollouts_per_step=12, denoising_steps=4),
        "tree": IndependentTree(noise="none"),
        "selector": RandomSelector(top_k=2, last=True),
        "objective": PreferenceObjective(),
        "optimizer": OptimizerSpec(learning_rate=0.01, rollouts_per_update=6, deal="prompts"),
        "checkpoint": CheckpointSpec(every=1),
        "training_steps": 3,
    }
    return small_experiment(model, **(arm | changes))


def test_dgpo_trains_on_the_embedded_world_in_two_steps_of_whole_prompts(tiny_spec):
    experiment = preferring(tiny_spec, rewards=(PaletteReward(),))
    assert list(experiment.problems()) == []
    engine, _ = build(experiment)
    first, second = engine.step(1).metrics, engine.step(2).metrics
    assert engine.learner.updates == 2 * 2
    assert first["updated_edges"] == first["trained_edges"] == 12 * 2
    assert first["work"] == 12 * 4 + 5 * 12 * 2
    assert first["grad_norm"] > 0
    assert 0 < second["preference"] < 1
    assert second["velocity_kl"] > 0


@pytest.mark.parametrize("policy", [PolicySpec(), PolicySpec(train="lora", rank=2, alpha=4)], ids=["full", "lora"])
def test_a_resumed_dgpo_run_is_the_run_that_never_stopped(tiny_spec, tmp_path, policy):
    counts = RandomAllocator(low=2, high=4)  # unequal, so that the steps are
    rollouts = RolloutsSpec(prompts_per_step=2, rollouts_per_step=6, denoising_steps=4)
    optimizer = OptimizerSpec(learning_rate=0.003, rollouts_per_update=3, deal="prompts", micro_batch=3)
    arm = {"policy": policy, "allocator": counts, "rollouts": rollouts, "optimizer": optimizer}
    experiment = preferring(tiny_spec, rewards=(PaletteReward(),), **arm)
    whole, recorded, outcome = run(experiment, tmp_path / "whole")
    assert outcome == "finished"
    assert {tuple(sorted(report.counts)) for report in recorded.reports} == {(2, 4)}
    assert whole.learner.updates == 3 * 2
    run(experiment, tmp_path / "parts", stop_after=2)
    resumed, parts, outcome = run(experiment, tmp_path / "parts")
    assert outcome == "finished"
    assert_same_weights(whole, resumed)
    assert_same_report(recorded.reports[-1], parts.reports[-1])


def test_dgpo_makes_what_was_credited_likelier(how):
    plan = quiet(plan_of(IndependentTree(), [8, 8], [[1, 1, 1, 0]] * 2))
    trained = learner(how, PreferenceObjective(), learning_rate=0.003)
    for seed in range(20):
        trained.update(*sampled(how, plan, seed=seed), np.random.default_rng(seed), StepNoise(seed))
        trained.end_step(seed + 1)
    assert float(how.model.policy.mean.detach().mean()) > 0.01  # brighter, which is what is rewarded


# --- what `aegpo check` says -----------------------------------------------------------------------------------------


def said(**changes) -> list[tuple[tuple[str | int, ...], str, bool]]:
    found = preferring(GaussianSpec(), **changes).problems()
    return [(problem.location, problem.message, problem.warning) for problem in found]


def test_groups_that_would_be_dealt_apart_are_refused_with_the_line_to_write():
    assert said(optimizer=OptimizerSpec(rollouts_per_update=6)) == [
        (
            ("optimizer", "deal"),
            "objective 'dgpo' compares the rollouts of a prompt, which 'rollouts' deals to 2 optimizer steps; write "
            "'deal: prompts', or leave 'rollouts_per_update' out",
            False,
        )
    ]
    assert said(optimizer=OptimizerSpec()) == []
    assert said(optimizer=OptimizerSpec(rollouts_per_update=6), objective=MatchingObjective()) == []


def test_more_optimizer_steps_than_prompts_are_refused_with_what_there_is_enough_for():
    assert said(optimizer=OptimizerSpec(rollouts_per_update=3, deal="prompts")) == [
        (
            ("optimizer", "rollouts_per_update"),
            "3 makes 4 optimizer steps, but only 3 prompts are dealt to them; the least that leaves none without: 4",
            False,
        )
    ]


def test_dealing_prompts_to_a_single_step_is_said_to_have_no_effect():
    message = "has no effect: all prompts make one optimizer step; remove it, or name 'rollouts_per_update'"
    assert said(optimizer=OptimizerSpec(deal="prompts")) == [(("optimizer", "deal"), message, True)]


def test_a_group_larger_than_a_micro_batch_is_said_to_be_taken_whole():
    small = OptimizerSpec(micro_batch=3)
    assert said(optimizer=small) == [
        (
            ("optimizer", "micro_batch"),
            "3 is less than the 4 rollouts of a prompt, on average, which objective 'dgpo' compares at each denoising "
            "step and so takes together all the same",
            True,
        )
    ]
    assert said(optimizer=small, objective=MatchingObjective()) == []
