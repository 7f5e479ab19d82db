"""DGPO's loss of whole groups, against a case worked out by hand and two restatements of what is published."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import GaussianSpec, plan_of, small_experiment

from aegpo.core.records import Renoised
from aegpo.method.costs import gradient_rows_of, update_work
from aegpo.method.objectives import PreferenceObjective
from aegpo.method.objectives.clipped import fitting_clip
from aegpo.method.trees import IndependentTree
from aegpo.testing import check_objective


def by_hand(sharpness: float, **changes) -> tuple[Renoised, PreferenceObjective]:
    """Two rollouts of two dimensions, [1, -1] and [0, 0], under the noise [0, 2] at sigma 0.5."""

    def rows(*values):
        return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 2)

    clean, noise = rows([1.0, -1.0], [0.0, 0.0]), rows([0.0, 2.0], [0.0, 2.0])
    velocity = rows([-1.0, 1.0], [1.0, 2.0]).requires_grad_()
    given = Renoised(
        advantage=torch.tensor([1.0, -1.0]),
        level=torch.zeros(2, dtype=torch.int64),
        sigma=torch.full((2,), 0.5),
        latents=0.5 * clean + 0.5 * noise,
        clean=clean,
        velocity=velocity,
        old_velocity=velocity.detach(),
        base_velocity=rows([-1.0, 2.0], [0.0, 4.0]),
        group=torch.tensor([7, 7]),
    )
    return given, PreferenceObjective(sharpness=sharpness, **{"velocity_penalty": 0.0} | changes)


def test_dgpo_on_a_case_worked_out_by_hand():
    """Targets noise - x0 are [-1, 3] and [0, 2].

    d = mean of [0, -2]^2 = 2 and of [1, 0]^2 = 0.5; d_base = mean of [0, -1]^2 = 0.5 and of [0, 2]^2 = 2.
    With b = 2: s = 2 / 2 (1 (2 - 0.5) - 1 (0.5 - 2)) = 3, and each row's loss is log(1 + e^3) / 2.
    Half of each row: the gradient is sigmoid(3) / 2 A (v - target), as d d / d v = v - target in two dimensions.
    """
    given, objective = by_hand(sharpness=2.0)
    loss, metrics = objective.loss(given)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(3)) / 2] * 2, rel=1e-6)
    assert metrics["preference"].tolist() == pytest.approx([1 / (1 + math.exp(3))] * 2, rel=1e-6)
    assert metrics["velocity_kl"].tolist() == pytest.approx([0.5, 2.5])
    (gradient,) = torch.autograd.grad(loss.mean(), given.velocity)
    likely = 1 / (1 + math.exp(-3)) / 2
    expected = torch.tensor([[0.0, -2.0 * likely], [-1.0 * likely, 0.0]])
    torch.testing.assert_close(gradient.view(2, 2), expected, atol=1e-6, rtol=0)


def test_the_penalty_is_the_squared_distance_to_the_base_policy_row_by_row():
    given, objective = by_hand(sharpness=2.0, velocity_penalty=0.1)
    loss, _ = objective.loss(given)
    plain = math.log1p(math.exp(3)) / 2
    assert loss.tolist() == pytest.approx([plain + 0.1 * 0.5, plain + 0.1 * 2.5], rel=1e-6)


SIZES = (2, 5, 3)  # of three groups


def made_up(seed: int, moved: float = 0.3) -> Renoised:
    """Three groups of unequal size, their rows mixed, with advantages that sum to 0 in each."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.repeat_interleave(torch.tensor([4, 0, 9]), torch.tensor(SIZES))
    group = group[torch.randperm(len(group), generator=generator)]
    advantage = torch.randn(len(group), generator=generator)
    for number in group.unique():
        advantage[group == number] -= advantage[group == number].mean()
    clean, noise, off, base, old = torch.randn((5, len(group), 2, 3, 3), generator=generator)
    sigma = torch.rand(10, generator=generator)[group] * 0.8 + 0.1
    wide = sigma.view(-1, 1, 1, 1)
    velocity = (noise - clean + off).requires_grad_()
    return Renoised(
        advantage=advantage,
        level=group,
        sigma=sigma,
        latents=(1 - wide) * clean + wide * noise,
        clean=clean,
        velocity=velocity,
        old_velocity=velocity.detach() + moved * old,
        base_velocity=velocity.detach() + 0.2 * base,
        group=group,
    )


def eq_17(given: Renoised, number: int, beta: float) -> float:
    """-log sigma(-beta (sum over G+ of w [L - L_ref] - sum over G- of w [L - L_ref])) of a group, with w = |A|."""
    rows = (given.group == number).numpy()
    sigma = given.sigma.double().numpy()[rows][:, None]
    clean, latents = (x.double().numpy()[rows].reshape(rows.sum(), -1) for x in (given.clean, given.latents))
    target = (latents - (1 - sigma) * clean) / sigma - clean  # noise - x0
    both = (given.velocity.detach(), given.base_velocity)
    ours, ref = (((v.double().numpy()[rows].reshape(rows.sum(), -1) - target) ** 2).mean(axis=1) for v in both)
    advantage = given.advantage.double().numpy()[rows]
    good = advantage > 0
    weighted = np.abs(advantage) * (ours - ref)
    return float(-np.log(1 / (1 + np.exp(beta * (weighted[good].sum() - weighted[~good].sum())))))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sharpness", [0.5, 10.0])
def test_the_loss_is_the_papers_equation_17_over_the_size_of_each_group(seed, sharpness):
    given = made_up(seed)
    loss, _ = PreferenceObjective(sharpness=sharpness, velocity_penalty=0.0).loss(given)
    for number, size in zip((4, 0, 9), SIZES, strict=True):
        expected = eq_17(given, number, sharpness / size) / sharpness
        assert loss[given.group == number].tolist() == pytest.approx([expected] * size, abs=1e-6)


