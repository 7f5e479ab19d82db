"""Losses of the forward process, against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from aegpo.core.records import Renoised
from aegpo.method.objectives import MatchingObjective, NftObjective

CLEAN, NOISE = torch.tensor([1.0, -1.0]), torch.tensor([0.0, 2.0])  # one latent of two dimensions


def seen(velocity, old, advantage=1.0, sigma=0.5, base=None) -> Renoised:
    """One row: clean [1, -1] and noise [0, 2], so that the flow's target is [-1, 3]; at sigma 0.5, x = [0.5, 0.5]."""

    def row(values):
        return torch.as_tensor(values).float().view(1, 1, 1, 2)

    return Renoised(
        advantage=torch.tensor([advantage]),
        level=torch.zeros(1, dtype=torch.int64),
        sigma=torch.tensor([sigma]),
        latents=row((1 - sigma) * CLEAN + sigma * NOISE),
        clean=row(CLEAN),
        velocity=row(velocity).requires_grad_(),
        old_velocity=row(old),
        base_velocity=None if base is None else row(base),
        group=torch.zeros(1, dtype=torch.int64),
    )


# --- DiffusionNFT ----------------------------------------------------------------------------------------------------


def test_nft_on_a_case_worked_out_by_hand():
    """v = [0, 2], v_old = [-2, 2], b = 0.5, A = 1 of 5: r = 0.6.

    v+ = [-1, 2], so x0+ = x - v+/2 = [1, -0.5], off by [0, 0.5]: square 0.125, weight 0.25, quotient 0.5.
    v- = 1.5 [-2, 2] - 0.5 [0, 2] = [-3, 2], so x0- = [2, -0.5], off by [1, 0.5]: square 0.625, weight 0.75: 0.8333.
    loss = 5 (0.6 x 0.5 + 0.4 x 0.8333) / 0.5 + 0.1 mean([0, 2] - [1, 1])^2 = 6.3333 + 0.1.
    """
    given = seen([0.0, 2.0], [-2.0, 2.0], base=[1.0, 1.0])
    loss, metrics = NftObjective(mixing=0.5, velocity_penalty=0.1).loss(given)
    assert float(loss.detach()) == pytest.approx(5 * (0.6 * 0.5 + 0.4 * 0.625 / 0.75) / 0.5 + 0.1, rel=1e-6)
    assert float(metrics["goodness"]) == pytest.approx(0.6)
    assert float(metrics["velocity_kl"]) == pytest.approx(1.0)
    assert float(metrics["clipped"]) == 0
    # off the target [-1, 3]: v by [1, -1], v_old by [-1, -1]; as likely as each other
    assert float(metrics["ratio"]) == pytest.approx(1.0)


def test_nfts_weight_carries_no_gradient():
    """d loss / d v+ of the good part: 2 (x0+ - x0) (-sigma) / (w+ d), times b / b, times limit and r."""
    given = seen([0.0, 2.0], [-2.0, 2.0])
    loss, _ = NftObjective(mixing=0.5, velocity_penalty=0.0).loss(given)
    (gradient,) = torch.autograd.grad(loss.sum(), given.velocity)
    good = 0.6 * 2 * torch.tensor([0.0, 0.5]) * -0.5 / (0.25 * 2)
    bad = 0.4 * 2 * torch.tensor([1.0, 0.5]) * 0.5 / (0.75 * 2)
    torch.testing.assert_close(gradient.flatten(), 5 * (good + bad))


@pytest.mark.parametrize(
    ("credit", "advantage", "goodness"),
    [
        ("all", 0.0, 0.5),
        ("all", 2.5, 0.75),
        ("all", -5.0, 0.0),
        ("all", 7.0, 1.0),
        ("positive", -2.5, 0.5),
        ("positive", 2.5, 0.75),
        ("negative", -2.5, 0.25),
        ("negative", 2.5, 0.5),
        ("binary", 0.01, 0.6),
        ("binary", -3.0, 0.4),
    ],
)
def test_nft_maps_advantages_to_how_much_is_good(credit, advantage, goodness):
    assert float(NftObjective(credit=credit).goodness(torch.tensor([advantage]))) == pytest.approx(goodness)


def test_before_the_policy_has_moved_nfts_gradient_is_the_advantages_pull_towards_the_clean_latents():
    """At v = v_old both implicit policies are v, so only 2 r - 1 = A / limit of the good one's gradient is left."""
    for advantage in (2.0, -2.0, 0.0):
        given = seen([0.5, 2.0], [0.5, 2.0], advantage)
        loss, metrics = NftObjective(velocity_penalty=0.0).loss(given)
        (gradient,) = torch.autograd.grad(loss.sum(), given.velocity)
        off = torch.tensor([0.5, 0.5]) - 0.5 * torch.tensor([0.5, 2.0]) - CLEAN
        towards = 2 * off * -0.5 / (off.abs().mean() * 2)
        torch.testing.assert_close(gradient.flatten(), advantage * towards)
        assert float(metrics["ratio"]) == 1.0


