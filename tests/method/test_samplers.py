"""Stochastic steps against the published code's numbers, and against the closed form of a Gaussian target."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import GaussianSpec, asked, execution, plan_of, small_experiment

from aegpo.core.parts import SamplerSpec
from aegpo.core.records import Gaussian
from aegpo.method.samplers import CpsSampler, DanceSde, DdimSampler, FlowSde, euler, gaussian_log_prob
from aegpo.method.trees import IndependentTree
from aegpo.train.noise import StepNoise
from aegpo.train.rollouts import roll_out

DATA = Path(__file__).parents[1] / "data"


def reference(name: str) -> dict:
    """Outputs of a published step function on random inputs: three steps of a schedule."""
    return json.loads((DATA / f"{name}.json").read_text())


REFERENCE = reference("flow-sde")  # Flow-GRPO, sde_step_with_logprob


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


@pytest.mark.parametrize("step", reference("dance-sde")["steps"], ids=lambda step: f"step-{step['step']}")
def test_a_dance_sde_step_is_the_published_one(step):
    given = reference("dance-sde")  # DanceGRPO, flux_step
    gaussian, log_prob = taken(DanceSde(eta=given["eta"]), given["shape"], step)
    mean = torch.tensor(step["mean"]).view(given["shape"])
    torch.testing.assert_close(gaussian.mean, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(gaussian.std, torch.full_like(gaussian.std, step["std"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(log_prob, torch.tensor(step["log_prob"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", reference("cps")["steps"], ids=lambda step: f"step-{step['step']}")
def test_a_cps_step_is_the_published_one(step):
    given = reference("cps")  # Flow-Factory, scheduler step with the dynamics of Flow-CPS
    gaussian, log_prob = taken(CpsSampler(noise_level=given["noise_level"]), given["shape"], step)
    mean = torch.tensor(step["mean"]).view(given["shape"])
    torch.testing.assert_close(gaussian.mean, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(gaussian.std, torch.full_like(gaussian.std, step["std_or_rate"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(log_prob, torch.tensor(step["log_prob"]), atol=1e-5, rtol=0)


def taken(sampler, shape: list[int], step: dict) -> tuple[Gaussian, torch.Tensor]:
    """A sampler's transition of a reference step, and its log-probability of the reference's next latents."""
    latents, velocity, following = (torch.tensor(step[name]).view(shape) for name in ("x", "v", "x_next"))
    sigma, sigma_next = torch.full((shape[0],), step["sigma"]), torch.full((shape[0],), step["sigma_next"])
    gaussian = sampler.transition(latents, velocity, sigma, sigma_next)
    return gaussian, sampler.log_prob(gaussian, following)


def flow_coordinates(alpha_bar: float) -> tuple[float, float]:
    """sigma and the scale c of a variance-preserving noise level: the flow's x is x / c."""
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    return noise / (signal + noise), signal + noise


@pytest.mark.parametrize("step", reference("ddim")["steps"], ids=lambda step: f"step-{step['step']}")
def test_a_ddim_step_is_the_published_one_in_flow_coordinates(step):
    given = reference("ddim")  # ddpo-pytorch, ddim_step_with_logprob
    latents, noise, following = (
        torch.tensor(step[name], dtype=torch.float64).view(given["shape"]) for name in ("x", "eps", "x_next")
    )
    (sigma, scale), (sigma_next, scale_next) = (
        flow_coordinates(step[name]) for name in ("alpha_bar", "alpha_bar_next")
    )
    clean = (latents - math.sqrt(1 - step["alpha_bar"]) * noise) / math.sqrt(step["alpha_bar"])
    converted = {"x": latents / scale, "v": noise - clean, "x_next": following / scale_next}
    moved = {name: value.float().flatten().tolist() for name, value in converted.items()}
    _, log_prob = taken(
        DdimSampler(eta=given["eta"]), given["shape"], moved | {"sigma": sigma, "sigma_next": sigma_next}
    )
    # A density of x / c is c times as high in each dimension, and the log-probability is a mean over dimensions.
    torch.testing.assert_close(log_prob - math.log(scale_next), torch.tensor(step["log_prob"]), atol=1e-5, rtol=0)