def published_gradient(given: Renoised, beta: float, clip: float, penalty: float) -> torch.Tensor:
    """Of the loss that the published code backpropagates: mean(sigmoid(s) A d) + penalty mean (v - v_ref)^2.

    s sums beta A (d - d_ref) / |G| over the group and is a constant; d is one where the ratio to the old policy is cut.
    """
    velocity = given.velocity.detach().double().requires_grad_()
    target = (given.latents.double() - given.clean.double()) / given.sigma.double().view(-1, 1, 1, 1)

    def distance(v):
        return ((target - v.double()) ** 2).flatten(1).mean(1)

    d, reference, old = distance(velocity), distance(given.base_velocity), distance(given.old_velocity)
    now, advantage, terms = d.detach(), given.advantage.double(), []
    for number in given.group.unique():
        rows = (given.group == number).nonzero().flatten()
        s = sum(float(beta * advantage[i] * (now[i] - reference[i]) / len(rows)) for i in rows)
        for i in rows:
            ratio = math.exp(float(old[i] - now[i]))
            cut = ratio > 1 + clip if advantage[i] > 0 else ratio < 1 - clip
            terms.append(advantage[i] * (now[i] if cut else d[i]) / (1 + math.exp(-s)))
    distances = ((velocity - given.base_velocity.double()) ** 2).flatten(1).mean(1)
    (gradient,) = torch.autograd.grad(torch.stack(terms).mean() + penalty * distances.mean(), velocity)
    return gradient.float()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("clip", [0.01, 0.9])
def test_the_gradient_is_that_of_the_published_code(seed, clip):
    given = made_up(seed)
    objective = PreferenceObjective(sharpness=20.0, clip=clip, velocity_penalty=0.05)
    loss, metrics = objective.loss(given)
    assert bool(metrics["clipped"].any()) == (clip == 0.01)
    (gradient,) = torch.autograd.grad(loss.mean(), given.velocity)
    torch.testing.assert_close(gradient, published_gradient(given, 20.0, clip, 0.05), atol=1e-6, rtol=0)


def test_under_the_base_policy_neither_group_is_preferred():
    given = made_up(0)
    loss, metrics = PreferenceObjective().loss(replace(given, base_velocity=given.velocity.detach()))
    assert metrics["preference"].tolist() == [0.5] * sum(SIZES)
    assert loss.tolist() == pytest.approx([math.log(2) / 100] * sum(SIZES), rel=1e-6)


def test_a_group_that_is_told_apart_already_pulls_less():
    given = made_up(1)

    def pull(better: float) -> float:
        target = (given.latents - given.clean) / given.sigma.view(-1, 1, 1, 1)
        towards = (target - given.velocity.detach()) * given.advantage.sign().view(-1, 1, 1, 1) * better
        velocity = (given.velocity.detach() + towards).requires_grad_()
        loss, _ = PreferenceObjective(velocity_penalty=0.0).loss(replace(given, velocity=velocity))
        return float(torch.autograd.grad(loss.mean(), velocity)[0].norm())

    assert pull(0.3) < 0.1 * pull(0.0)


def test_rows_that_left_the_clip_range_the_way_they_are_asked_to_lose_their_gradient_alone():
    given, objective = by_hand(sharpness=2.0, clip=0.5)
    further = given.velocity.detach() + torch.tensor([[0.0, -1.0], [0.0, 0.0]]).view(
        2, 1, 1, 2
    )  # worse than the current
    given = replace(given, old_velocity=further)
    loss, metrics = objective.loss(given)
    assert metrics["clipped"].tolist() == [1.0, 0.0]
    assert loss[0].item() == pytest.approx(math.log1p(math.exp(3)) / 2, rel=1e-6)  # of the same distances
    (gradient,) = torch.autograd.grad(loss.mean(), given.velocity)
    assert gradient[0].abs().max() == 0
    assert gradient[1].abs().max() > 0
    bad = replace(given, advantage=-given.advantage)  # likelier although it is bad: always brought back
    assert PreferenceObjective(clip=0.5).loss(bad)[1]["clipped"].tolist() == [0.0, 0.0]


def test_its_default_clip_range_is_the_published_one_and_another_is_warned_of(tiny_spec):
    assert fitting_clip("preference", 65536) == 1e-2
    arm = {"tree": IndependentTree(noise="none")}
    fits = small_experiment(tiny_spec, objective=PreferenceObjective(), **arm)
    assert list(fits.problems()) == []
    (caution,) = fits.model_copy(update={"objective": PreferenceObjective(clip=1e-3)}).problems()
    assert caution.warning
    assert "DGPO uses 0.01 at 65536 dimensions, which is 0.4 at 1728 dimensions" in caution.message


def test_the_sampling_policy_lags_as_published():
    lagging, current = PreferenceObjective(), PreferenceObjective(old_schedule="current")
    assert [lagging.old_decay(step) for step in (1, 100, 300, 5000)] == [0.001, 0.1, 0.3, 0.3]
    assert [current.old_decay(step) for step in (1, 5000)] == [0.0, 0.0]


def test_it_keeps_the_contract_of_objectives_and_costs_two_frozen_policies_an_edge():
    check_objective(PreferenceObjective())
    experiment = small_experiment(GaussianSpec(), objective=PreferenceObjective())
    plan = plan_of(IndependentTree(noise="none"), [3, 5], [[1, 1, 0, 0]] * 2)
    rows = gradient_rows_of(experiment, plan)
    assert rows == plan.trained_edges == 16
    assert update_work(experiment, plan, rows) == 16 * (3 + 1 + 1)
