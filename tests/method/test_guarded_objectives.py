"""Losses that look at where the policy that sampled was: GRPO-Guard's ratio and Flow-DPPO's mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_objectives import update
from worlds import GaussianSpec, small_experiment

from aegpo.core.records import Gaussian, Update
from aegpo.method.objectives import ClippedObjective, DivergenceMaskedObjective, GuardedObjective
from aegpo.method.samplers import CpsSampler, FlowSde, gaussian_log_prob

SHAPE = (6, 2, 3, 3)


def moved(seed: int, size: float, advantage=None) -> tuple[Update, torch.Tensor, torch.Tensor]:
    """Transitions whose mean has moved by dmu since noise z was drawn; the update, z and dmu, in float64."""
    generator = torch.Generator().manual_seed(seed)
    old_mean, z, direction = torch.randn((3, *SHAPE), generator=generator, dtype=torch.float64)
    std = torch.rand(6, generator=generator, dtype=torch.float64) + 0.05
    shift = size * direction
    following = old_mean + std.view(-1, 1, 1, 1) * z
    mean = (old_mean + shift).requires_grad_()
    log_prob, old_log_prob = (gaussian_log_prob64(each, std, following) for each in (mean, old_mean))
    given = update(torch.zeros(6), advantage if advantage is not None else torch.ones(6))
    return replace(given, log_prob=log_prob, old_log_prob=old_log_prob, mean=mean, old_mean=old_mean, std=std), z, shift


def gaussian_log_prob64(mean, std, following):
    return (
        gaussian_log_prob(Gaussian(mean, std), following.float())
        if mean.dtype == torch.float32
        else (torch.distributions.Normal(mean, std.view(-1, 1, 1, 1)).log_prob(following).flatten(1).mean(dim=1))
    )


# --- GRPO-Guard ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 100), st.sampled_from([0.0, 1e-4, 0.01, 0.3]))
def test_the_guarded_log_ratio_is_the_mean_of_noise_times_shift(seed, size):
    given, z, shift = moved(seed, size)
    _, metrics = GuardedObjective().loss(given)
    torch.testing.assert_close(metrics["ratio"].log(), (z * shift).flatten(1).mean(dim=1), atol=1e-6, rtol=0)


def test_in_float32_as_the_engine_has_it_the_identity_holds_to_1e_6():
    generator = torch.Generator().manual_seed(3)
    old_mean, z, direction = torch.randn((3, *SHAPE), generator=generator)
    std, mean = torch.full((6,), 0.3), old_mean + 0.02 * direction
    following = old_mean + 0.3 * z
    log_prob, old_log_prob = (gaussian_log_prob(Gaussian(each, std), following) for each in (mean, old_mean))
    given = replace(
        update(torch.zeros(6), torch.ones(6), mean, std=std),
        log_prob=log_prob,
        old_log_prob=old_log_prob,
        old_mean=old_mean,
    )
    expected = (z * 0.02 * direction).flatten(1).mean(dim=1)
    torch.testing.assert_close(GuardedObjective().loss(given)[1]["ratio"].log(), expected, atol=1e-6, rtol=0)


def test_the_correction_is_each_samples_own_not_the_batchs():
    whole, _, _ = moved(1, 0.1)
    assert whole.old_mean is not None
    together, _ = GuardedObjective(clip=0.5).loss(whole)
    for row in range(6):
        fields = {name: value[row : row + 1] for name, value in vars(whole).items() if isinstance(value, torch.Tensor)}
        alone, _ = GuardedObjective(clip=0.5).loss(replace(whole, **fields))
        torch.testing.assert_close(alone, together[row : row + 1])


def test_on_policy_the_gradient_through_the_velocity_is_as_loud_at_every_step():
    """|A_v| / std would be 26 times louder at step 8 than at step 0; with 1/delta only 1 + a^2/2 is left of A_v."""
    shift = lambda t: 3 * t / (1 + 2 * t)  # noqa: E731
    sigmas = torch.cat([shift(torch.linspace(1.0, shift(0.001), 10)), torch.zeros(1)])
    sampler, generator = FlowSde(noise_level=0.7), torch.Generator().manual_seed(0)
    latents, velocity = torch.randn((2, 10, 1, 4, 4), generator=generator)
    velocity.requires_grad_()
    noise = torch.randn((1, 1, 4, 4), generator=generator).expand(10, -1, -1, -1)
    gaussian = sampler.transition(latents, velocity, sigmas[:-1], sigmas[1:])
    following = (gaussian.mean + gaussian.std.view(-1, 1, 1, 1) * noise).detach()
    found = sampler.log_prob(gaussian, following)
    given = Update(
        log_prob=found,
        old_log_prob=found.detach(),
        advantage=torch.ones(10),
        mean=gaussian.mean,
        base_mean=None,
        old_mean=gaussian.mean.detach(),
        std=gaussian.std,
        delta=sigmas[:-1] - sigmas[1:],
        level=torch.arange(10),
        mean_std=1.0,
        group=torch.arange(10),
    )
    (gradient,) = torch.autograd.grad(GuardedObjective().loss(given)[0].sum(), velocity)
    loudness = gradient.flatten(1).norm(dim=1) / noise[0].norm() * 16
    expected = torch.tensor([1.0, *[1.245] * 8])  # |A_v| / delta of that schedule, but for sigma = 1
    torch.testing.assert_close(loudness[:9], expected, atol=2e-3, rtol=0)


def test_the_guarded_surrogate_is_clipped_and_its_kl_is_not_divided_by_delta():
    given, _, _ = moved(2, 1.0, torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, -2.0]))
    losses, metrics = GuardedObjective(clip=0.01).loss(given)
    ratio = metrics["ratio"]
    advantage = given.advantage
    expected = -torch.minimum(advantage * ratio, advantage * ratio.clamp(0.99, 1.01)) / 0.1
    torch.testing.assert_close(losses.detach(), expected)
    beyond = (advantage > 0) & (ratio > 1.01) | (advantage < 0) & (ratio < 0.99)
    assert torch.equal(metrics["clipped"], beyond.float())
    assert 0 < beyond.sum() < 6
    assert given.old_mean is not None
    based = replace(given, base_mean=given.old_mean)
    with_kl, kl = GuardedObjective(clip=0.01, beta=0.5).loss(based)
    torch.testing.assert_close(with_kl - losses, 0.5 * kl["kl"])


def test_rate_units_leave_out_the_length_of_the_step():
    given, _, _ = moved(4, 0.1)
    based = replace(given, base_mean=given.old_mean)
    plain, _ = ClippedObjective().loss(given)
    gaussian, _ = ClippedObjective(beta=1.0).loss(based)
    rate, metrics = ClippedObjective(beta=1.0, kl_units="rate").loss(based)
    torch.testing.assert_close(gaussian - plain, metrics["kl"])
    torch.testing.assert_close(rate - plain, metrics["kl"] * given.delta)
    shift = (given.mean - given.old_mean).detach().square().flatten(1).mean(dim=1)
    rate_squared = given.std.square() / given.delta
    torch.testing.assert_close((rate - plain).detach(), shift / (2 * rate_squared))


# --- Flow-DPPO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("likelier", [True, False])
@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
def test_the_truth_table_of_the_divergence_mask(far, likelier, advantage):
    log_ratio, shift = (0.1 if likelier else -0.1), (1.0 if far else 0.01)
    old_mean, std = torch.zeros(1, 1, 2, 2), 0.5
    given = replace(update([log_ratio], [advantage], old_mean + shift, std=std), old_mean=old_mean)
    objective = DivergenceMaskedObjective(threshold=0.1)
    losses, metrics = objective.loss(given)
    losses.sum().backward()
    divergence = shift**2 / (2 * std**2)
    assert float(metrics["approx_kl"]) == pytest.approx(divergence)
    dropped = far and ((likelier and advantage > 0) or (not likelier and advantage < 0))
    assert float(metrics["clipped"]) == float(dropped)
    ratio = float(torch.tensor(log_ratio).exp())
    assert float(losses.detach()) == pytest.approx(0.0 if dropped else -advantage * ratio, abs=1e-6)
    assert float(given.log_prob.grad) == pytest.approx(0.0 if dropped else -advantage * ratio, abs=1e-6)


def test_exactly_at_the_threshold_a_transition_is_masked():
    old_mean = torch.zeros(1, 1, 2, 2)
    given = replace(update([0.1], [1.0], old_mean + 1.0, std=1.0), old_mean=old_mean)
    assert float(DivergenceMaskedObjective(threshold=0.5).loss(given)[1]["clipped"]) == 1.0
    assert float(DivergenceMaskedObjective(threshold=0.5001).loss(given)[1]["clipped"]) == 0.0


def test_before_the_policy_has_moved_nothing_is_masked_and_the_gradient_is_grpos():
    given, _, _ = moved(5, 0.0)
    mine, metrics = DivergenceMaskedObjective().loss(given)
    grpo, _ = ClippedObjective().loss(given)
    assert torch.equal(mine, grpo)
    assert float(metrics["clipped"].sum()) == 0


# --- which clip ranges fit -------------------------------------------------------------------------------------------


def cautions(objective, model=None) -> list[str]:
    """The warnings of an objective in an experiment of 16 dimensions nobody told it about."""
    return list(objective.cautions(small_experiment(model or GaussianSpec(), objective=objective)))


@pytest.mark.parametrize("clip", [2e-5, 1e-4, 5e-4])
def test_clip_ranges_within_an_order_of_the_published_one_pass_without_a_word(clip):
    assert cautions(ClippedObjective(clip=clip)) == []
    assert cautions(GuardedObjective(clip=clip / 50)) == []


def test_a_clip_range_an_order_off_is_a_warning_that_says_why():
    (text,) = cautions(ClippedObjective(clip=2e-6))
    assert text == (
        "'clip' 2e-06 is more than 10 times below what fits here: the ratio comes from a Gaussian log-probability, "
        "averaged over dimensions; Flow-GRPO uses 0.0001 at 65536 dimensions, which is 0.0001 at 65536 dimensions, if "
        "the latents have as many as there"
    )
    (text,) = cautions(GuardedObjective(clip=1e-4))
    assert "10 times above" in text
    assert "freed of its bias and multiplied by the step's std" in text


def test_the_clip_range_that_fits_grows_as_the_latents_shrink():
    class Small(GaussianSpec):
        @property
        def dimensions(self):
            return 16

    (text,) = cautions(ClippedObjective(clip=1e-4), Small())
    assert text.endswith("Flow-GRPO uses 0.0001 at 65536 dimensions, which is 0.4 at 16 dimensions")
    assert cautions(ClippedObjective(clip=0.2), Small()) == []


def test_an_unscaled_log_probability_asks_for_a_smaller_clip_and_is_refused_by_the_guard():
    experiment = small_experiment(GaussianSpec(), sampler=CpsSampler())
    (text,) = ClippedObjective(clip=5e-4).cautions(experiment)
    assert "a log-probability without the factor 1 / (2 std^2)" in text
    assert list(ClippedObjective(clip=1e-5).cautions(experiment)) == []
    (text,) = GuardedObjective().problems(experiment)
    assert text == (
        "the ratio is corrected for Gaussian log-probabilities, but sampler 'cps' leaves out 1 / (2 std^2); let it "
        "use Gaussian ones, or choose objective 'clipped'"
    )
    for sampler in (FlowSde(), CpsSampler(convention="gaussian")):
        assert list(GuardedObjective().problems(small_experiment(GaussianSpec(), sampler=sampler))) == []