def test_dance_sde_is_flow_sde_with_a_constant_rate():
    generator = torch.Generator().manual_seed(0)
    latents, velocity = torch.randn(2, 8, 3, 4, 4, generator=generator).unbind()
    sigma = torch.linspace(0.95, 0.1, 8)
    for index in range(8):
        level, following = sigma[index : index + 1], sigma[index : index + 1] - 0.05
        rate = 0.3
        same = FlowSde(noise_level=rate * float(((1 - level) / level).sqrt()))
        x, v = latents[index : index + 1], velocity[index : index + 1]
        dance, flow = (sampler.transition(x, v, level, following) for sampler in (DanceSde(eta=rate), same))
        torch.testing.assert_close(dance.mean, flow.mean, atol=1e-6, rtol=0)
        torch.testing.assert_close(dance.std, flow.std, atol=1e-6, rtol=0)


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


@pytest.mark.parametrize("sampler", [FlowSde(), DanceSde(), CpsSampler(), DdimSampler()], ids=lambda part: part.kind)
def test_the_table_of_a_schedule_is_what_transitions_do(sampler):
    sigmas = np.array(sd3_sigmas())
    table, tried = sampler.table(sigmas), SamplerSpec.table(sampler, sigmas)  # the formula, and by trying it out
    for name in ("latents", "velocity", "std"):
        np.testing.assert_allclose(getattr(table, name), getattr(tried, name), atol=2e-6)


def test_grpo_guard_divides_by_what_is_flat_and_tempflow_by_the_mean_std():
    # Flow-GRPO's SD 3.5 schedule: |A_v| / delta is 1 + a^2 / 2 after the first step; 2.25 is 1 / mean std.
    sigmas = np.array(sd3_sigmas())
    table = FlowSde(noise_level=0.7).table(sigmas)
    flat = -table.velocity / -np.diff(sigmas)
    assert flat.round(3).tolist() == [1.0, *[1.245] * 9]
    pull = np.abs(table.velocity) / table.std  # how loud a step is in the vanilla gradient
    assert pull.round(3).tolist() == [0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.487, 1.771]
    assert 2.25 * table.std[:-1].mean() == pytest.approx(0.999, abs=5e-4)


def test_dancegrpo_stds_grow_towards_the_end():
    even = np.linspace(1, 0, 17)  # DanceGRPO's FLUX script: 16 steps, shift 3 applied once, eta 0.3
    std = DanceSde(eta=0.3).table(3 * even / (1 + 2 * even)).std
    assert std[[0, 8, 15]].round(4).tolist() == [0.0442, 0.0671, 0.1225]


def test_flux_stds_match_the_published_schedule():
    # Flow-GRPO's FLUX script at 512 x 512: 6 steps, exponential shift of 1024 tokens, noise level 0.9.
    shift = math.exp(0.5 + (1024 - 256) * 0.65 / 3840)
    sigmas = np.array([shift / (shift + 1 / time - 1) for time in np.linspace(1, 1 / 6, 6)] + [0.0])
    assert FlowSde(noise_level=0.9).table(sigmas).std.round(4).tolist() == [0.9, 0.9312, 0.646, 0.5059, 0.4008, 0.2882]


def test_cps_keeps_the_published_coefficients():
    # Flow-CPS at noise level 0.8 on SD 3.5's schedule.
    sigmas = np.array(sd3_sigmas())
    table = CpsSampler(noise_level=0.8).table(sigmas)
    expected = [-0.0399, -0.0719, -0.1070, -0.1450, -0.1855, -0.2269, -0.2651, -0.2896, -0.2736, -0.0089]
    np.testing.assert_allclose(table.velocity, expected, atol=6e-5)
    np.testing.assert_allclose(table.std, 0.951 * sigmas[1:], atol=1e-4)
    assert table.std[-1] == 0


