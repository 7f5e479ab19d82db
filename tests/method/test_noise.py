"""Noise that stochastic steps leave in images: the recursion against published presets, and where each arm shows it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_samplers import sd3_sigmas
from worlds import GaussianSpec, asked, execution, plan_of, small_experiment

from aegpo.core.sections import RolloutsSpec
from aegpo.method.planning import problems as plan_problems
from aegpo.method.residual_noise import noise_levels, residual_noise
from aegpo.method.samplers import CpsSampler, DanceSde, DdimSampler, FlowSde
from aegpo.method.selectors import FixedSelector, UniformSelector
from aegpo.method.trees import BranchingTree, IndependentTree
from aegpo.train.engine import Engine
from aegpo.train.noise import StepNoise
from aegpo.train.rollouts import roll_out


def flux_sigmas() -> list[float]:
    """Flow-GRPO's FLUX script at 512 x 512: 6 steps."""
    shift = math.exp(0.5 + (1024 - 256) * 0.65 / 3840)
    return [shift / (shift + 1 / time - 1) for time in np.linspace(1, 1 / 6, 6)] + [0.0]


def shifted(steps: int) -> list[float]:
    """shift 3 applied once, as DanceGRPO and MixGRPO do."""
    even = np.linspace(1, 0, steps + 1)
    return list(3 * even / (1 + 2 * even))


def trajectory(sampler, sigmas, noisy) -> tuple[float, float]:
    """Noise before the last step and after it, with noise at the given steps."""
    sigmas = np.array(sigmas)
    steps = [[int(step in noisy) for step in range(len(sigmas) - 1)]]
    levels = noise_levels(plan_of(IndependentTree(), [2], steps), sampler.table(sigmas), sigmas)
    return float(levels[-2][0]), float(levels[-1][0])


PRESETS = [
    # Flow-GRPO on SD3.5, with 10 and 40 steps, and on FLUX; MixGRPO in its first window; DanceGRPO; MixGRPO later.
    (FlowSde(noise_level=0.7), sd3_sigmas(10), range(10), 0.249, 0.062),
    (FlowSde(noise_level=0.7), sd3_sigmas(40), range(40), 0.057, 0.016),
    (FlowSde(noise_level=0.9), flux_sigmas(), range(6), 0.424, 0.373),
    (FlowSde(noise_level=0.7), shifted(25), range(4), 0.117, 0.0),
    (DanceSde(eta=0.3), shifted(16), range(16), 0.186, 0.132),
    (FlowSde(noise_level=0.7), shifted(25), range(19, 23), 0.122, 0.0),
]


@pytest.mark.parametrize(("sampler", "sigmas", "noisy", "before", "left"), PRESETS)
def test_the_noise_left_by_published_presets(sampler, sigmas, noisy, before, left):
    found = trajectory(sampler, sigmas, noisy)
    assert found == pytest.approx((before, left), abs=1e-3)


@pytest.mark.parametrize("sampler", [CpsSampler(), CpsSampler(noise_level=0.3), DdimSampler(), DdimSampler(eta=0.5)])
def test_coefficient_preserving_steps_leave_exactly_the_schedules_noise(sampler):
    sigmas = np.array(sd3_sigmas())
    levels = noise_levels(plan_of(IndependentTree(), [2], [[1] * 9 + [0]]), sampler.table(sigmas), sigmas)
    np.testing.assert_allclose([level[0] for level in levels], sigmas, atol=1e-12)


def test_the_recursion_is_what_rollouts_of_a_single_image_have():
    steps, count = 6, 4000
    model = GaussianSpec(spread=0.0).build(torch.device("cpu"))
    sampler, sigmas = FlowSde(), GaussianSpec().sigmas(steps)
    plan = plan_of(IndependentTree(), [count], [[1] * steps])
    how = execution(model, steps, sampler, micro_batch=count)
    latents = roll_out(how, plan, model.encode(asked(["0.8"])), StepNoise(0)).latents
    expected = residual_noise(plan, sampler.table(sigmas), sigmas)
    assert float((latents - 0.8).std()) == pytest.approx(expected, rel=0.02)
    assert expected > 0.1


def test_a_predicted_clean_image_has_none_of_the_last_steps_noise_and_the_trained_edge_keeps_its_own():
    steps = 4
    model = GaussianSpec(spread=0.5).build(torch.device("cpu"))
    plan = plan_of(IndependentTree(), [6], [[1] * steps])
    how = execution(model, steps)
    cond = model.encode(asked(["0.8"]))
    final = roll_out(how, plan, cond, StepNoise(0))
    how = replace(how, predicted_clean=True)
    clean = roll_out(how, plan, cond, StepNoise(0))
    assert torch.equal(clean.edges.next_latents, final.edges.next_latents)
    assert torch.equal(clean.edges.log_prob, final.edges.log_prob)
    last = final.edges.latents[final.edges.level == steps - 1]
    with torch.no_grad():
        velocity = model.velocity(last, how.sigmas[-2].expand(6), cond.select(torch.zeros(6, dtype=torch.int64)))
    torch.testing.assert_close(clean.latents, last - how.sigmas[-2] * velocity)
    assert not torch.equal(clean.images, final.images)
    sigmas = GaussianSpec().sigmas(steps)
    assert residual_noise(plan, FlowSde().table(sigmas), sigmas, predicted_clean=True) == 0


def test_every_step_of_a_run_reports_the_noise_it_leaves():
    found = {}
    for decode in ("final", "predicted-clean"):
        rollouts = RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=4, decode=decode)
        experiment = small_experiment(GaussianSpec(), selector=UniformSelector(last=True), rollouts=rollouts)
        found[decode] = Engine.build(experiment).step(1).metrics["residual_noise"]
    assert found["final"] > 0.1
    assert found["predicted-clean"] == 0


def test_a_split_at_a_step_whose_noise_is_left_out_is_refused():
    rollouts = RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=4, decode="predicted-clean")
    changes = {"selector": FixedSelector(steps=(1, 3)), "tree": BranchingTree(), "rollouts": rollouts}
    found = list(plan_problems(small_experiment(GaussianSpec(), **changes)))
    assert [problem.location for problem in found] == [("tree",)]
    assert found[0].message.startswith("tree 'branching' splits at the last denoising step, whose noise 'decode: ")
