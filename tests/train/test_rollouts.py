"""Executing a plan: the same trajectories as one by one, for exactly the forwards the plan promised."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from worlds import GaussianSpec, asked, execution, plan_of

from aegpo.core.records import Gaussian
from aegpo.core.steps import passing
from aegpo.method.merging import with_merged
from aegpo.method.samplers import FlowSde, euler, gaussian_log_prob
from aegpo.method.trees import BranchingTree, IndependentTree
from aegpo.train.noise import StepNoise
from aegpo.train.rollouts import roll_out, sample_deterministic

PROMPTS = {"gaussian": ["0.5", "-0.5"], "tiny": ["a red circle", "two blue squares and a green triangle"]}
PLANS = {
    "independent": plan_of(IndependentTree(), [3, 5], [[1, 1, 1, 0], [1, 1, 1, 0]]),
    "shared start": plan_of(IndependentTree(start="shared"), [3, 5], [[0, 1, 0, 0], [0, 0, 1, 0]]),
    "branching": plan_of(BranchingTree(), [4, 6], [[1, 0, 1, 0], [1, 1, 1, 0]]),
    "branching, noisy elsewhere": plan_of(BranchingTree(noise="all"), [4, 3], [[0, 1, 1, 0], [1, 0, 0, 1]]),
    "wider splits": plan_of(BranchingTree(noise="all", split_noise=2), [4, 3], [[0, 1, 1, 0], [1, 0, 0, 1]]),
    "joined steps": with_merged(
        plan_of(BranchingTree(split_noise=1.5), [4, 6], [[1, 0, 1, 0], [1, 1, 1, 0]]),
        np.array([[2, 2, 3, 4], [1, 4, 4, 4]]),
    ),
}


@pytest.fixture
def models(tiny_model):
    return {"gaussian": GaussianSpec().build(torch.device("cpu")), "tiny": tiny_model}


def one_by_one(how, plan, cond, seed: int) -> torch.Tensor:
    """Every rollout on its own from root to leaf, with the noise of its nodes."""
    drawn, shape = StepNoise(seed), how.model.latent_shape
    noise = [drawn.start(np.arange(len(plan.prompt[0])), shape)]
    for level, noisy in enumerate(plan.noisy):
        found = torch.zeros((len(noisy), *shape))
        if noisy.any():
            found[torch.from_numpy(noisy)] = drawn.level(level, np.flatnonzero(noisy), shape)
        noise.append(found)
    finals = []
    for leaf in range(plan.num_rollouts):
        path = [leaf]
        for parent in reversed(plan.parent):
            path.append(int(parent[path[-1]]))
        path.reverse()
        latents = noise[0][path[0]][None]
        prompt = cond.select(torch.from_numpy(plan.group[leaf : leaf + 1]))
        reached = 0
        for level, node in enumerate(path[1:]):
            if reached > level:
                continue
            reached = level + 1 if plan.until is None else int(plan.until[level][node])
            step = (how.sigmas[level : level + 1], how.sigmas[reached : reached + 1])
            scale = () if plan.scale is None else (torch.from_numpy(plan.scale[level][node : node + 1]),)
            with torch.no_grad():
                velocity = how.velocity(latents, step[0], prompt)
            if plan.noisy[level][node]:
                gaussian = how.sampler.transition(latents, velocity, *step, *scale)
                latents = gaussian.mean + gaussian.std.view(-1, 1, 1, 1) * noise[level + 1][node]
            else:
                latents = euler(latents, velocity, *step)
        finals.append(latents)
    return torch.cat(finals)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("which", ["gaussian", "tiny"])
def test_an_executed_plan_is_its_rollouts_sampled_one_by_one(models, which, plan):
    how = execution(models[which], plan.num_steps)
    cond = how.model.encode(asked(PROMPTS[which]))
    rollouts = roll_out(how, plan, cond, StepNoise(3))
    expected = one_by_one(how, plan, cond, seed=3)
    if which == "gaussian":  # element by element, so batching cannot change a bit
        assert torch.equal(rollouts.latents, expected)
    torch.testing.assert_close(rollouts.latents, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(rollouts.images, how.model.decode(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_plan_costs_exactly_its_forwards_in_batches_no_larger_than_asked(models, plan, micro_batch):
    how = execution(models["gaussian"], plan.num_steps, micro_batch=micro_batch)
    sizes: list[int] = []

    def counted(latents, sigma, cond):
        sizes.append(len(latents))
        assert len(sigma) == len(cond.text) == len(latents)
        return how.velocity(latents, sigma, cond)

    cond = how.model.encode(asked(PROMPTS["gaussian"]))
    counting = dataclasses.replace(how, velocity=counted)
    found = roll_out(counting, plan, cond, StepNoise(0))
    assert sum(sizes) == plan.forwards
    assert max(sizes) <= micro_batch
    whole = roll_out(how, plan, cond, StepNoise(0))
    assert torch.equal(found.latents, whole.latents)


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_images_are_shown_in_order_and_nothing_is_evaluated_before_its_turn(models, plan, micro_batch):
    how = execution(models["gaussian"], plan.num_steps, micro_batch=micro_batch)
    evaluated: list[int] = []
    shown: list[torch.Tensor] = []
    before: list[int] = []  # nodes that were evaluated when images were shown

    def counted(latents, sigma, cond):
        evaluated.append(len(latents))
        return how.velocity(latents, sigma, cond)

    def show(images):
        shown.append(images)
        before.append(sum(evaluated))

    counting = dataclasses.replace(how, velocity=counted)
    cond = how.model.encode(asked(PROMPTS["gaussian"]))
    found = roll_out(counting, plan, cond, StepNoise(3), show=show)
    assert torch.equal(torch.cat(shown), found.images)
    assert torch.equal(found.latents, one_by_one(how, plan, cond, seed=3))
    assert [len(images) for images in shown[:-1]] == [micro_batch] * (len(shown) - 1)
    for images, count in zip(np.cumsum([len(images) for images in shown]), before, strict=True):
        assert count == needed(plan, int(images), micro_batch)


def needed(plan, leaves: int, micro_batch: int) -> int:
    """Evaluations that the first leaves take when each level goes through the network in whole micro-batches."""
    count, total = leaves, 0
    for through, parent in zip(reversed(passing(plan)), reversed(plan.parent), strict=True):
        count = min(-(-(int(parent[count - 1]) + 1) // micro_batch) * micro_batch, len(through))
        total += int((~through[:count]).sum())
    return total


@pytest.mark.parametrize("which", ["gaussian", "tiny"])
def test_deterministic_images_are_shown_as_soon_as_they_are_painted(models, which):
    how = execution(models[which], 3, micro_batch=2)
    cond = how.model.encode(asked(PROMPTS[which])).select(torch.tensor([0, 1, 0, 1, 1]))
    noise = torch.randn((5, *how.model.latent_shape), generator=torch.Generator().manual_seed(0))
    shown: list[torch.Tensor] = []
    images = sample_deterministic(how, noise, cond, shown.append)
    assert [len(each) for each in shown] == [2, 2, 1]
    assert torch.equal(torch.cat(shown), images)


@pytest.mark.parametrize("which", ["gaussian", "tiny"])
def test_noisy_steps_at_noise_level_zero_give_the_deterministic_images(models, which):
    plan = PLANS["independent"]
    how = execution(models[which], plan.num_steps, FlowSde(noise_level=0.0))
    cond = how.model.encode(asked(PROMPTS[which]))
    rollouts = roll_out(how, plan, cond, StepNoise(5))
    start = StepNoise(5).start(np.arange(8), how.model.latent_shape)
    images = sample_deterministic(how, start, cond.select(torch.from_numpy(plan.group)))
    assert torch.equal(rollouts.images, images)


@pytest.mark.parametrize("micro_batch", [2, 64])
def test_edges_are_the_trained_transitions_in_the_order_of_levels_and_nodes(models, micro_batch):
    plan = PLANS["branching, noisy elsewhere"]
    how = execution(models["gaussian"], plan.num_steps, micro_batch=micro_batch)
    edges = roll_out(how, plan, how.model.encode(asked(PROMPTS["gaussian"])), StepNoise(0)).edges
    chosen = [(level, child) for level in range(4) for child in np.flatnonzero(plan.trained[level])]
    assert len(edges) == plan.trained_edges == len(chosen)
    assert edges.level.tolist() == [level for level, _ in chosen]
    assert edges.prompt.tolist() == [plan.prompt[level + 1][child] for level, child in chosen]
    assert edges.rollout.tolist() == [plan.first_leaf[level + 1][child] for level, child in chosen]
    assert edges.leaves.tolist() == [plan.leaves[level + 1][child] for level, child in chosen]


def test_siblings_share_their_parent_state_and_differ_after_it(models):
    plan = PLANS["branching"]
    how = execution(models["gaussian"], plan.num_steps)
    edges = roll_out(how, plan, how.model.encode(asked(PROMPTS["gaussian"])), StepNoise(0)).edges
    first = (edges.level == 0) & (edges.prompt == 0)
    assert int(first.sum()) == 2
    assert torch.equal(*edges.latents[first])
    assert not torch.equal(*edges.next_latents[first])


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["gaussian", "tiny"])
def test_log_probabilities_are_those_of_the_stored_value(models, which, storage):
    plan = PLANS["independent"]
    how = execution(models[which], plan.num_steps, storage=storage)
    cond = how.model.encode(asked(PROMPTS[which]))
    rollouts = roll_out(how, plan, cond, StepNoise(1))
    edges = rollouts.edges
    assert edges.latents.dtype == edges.next_latents.dtype == rollouts.latents.dtype == storage
    assert edges.log_prob.dtype == torch.float32
    for level in range(3):  # replayed in the batches they were sampled in
        rows = edges.level == level
        latents, sigma = edges.latents[rows].float(), how.sigmas[level].expand(8)
        with torch.no_grad():
            velocity = how.velocity(latents, sigma, cond.select(edges.prompt[rows]))
        gaussian = how.sampler.transition(latents, velocity, sigma, how.sigmas[level + 1].expand(8))
        replayed = gaussian_log_prob(gaussian, edges.next_latents[rows].float())
        assert torch.equal(replayed, edges.log_prob[rows])
        assert torch.equal(replayed, rollouts.log_prob[level])


def test_deterministic_steps_have_a_log_probability_of_zero(models):
    plan = PLANS["shared start"]
    how = execution(models["gaussian"], plan.num_steps)
    rollouts = roll_out(how, plan, how.model.encode(asked(PROMPTS["gaussian"])), StepNoise(0))
    for level, log_prob in enumerate(rollouts.log_prob):
        assert log_prob.shape == (len(plan.parent[level]),)
        assert ((log_prob != 0) == torch.from_numpy(plan.noisy[level])).all()


def test_the_same_generator_gives_the_same_rollouts_and_another_gives_others(models):
    plan = PLANS["branching"]
    how = execution(models["tiny"], plan.num_steps)
    cond = how.model.encode(asked(PROMPTS["tiny"]))
    one, same, other = (roll_out(how, plan, cond, StepNoise(seed)).images for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_stored_states_are_not_rounded_twice(models):
    # What is stored is the cast of mean + std noise, computed in float32 from the stored parent.
    plan = plan_of(IndependentTree(), [4], [[1, 0]])
    how = execution(models["gaussian"], 2, storage=torch.bfloat16)
    cond = how.model.encode(asked(["0.5"]))
    edges = roll_out(how, plan, cond, StepNoise(0)).edges
    drawn, shape = StepNoise(0), how.model.latent_shape
    start, noise = drawn.start(np.arange(4), shape), drawn.level(0, np.arange(4), shape)
    stored = start.to(torch.bfloat16)
    sigma, sigma_next = how.sigmas[0].expand(4), how.sigmas[1].expand(4)
    with torch.no_grad():
        velocity = how.velocity(stored.float(), sigma, cond.select(torch.zeros(4, dtype=torch.int64)))
    gaussian: Gaussian = how.sampler.transition(stored.float(), velocity, sigma, sigma_next)
    expected = (gaussian.mean + gaussian.std.view(-1, 1, 1, 1) * noise).to(torch.bfloat16)
    assert torch.equal(edges.latents, stored)
    assert torch.equal(edges.next_latents, expected)


def test_roots_that_share_start_noise_start_alike_and_part_at_their_first_noisy_step(models):
    plan = dataclasses.replace(plan_of(IndependentTree(), [2, 3], [[0, 1, 1, 0]] * 2), start=np.array([0, 0, 1, 0, 1]))
    how = execution(models["gaussian"], 4)
    cond = how.model.encode(asked(["0.5", "0.5"]))
    rollouts = roll_out(how, plan, cond, StepNoise(4))
    first = rollouts.edges.latents[rollouts.edges.level == 1]  # after one deterministic step
    start = StepNoise(4).start(plan.start, how.model.latent_shape)
    with torch.no_grad():
        velocity = how.velocity(start, how.sigmas[:1].expand(5), cond.select(torch.from_numpy(plan.group)))
    torch.testing.assert_close(first, start + (how.sigmas[1] - how.sigmas[0]) * velocity)
    second = rollouts.edges.latents[rollouts.edges.level == 2]
    assert len({tuple(latents.flatten().tolist()) for latents in second}) == 5


def test_one_start_noise_for_the_whole_batch_is_the_first_roots_and_moves_no_other_noise(models):
    plan = plan_of(IndependentTree(), [2, 3], [[0, 0, 1, 0]] * 2)
    how, cond = (
        execution(models["gaussian"], 4, FlowSde(noise_level=0.9)),
        models["gaussian"].encode(asked(["0.5", "0.1"])),
    )
    shared = dataclasses.replace(plan, start=np.zeros(5, dtype=np.int64))
    one, own = (roll_out(how, each, cond, StepNoise(4)) for each in (shared, plan))
    assert torch.equal(one.latents[0], own.latents[0])  # the first root's noise, and its own at the noisy step
    assert not torch.equal(one.latents[1], own.latents[1])


@pytest.mark.parametrize("name", PLANS)
def test_what_a_prompt_is_given_does_not_depend_on_the_order_in_which_nodes_are_reached(models, name):
    how = execution(models["gaussian"], PLANS[name].num_steps)
    cond = how.model.encode(asked(PROMPTS["gaussian"]))
    whole = roll_out(how, PLANS[name], cond, StepNoise(0, step=3))
    parts = roll_out(dataclasses.replace(how, micro_batch=1), PLANS[name], cond, StepNoise(0, step=3))
    torch.testing.assert_close(whole.latents, parts.latents, atol=1e-5, rtol=1e-5)
    other = roll_out(how, PLANS[name], cond, StepNoise(0, step=4))
    assert not torch.allclose(whole.latents, other.latents)
