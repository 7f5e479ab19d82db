"""Noise levels: the schedulers' own, and the table of SD 3.5."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aegpo.core.contracts import check_sigmas
from aegpo.errors import AegpoError, ContractError
from aegpo.models.flux import FluxSpec
from aegpo.models.pipeline.diffusion import VariancePreserving
from aegpo.models.pipeline.schedules import DdimSchedule, FlowSchedule, ddim_schedule, flow_schedule
from aegpo.models.pipeline.unet import NOISE
from aegpo.models.sd import SdSpec
from aegpo.models.sd3 import Sd3Spec
from aegpo.models.sdxl import SdxlSpec

# Sigmas of SD 3.5's schedule with 10 steps (METHODS 0.4, from Flow-GRPO's code on diffusers)
SD35 = [1.0, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893, 0.0]
# times of FLUX at 720 x 720, 20 steps: mu = 0.5 + (2025 - 256) 0.65 / 3840 = 0.799
MU_720 = 0.5 + (2025 - 256) * 0.65 / 3840


def test_sd35_levels_are_the_published_table():
    assert np.allclose(Sd3Spec(path="nobody/has-this").sigmas(10), SD35, atol=5e-6)


def test_flux_levels_at_720_pixels_shift_by_the_number_of_tokens():
    sigmas = FluxSpec(path="nobody/has-this", height=720, width=720).sigmas(20)
    times = np.linspace(1, 1 / 20, 20)
    weight = np.exp(MU_720)
    assert np.allclose(sigmas[:-1], weight / (weight + 1 / times - 1), atol=1e-12)
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0


@pytest.mark.parametrize("steps", [2, 5, 10, 28, 50])
@pytest.mark.parametrize("tokens", [256, 1024, 2025, 4096])
@pytest.mark.parametrize(
    "config",
    [
        {"shift": 3.0},
        {"shift": 1.0},
        {"shift": 3.0, "use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "shift_terminal": 0.02, "base_shift": 0.5, "max_shift": 0.9},
    ],
    ids=str,
)
def test_flow_levels_are_the_schedulers_own(config, tokens, steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    schedule = flow_schedule("sd3", dict(scheduler.config), FlowSchedule())
    slope = (schedule.max_shift - schedule.base_shift) / (4096 - 256)
    mu = schedule.base_shift + slope * (tokens - 256) if schedule.use_dynamic_shifting else None
    if not config.get("shift_terminal"):  # whose default schedule nobody uses
        scheduler.set_timesteps(steps, mu=mu)
        assert np.allclose(schedule.from_one_to_least(steps, tokens), scheduler.sigmas.double(), atol=2e-7)
    scheduler.set_timesteps(sigmas=list(np.linspace(1, 1 / steps, steps)), mu=mu)
    assert np.allclose(schedule.from_one_to_part(steps, tokens), scheduler.sigmas.double(), atol=2e-7)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 7, 20, 50])
def test_ddim_times_are_the_schedulers_own(spacing, steps):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0)
    scheduler.set_timesteps(steps)
    schedule = ddim_schedule("sdxl", dict(scheduler.config) | {"clip_sample": False}, NOISE)
    assert schedule.times(steps).tolist() == scheduler.timesteps.tolist()
    assert np.allclose(schedule.abar(), scheduler.alphas_cumprod.double(), rtol=1e-4)


@pytest.mark.parametrize(
    "spec", [SdSpec(path="nobody/has-this"), SdxlSpec(path="nobody/has-this")], ids=lambda s: s.kind
)
def test_a_variance_preserving_schedule_lies_strictly_within_one_and_zero(spec):
    sigmas = torch.from_numpy(spec.sigmas(50)).float()
    assert 0.9 < float(sigmas[0]) < 1.0
    assert 0.02 < float(sigmas[-1]) < 0.03
    check_sigmas("sd", sigmas, 50, partial=True)
    with pytest.raises(ContractError, match="they run from 1 to 0"):
        check_sigmas("shapes", sigmas, 50)
    with pytest.raises(ContractError, match="they lie within 1 and 0"):
        check_sigmas("sd", sigmas + 0.2, 50, partial=True)


def test_a_whole_time_is_found_again_from_its_float32_level_and_others_lie_between():
    diffusion = VariancePreserving(NOISE, torch.device("cpu"))
    table = torch.from_numpy(NOISE.table())
    assert torch.equal(diffusion.time(table.float()), torch.arange(1000.0))
    middle = (table[1:] + table[:-1]).float() / 2
    assert torch.allclose(diffusion.time(middle), torch.arange(999.0) + 0.5, atol=2e-2)


@given(level=st.floats(0.05, 0.95), seed=st.integers(0, 100), prediction=st.sampled_from(["epsilon", "v_prediction"]))
def test_a_perfect_prediction_gives_noise_minus_image(level, seed, prediction):
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn((2, 3, 1, 2, 2), generator=generator)
    sigma = torch.full((3,), level)
    share = torch.tensor(level**2 + (1 - level) ** 2).sqrt()  # a = (1 - level) / share, s = level / share
    perfect = noise if prediction == "epsilon" else ((1 - level) * noise - level * image) / share
    schedule = DdimSchedule(prediction_type=prediction)
    diffusion = VariancePreserving(schedule, torch.device("cpu"))
    latents = (1 - level) * image + level * noise
    assert torch.allclose(diffusion.velocity(perfect, latents, sigma), noise - image, atol=1e-4)
    assert torch.allclose(diffusion.network_input(latents, sigma), latents / share, atol=1e-5)


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        (flow_schedule, {"use_karras_sigmas": True}, "turns 'use_karras_sigmas' on"),
        (flow_schedule, {"stochastic_sampling": True}, "turns 'stochastic_sampling' on"),
        (ddim_schedule, {"clip_sample": True}, "turns 'clip_sample' on"),
        (ddim_schedule, {"rescale_betas_zero_snr": True}, "turns 'rescale_betas_zero_snr' on"),
        (ddim_schedule, {"prediction_type": "sample"}, "'prediction_type' 'sample'; supported: epsilon, v_prediction"),
        (ddim_schedule, {"beta_schedule": "squaredcos_cap_v2"}, "'beta_schedule' 'squaredcos_cap_v2'; supported"),
    ],
)
def test_a_scheduler_that_is_not_supported_is_refused(read, config, message):
    default = FlowSchedule() if read is flow_schedule else DdimSchedule()
    with pytest.raises(AegpoError, match=message):
        read("sd", config, default)
