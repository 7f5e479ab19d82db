"""The clipped loss: its truth table, its gradient, and its KL in the units of the step's Gaussian."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from aegpo.core.records import Gaussian, Update
from aegpo.method.objectives import ClippedObjective
from aegpo.method.samplers import gaussian_log_prob

CLIP = 0.1


def update(log_ratio, advantage, mean=None, base_mean=None, std=1.0, mean_std=1.0) -> Update:
    """One or more transitions with the given log-ratios, whose log-probability carries the gradient."""
    log_ratio, advantage = torch.as_tensor(log_ratio).reshape(-1), torch.as_tensor(advantage).reshape(-1)
    old = torch.full_like(log_ratio, -0.7)
    mean = torch.zeros(len(log_ratio), 1, 2, 2) if mean is None else mean
    return Update(
        log_prob=(old + log_ratio).requires_grad_(True),
        old_log_prob=old,
        advantage=advantage,
        mean=mean,
        base_mean=base_mean,
        old_mean=None,
        delta=torch.full((len(log_ratio),), 0.1),
        std=torch.as_tensor(std).expand(len(log_ratio)),
        level=torch.zeros(len(log_ratio), dtype=torch.int64),
        mean_std=mean_std,
        group=torch.zeros(len(log_ratio), dtype=torch.int64),
    )


def update_of(log_prob, advantage, mean, std) -> Update:
    """On-policy transitions with these log-probabilities, which carry the gradient."""
    given = update(torch.zeros_like(std), advantage, mean, std=std)
    return replace(given, log_prob=log_prob, old_log_prob=log_prob.detach())


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "learns"),
    [
        (2.0, 1.3, -2.0 * (1 + CLIP), False),  # already likelier than allowed: no further
        (2.0, 1.05, -2.0 * 1.05, True),
        (2.0, 0.95, -2.0 * 0.95, True),
        (2.0, 0.7, -2.0 * 0.7, True),  # less likely although it is good: always brought back
        (-2.0, 1.3, 2.0 * 1.3, True),  # likelier although it is bad: always brought back
        (-2.0, 1.05, 2.0 * 1.05, True),
        (-2.0, 0.95, 2.0 * 0.95, True),
        (-2.0, 0.7, 2.0 * (1 - CLIP), False),
        (0.0, 1.3, 0.0, True),
    ],
)
def test_the_truth_table_of_the_clipped_loss(advantage, ratio, loss, learns):
    given = update([math.log(ratio)], [advantage])
    losses, metrics = ClippedObjective(clip=CLIP).loss(given)
    losses.sum().backward()
    assert float(losses.detach()) == pytest.approx(loss, abs=1e-6)
    expected = -advantage * ratio if learns else 0.0  # d(-A r) / d log r
    assert float(given.log_prob.grad) == pytest.approx(expected, abs=1e-6)
    assert float(metrics["clipped"]) == (0.0 if learns else 1.0)
    assert float(metrics["ratio"]) == pytest.approx(ratio, abs=1e-6)
    assert float(metrics["approx_kl"]) == pytest.approx(math.log(ratio) ** 2 / 2, abs=1e-6)


def test_at_ratio_one_the_gradient_is_minus_advantage_times_the_score():
    generator = torch.Generator().manual_seed(0)
    mean, following = torch.randn(2, 5, 2, 3, 3, generator=generator).unbind()
    std, advantage = torch.rand(5, generator=generator) + 0.1, torch.randn(5, generator=generator)
    mean.requires_grad_(True)

    def log_prob() -> torch.Tensor:
        return gaussian_log_prob(Gaussian(mean, std), following)

    (score,) = torch.autograd.grad((-advantage * log_prob()).sum(), mean)
    found = log_prob()
    losses, metrics = ClippedObjective().loss(update_of(found, advantage, mean, std))
    (gradient,) = torch.autograd.grad(losses.sum(), mean)
    torch.testing.assert_close(gradient, score)
    assert torch.equal(metrics["ratio"], torch.ones(5))
    assert torch.equal(metrics["clipped"], torch.zeros(5))


def test_the_kl_is_that_of_the_two_gaussians_averaged_over_dimensions():
    generator = torch.Generator().manual_seed(1)
    mean, base_mean = torch.randn(2, 4, 2, 3, 3, generator=generator).unbind()
    std = torch.tensor([0.05, 0.3, 0.7, 2.0])
    given = update(torch.zeros(4), torch.zeros(4), mean.requires_grad_(True), base_mean, std)
    losses, metrics = ClippedObjective(beta=0.25).loss(given)
    wide = std.view(4, 1, 1, 1)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean.detach(), wide), torch.distributions.Normal(base_mean, wide)
    ).mean(dim=(1, 2, 3))
    torch.testing.assert_close(metrics["kl"], exact)
    torch.testing.assert_close(losses.detach(), 0.25 * exact)
    (gradient,) = torch.autograd.grad(losses.sum(), mean)
    torch.testing.assert_close(gradient, 0.25 * (mean - base_mean).detach() / wide**2 / 18)


def test_only_a_kl_penalty_reads_the_base_policy():
    assert not ClippedObjective().needs_base
    assert ClippedObjective(beta=0.04).needs_base
    _, metrics = ClippedObjective().loss(update([0.0], [1.0]))
    assert set(metrics) == {"ratio", "clipped", "approx_kl"}


def test_step_weight_std_scales_the_policy_loss_by_std_over_the_mean_std_and_not_the_kl():
    std, mean_std = torch.tensor([0.1, 0.5, 1.2]), 0.6
    zeros, ones = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    given = update(torch.zeros(3), torch.tensor([1.0, -2.0, 3.0]), zeros, ones, std, mean_std)
    plain, _ = ClippedObjective(beta=0.1).loss(given)
    weighted, metrics = ClippedObjective(beta=0.1, step_weight="std").loss(given)
    kl = 0.1 * metrics["kl"]
    torch.testing.assert_close(weighted - kl, (plain - kl) * std / mean_std)


def test_every_transition_has_its_own_loss_whatever_shares_its_batch():
    log_ratio, advantage = torch.tensor([0.3, -0.2, 0.01]), torch.tensor([1.0, -1.0, 2.0])
    together, _ = ClippedObjective(clip=CLIP).loss(update(log_ratio, advantage))
    alone = [ClippedObjective(clip=CLIP).loss(update(log_ratio[i], advantage[i]))[0] for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
