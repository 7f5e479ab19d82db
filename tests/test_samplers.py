"""Stochastic steps against the published code's numbers, and against the closed form of a Gaussian target."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from worlds import GaussianSpec, execution, plan_of, small_experiment

from aegpo.interfaces import Gaussian
from aegpo.rollouts import roll_out
from aegpo.samplers import FlowSde, euler, gaussian_log_prob
from aegpo.trees import IndependentTree

# Outputs of Flow-GRPO's own step function (flow_grpo, sde_step_with_logprob) on random inputs: three of its ten steps.
REFERENCE = json.loads((Path(__file__).parent / "data" / "flow-sde.json").read_text())


@pytest.mark.parametrize("step", REFERENCE["steps"], ids=lambda step: f"step-{step['step']}")
def test_a_flow_sde_step_is_the_published_one(step):
    shape = REFERENCE["shape"]
    latents, velocity, following, mean = (torch.tensor(step[name]).view(shape) for name in ("x", "v", "x_next", "mean"))
    sigma, sigma_next = torch.full((shape[0],), step["sigma"]), torch.full((shape[0],), step["sigma_next"])
    sampler = FlowSde(noise_level=REFERENCE["noise_level"])
    gaussian = sampler.transition(latents, velocity, sigma, sigma_next)
    std = step["rate"] * math.sqrt(step["sigma"] - step["sigma_next"])
    torch.testing.assert_close(gaussian.mean, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(gaussian.std, torch.full((shape[0],), std), atol=1e-5, rtol=0)
    log_prob = sampler.log_prob(gaussian, following)
    torch.testing.assert_close(log_prob, torch.tensor(step["log_prob"]), atol=1e-5, rtol=0)


def sd3_sigmas(steps: int = 10) -> list[float]:
    """SD 3.5's schedule as diffusers makes it: shift 3 applied twice, then zero."""

    def shift(value: float) -> float:
        return 3 * value / (1 + 2 * value)

    last = shift(0.001)
    return [shift(1 + (last - 1) * index / (steps - 1)) for index in range(steps)] + [0.0]


# Computed from the formulas of Flow-GRPO's code for SD 3.5, 10 steps, noise level 0.7.
TABLE_STD = (0.7000, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063)
TABLE_A_V = (-0.03987, -0.05824, -0.06929, -0.08382, -0.10345, -0.13088, -0.17091, -0.23260, -0.33505, -0.01112)
TABLE_A_X = (0.7550, 0.7125, 0.8426, 0.8841, 0.9029, 0.9120, 0.9155, 0.9145, 0.9087, 0.9978)


def test_coefficients_match_the_table_of_the_sd3_schedule():
    sigmas = torch.tensor(sd3_sigmas())
    one, zero = torch.ones(10, 1, 1, 1), torch.zeros(10, 1, 1, 1)
    sampler = FlowSde(noise_level=0.7)
    by_latents = sampler.transition(one, zero, sigmas[:-1], sigmas[1:])
    by_velocity = sampler.transition(zero, one, sigmas[:-1], sigmas[1:])
    torch.testing.assert_close(by_latents.std, torch.tensor(TABLE_STD), atol=6e-5, rtol=0)
    torch.testing.assert_close(by_latents.mean.flatten(), torch.tensor(TABLE_A_X), atol=6e-5, rtol=0)
    torch.testing.assert_close(by_velocity.mean.flatten(), torch.tensor(TABLE_A_V), atol=6e-6, rtol=0)


def test_mixgrpo_stds_come_out_of_the_same_step():
    # MixGRPO: 25 steps, shift 3 applied once, noise level 0.7.
    even = torch.linspace(1, 0, 26, dtype=torch.float64)
    sigmas = (3 * even / (1 + 2 * even)).float()
    nothing = torch.zeros(25, 1, 1, 1)
    std = FlowSde(noise_level=0.7).transition(nothing, nothing, sigmas[:-1], sigmas[1:]).std
    torch.testing.assert_close(std[:6], torch.tensor([0.7, 0.7145, 0.5087, 0.4182, 0.3646, 0.3282]), atol=6e-5, rtol=0)