def test_a_perfect_prediction_is_not_divided_by_zero():
    given = seen([-1.0, 3.0], [-1.0, 3.0])
    loss, _ = NftObjective(velocity_penalty=0.0).loss(given)
    (gradient,) = torch.autograd.grad(loss.sum(), given.velocity)
    assert float(loss.detach()) == 0
    assert bool(gradient.isfinite().all())


def test_the_published_schedules_of_the_sampling_policy():
    assert [NftObjective(old_schedule="current").old_decay(step) for step in (1, 500)] == [0.0, 0.0]
    ramp = NftObjective(old_schedule="ramp")
    assert [ramp.old_decay(step) for step in (1, 100, 500, 900)] == pytest.approx([0.001, 0.1, 0.5, 0.5])
    late = NftObjective(old_schedule="late")
    assert [late.old_decay(step) for step in (1, 75, 76, 175, 900)] == pytest.approx([0.0, 0.0, 0.0075, 0.75, 0.999])


# --- AWM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("1", lambda m, t: -m),
        ("t", lambda m, t: -m * t),
        ("t2", lambda m, t: -m * t**2),
        ("huber", lambda m, t: -(math.sqrt(m + 1e-10) - 1e-5) * t),
        ("ghuber", lambda m, t: -((m + 1e-10) ** 0.25 - 1e-10**0.25) * t / 0.25),
    ],
)
@pytest.mark.parametrize("sigma", [0.5, 0.8])
def test_awms_log_probability_under_every_weight(weight, expected, sigma):
    objective, target = MatchingObjective(weight=weight), torch.tensor([[-1.0, 3.0]]).double()
    found = objective.log_prob(torch.tensor([[1.0, 2.0]]), target, torch.tensor([sigma], dtype=torch.float64))
    assert float(found) == pytest.approx(expected((4 + 1) / 2, sigma), abs=1e-9)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_awm_compares_the_two_policies_at_the_same_noise_and_level(sigma):
    """Off the target [-1, 3]: v by [0.1, 0], v_old by [0, 0.2]; the log-ratio is (0.04 - 0.01) / 2."""
    given = seen([-0.9, 3.0], [-1.0, 3.2], advantage=2.0, sigma=sigma)
    loss, metrics = MatchingObjective(clip=0.9).loss(given)
    assert float(metrics["ratio"]) == pytest.approx(math.exp(0.015), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(-2 * math.exp(0.015), rel=1e-5)
    assert float(metrics["approx_kl"]) == pytest.approx(0.015**2 / 2, rel=1e-4)


@pytest.mark.parametrize(("advantage", "clipped"), [(2.0, 1.0), (-2.0, 0.0)])
def test_awm_is_clipped_like_ppo(advantage, clipped):
    loss, metrics = MatchingObjective(clip=1e-5).loss(seen([-0.9, 3.0], [-1.0, 3.2], advantage))
    bound = 1 + 1e-5 if clipped else math.exp(0.015)
    assert float(loss.detach()) == pytest.approx(-advantage * bound, rel=1e-5)
    assert float(metrics["clipped"]) == clipped


def test_awms_penalties_pull_to_the_base_and_to_the_sampling_policy():
    given = seen([0.0, 0.0], [0.0, 2.0], advantage=0.0, base=[1.0, 1.0])
    loss, metrics = MatchingObjective(velocity_penalty=0.3, old_penalty=0.1).loss(given)
    assert float(metrics["velocity_kl"]) == pytest.approx(1.0)
    assert float(metrics["old_kl"]) == pytest.approx(2.0)
    assert float(loss.detach()) == pytest.approx(0.3 * 1 + 0.1 * 2)
    assert not MatchingObjective().needs_base
    assert MatchingObjective(velocity_penalty=0.1).needs_base


def test_on_policy_awms_gradient_is_the_advantage_times_the_matching_losss():
    given = seen([0.0, 0.0], [0.0, 0.0], advantage=3.0)
    loss, _ = MatchingObjective().loss(given)
    (gradient,) = torch.autograd.grad(loss.sum(), given.velocity)
    torch.testing.assert_close(gradient.flatten(), 3.0 * (torch.zeros(2) - torch.tensor([-1.0, 3.0])))