def test_unscaled_log_probabilities_differ_by_twice_the_variance():
    # -(x' - mean)^2 against the Gaussian: differences are 2 std^2 as large, which is why clip ranges do not carry over.
    generator = torch.Generator().manual_seed(0)
    mean, first, second = torch.randn(3, 4, 2, 3, 3, generator=generator).unbind()
    gaussian = Gaussian(mean, torch.tensor([0.1, 0.5, 0.9, 2.0]))
    published, scaled = CpsSampler(), CpsSampler(convention="gaussian")
    moved = published.log_prob(gaussian, first) - published.log_prob(gaussian, second)
    gaussians = scaled.log_prob(gaussian, first) - scaled.log_prob(gaussian, second)
    torch.testing.assert_close(moved, 2 * gaussian.std.square() * gaussians, atol=1e-5, rtol=1e-5)
    assert (published.gaussian, scaled.gaussian, FlowSde().gaussian) == (False, True, True)


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


NOISELESS = [FlowSde(noise_level=0), DanceSde(eta=0), CpsSampler(noise_level=0), DdimSampler(eta=0)]


@pytest.mark.parametrize("sampler", NOISELESS, ids=lambda sampler: sampler.kind)
def test_every_sampler_without_noise_is_the_euler_step(sampler):
    generator = torch.Generator().manual_seed(0)
    latents, velocity = torch.randn(2, 5, 3, 4, 4, generator=generator).unbind()
    sigma, sigma_next = torch.tensor([1.0, 0.9, 0.5, 0.1, 0.01]), torch.tensor([0.9, 0.8, 0.1, 0.05, 0.0])
    gaussian = sampler.transition(latents, velocity, sigma, sigma_next)
    torch.testing.assert_close(gaussian.mean, euler(latents, velocity, sigma, sigma_next), atol=1e-6, rtol=0)
    assert gaussian.std.tolist() == [0.0] * 5


def test_euler_is_diffusers_flow_match_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigmas, generator = scheduler.sigmas, torch.Generator().manual_seed(0)
    assert sigmas.tolist() == pytest.approx(sd3_sigmas(), abs=1e-6)
    latents = theirs = torch.randn(2, 4, 4, 4, generator=generator)
    for level, time in enumerate(scheduler.timesteps):
        velocity = torch.randn(2, 4, 4, 4, generator=generator)
        latents = euler(latents, velocity, sigmas[level].expand(2), sigmas[level + 1].expand(2))
        theirs = scheduler.step(velocity, time, theirs, return_dict=False)[0]
        torch.testing.assert_close(latents, theirs, atol=1e-5, rtol=0)


def test_ddim_without_noise_is_diffusers_ddim_scheduler_on_a_unet():
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    sizes = {"block_out_channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **sizes,
    )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    coordinates = [flow_coordinates(float(scheduler.alphas_cumprod[time])) for time in scheduler.timesteps]
    coordinates.append((0.0, 1.0))
    theirs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = theirs / coordinates[0][1]
    for time, (sigma, scale), (sigma_next, scale_next) in zip(
        scheduler.timesteps, coordinates[:-1], coordinates[1:], strict=True
    ):
        with torch.no_grad():
            noise = unet(scale * latents, time).sample
            published = unet(theirs, time).sample
        clean = (scale * latents - sigma * scale * noise) / ((1 - sigma) * scale)
        levels = torch.tensor([sigma, sigma]), torch.tensor([sigma_next, sigma_next])
        latents = DdimSampler(eta=0).transition(latents, noise - clean, *levels).mean
        theirs = scheduler.step(published, time, theirs, eta=0.0, return_dict=False)[0]
        torch.testing.assert_close(scale_next * latents, theirs, atol=1e-5, rtol=1e-5)


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


def moments(sampler: SamplerSpec, spread: float, mean: float, steps: int) -> list[tuple[float, float]]:
    """Mean and variance of every level, exactly: each step is affine in x, so two points give its slope."""
    model = GaussianSpec(spread=spread).build(torch.device("cpu"))
    sigmas = model.sigmas(steps)
    cond = model.encode(asked([str(mean)] * 2))
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