@pytest.mark.parametrize("sigma", [1.0, 1.0 + 1e-7, 1.0 - 5e-7])
def test_a_sigma_within_rounding_of_one_is_one(sigma):
    latents, velocity = torch.randn(2, 1, 3, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    following = torch.tensor([0.9])
    exact = FlowSde().transition(latents, velocity, torch.tensor([1.0]), following)
    near = FlowSde().transition(latents, velocity, torch.tensor([sigma]), following)
    torch.testing.assert_close(near.mean, exact.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(near.std, exact.std, atol=1e-5, rtol=0)
    assert exact.std.item() == pytest.approx(0.7, abs=1e-6)  # the std of the first step is the noise level


def test_noise_level_zero_is_exactly_the_euler_step():
    generator = torch.Generator().manual_seed(0)
    latents, velocity = torch.randn(2, 5, 3, 4, 4, generator=generator).unbind()
    sigma, sigma_next = torch.tensor([1.0, 0.9, 0.5, 0.1, 0.01]), torch.tensor([0.9, 0.8, 0.1, 0.05, 0.0])
    gaussian = FlowSde(noise_level=0.0).transition(latents, velocity, sigma, sigma_next)
    assert torch.equal(gaussian.mean, euler(latents, velocity, sigma, sigma_next))
    assert torch.equal(gaussian.std, torch.zeros(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_float32_whatever_the_latents_are_stored_in(dtype):
    latents, velocity = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype).unbind()
    sigma, sigma_next = torch.tensor([0.8, 0.3]), torch.tensor([0.7, 0.2])
    gaussian = FlowSde().transition(latents, velocity, sigma, sigma_next)
    expected = FlowSde().transition(latents.float(), velocity.float(), sigma, sigma_next)
    assert gaussian.mean.dtype == gaussian.std.dtype == torch.float32
    assert torch.equal(gaussian.mean, expected.mean)
    assert euler(latents, velocity, sigma, sigma_next).dtype == torch.float32
    assert gaussian_log_prob(gaussian, latents).dtype == torch.float32


def test_the_log_probability_is_the_mean_gaussian_density():
    generator = torch.Generator().manual_seed(2)
    mean, value = torch.randn(2, 3, 2, 4, 4, generator=generator).unbind()
    std = torch.tensor([0.1, 0.7, 2.0])
    density = torch.distributions.Normal(mean.double(), std.double().view(3, 1, 1, 1)).log_prob(value.double())
    found = gaussian_log_prob(Gaussian(mean, std), value)
    torch.testing.assert_close(found, density.mean(dim=(1, 2, 3)).float(), atol=1e-5, rtol=1e-5)


def moments(sampler: FlowSde, spread: float, mean: float, steps: int) -> list[tuple[float, float]]:
    """Mean and variance of every level, exactly: each step is affine in x, so two points give its slope."""
    model = GaussianSpec(spread=spread).build(torch.device("cpu"))
    sigmas = model.sigmas(steps)
    cond = model.encode([str(mean)] * 2)
    points = torch.stack([torch.zeros(model.latent_shape), torch.ones(model.latent_shape)])
    found = [(0.0, 1.0)]
    with torch.no_grad():
        for sigma, sigma_next in pairwise(sigmas):
            velocity = model.velocity(points, sigma.expand(2), cond)
            gaussian = sampler.transition(points, velocity, sigma.expand(2), sigma_next.expand(2))
            at_zero, at_one = (float(value) for value in gaussian.mean[:, 0, 0, 0])
            centre, variance = found[-1]
            slope = at_one - at_zero
            found.append((at_zero + slope * centre, slope**2 * variance + float(gaussian.std[0]) ** 2))
    return found


def worst_errors(sampler: FlowSde, spread: float, mean: float, steps: int) -> tuple[float, float]:
    """How far mean and std are from the flow's N((1 - sigma) m, (1 - sigma)^2 s^2 + sigma^2) at sigma <= 1/2.

    Levels near 1 are left out: the published code gives the first step std a however short it is, which is an error
    that more steps do not shrink but the trajectory forgets.
    """
    off_mean, off_std = 0.0, 0.0
    for level, (centre, variance) in enumerate(moments(sampler, spread, mean, steps)):
        if (sigma := 1 - level / steps) <= 0.5:
            std = math.sqrt((1 - sigma) ** 2 * spread**2 + sigma**2)
            off_mean = max(off_mean, abs(centre - (1 - sigma) * mean))
            off_std = max(off_std, abs(math.sqrt(variance) - std))
    return off_mean, off_std


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("spread", "mean"), [(0.5, 0.8), (1.0, -0.3), (0.2, 0.5)])
def test_the_marginals_of_the_flow_are_kept_as_steps_grow(noise_level, spread, mean):
    sampler = FlowSde(noise_level=noise_level)
    coarse, middle, fine = (worst_errors(sampler, spread, mean, steps) for steps in (10, 40, 160))
    assert max(coarse[0], middle[0], fine[0]) < 1e-5  # every step is affine: the mean is exact
    assert middle[1] < 0.6 * coarse[1]
    assert fine[1] < 0.6 * middle[1]
    assert fine[1] < 0.01


def test_executed_rollouts_have_the_moments_of_the_closed_form():
    count, steps = 8000, 10
    model = GaussianSpec(spread=0.5).build(torch.device("cpu"))
    plan = plan_of(IndependentTree(), [count], [[1] * steps])
    how = execution(model, steps, FlowSde(noise_level=0.7), micro_batch=count)
    rollouts = roll_out(how, plan, model.encode(["0.8"]), torch.Generator().manual_seed(0))
    centre, variance = moments(FlowSde(noise_level=0.7), 0.5, 0.8, steps)[-1]
    values = rollouts.latents.flatten()  # independent: the model treats every pixel alike
    standard_error = math.sqrt(variance / len(values))
    assert float(values.mean()) == pytest.approx(centre, abs=4 * standard_error)
    assert float(values.var()) == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / len(values)))


def test_a_run_without_noise_is_refused_with_the_published_value():
    experiment = small_experiment(GaussianSpec(), sampler=FlowSde(noise_level=0.0))
    assert [(problem.location, problem.message) for problem in experiment.problems()] == [
        (
            ("sampler",),
            "'noise_level' 0 makes every step deterministic: there would be nothing to learn from; Flow-GRPO: 0.7",
        )
    ]