def worst_errors(sampler: SamplerSpec, spread: float, mean: float, steps: int) -> tuple[float, float]:
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


NOISY = [FlowSde(noise_level=level) for level in (0.0, 0.3, 0.7, 1.0)] + [DanceSde(eta=0.3), DanceSde(eta=0.7)]
NOISY += [DdimSampler(eta=eta) for eta in (0.0, 0.5, 1.0)] + [CpsSampler(noise_level=0.0)]


@pytest.mark.parametrize("sampler", NOISY, ids=repr)
@pytest.mark.parametrize(("spread", "mean"), [(0.5, 0.8), (1.0, -0.3), (0.2, 0.5)])
def test_the_marginals_of_the_flow_are_kept_as_steps_grow(sampler, spread, mean):
    coarse, middle, fine = (worst_errors(sampler, spread, mean, steps) for steps in (10, 40, 160))
    assert max(coarse[0], middle[0], fine[0]) < 1e-5  # every step is affine: the mean is exact
    assert middle[1] < 0.6 * coarse[1]
    assert fine[1] < 0.6 * middle[1]
    assert fine[1] < 0.02


@pytest.mark.parametrize("sampler", [CpsSampler(noise_level=0.8), CpsSampler(), DdimSampler(), DdimSampler(eta=0.3)])
@pytest.mark.parametrize("steps", [3, 10, 40])
def test_coefficient_preserving_steps_keep_the_noise_of_a_point_exactly(sampler, steps):
    # A data set of one image: the noise that is left is sigma at every level, however few the steps.
    for level, (centre, variance) in enumerate(moments(sampler, 0.0, 0.7, steps)):
        sigma = 1 - level / steps
        assert centre == pytest.approx((1 - sigma) * 0.7, abs=1e-5)
        assert math.sqrt(variance) == pytest.approx(sigma, abs=1e-5)


@pytest.mark.parametrize("steps", [10, 40, 160])
def test_cps_does_not_keep_the_spread_of_a_wide_target(steps):
    # Exact for a point only: redrawing a fixed share of the noise at every step forgets what it said about the image.
    assert worst_errors(CpsSampler(noise_level=0.8), 0.5, 0.8, steps)[1] > 0.05


def test_executed_rollouts_have_the_moments_of_the_closed_form():
    count, steps = 8000, 10
    model = GaussianSpec(spread=0.5).build(torch.device("cpu"))
    plan = plan_of(IndependentTree(), [count], [[1] * steps])
    how = execution(model, steps, FlowSde(noise_level=0.7), micro_batch=count)
    rollouts = roll_out(how, plan, model.encode(asked(["0.8"])), StepNoise(0))
    centre, variance = moments(FlowSde(noise_level=0.7), 0.5, 0.8, steps)[-1]
    values = rollouts.latents.flatten()  # independent: the model treats every pixel alike
    standard_error = math.sqrt(variance / len(values))
    assert float(values.mean()) == pytest.approx(centre, abs=4 * standard_error)
    assert float(values.var()) == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / len(values)))


@pytest.mark.parametrize(
    ("sampler", "field", "published"),
    [
        (FlowSde(noise_level=0), "noise_level", "Flow-GRPO: 0.7"),
        (DanceSde(eta=0), "eta", "DanceGRPO: 0.3"),
        (CpsSampler(noise_level=0, convention="gaussian"), "noise_level", "Flow-GRPO: 0.8"),
        (DdimSampler(eta=0), "eta", "DDPO: 1"),
    ],
)
def test_a_run_without_noise_is_refused_with_the_published_value(sampler, field, published):
    experiment = small_experiment(GaussianSpec(), sampler=sampler)
    expected = f"'{field}' 0 makes every step deterministic: there would be nothing to learn from; {published}"
    assert [(problem.location, problem.message) for problem in experiment.problems()] == [(("sampler",), expected)]
