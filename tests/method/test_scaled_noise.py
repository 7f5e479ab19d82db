"""Noise that is scaled, edge by edge: what samplers make of a factor of their rate, and wider splits of BranchGRPO."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_samplers import sd3_sigmas
from worlds import GaussianSpec, plan_of, small_experiment

from aegpo.core.parts import SamplerSpec
from aegpo.core.sections import RolloutsSpec
from aegpo.errors import ContractError
from aegpo.method.planning import made_up_signals, plan_step, table_of
from aegpo.method.planning import problems as plan_problems
from aegpo.method.residual_noise import residual_noise
from aegpo.method.samplers import CpsSampler, DanceSde, DdimSampler, FlowSde
from aegpo.method.selectors import UniformSelector
from aegpo.method.trees import BranchingTree
from aegpo.train.engine import Engine

LOUDER = [
    (FlowSde(noise_level=0.3), FlowSde(noise_level=0.6)),
    (DanceSde(eta=0.2), DanceSde(eta=0.4)),
    (CpsSampler(noise_level=0.4), CpsSampler(noise_level=0.8)),
    (DdimSampler(eta=0.5), DdimSampler(eta=1.0)),
]


ONES = torch.ones(9)


def a_step():
    """Latents, velocity and noise levels of 9 steps: the schedule's, without the last, and one of several levels."""
    generator = torch.Generator().manual_seed(0)
    latents, velocity = (torch.randn((9, 2, 3, 3), generator=generator) for _ in range(2))
    sigmas = torch.tensor(sd3_sigmas())
    sigma, sigma_next = sigmas[:9].clone(), sigmas[1:].clone()[:9]
    sigma_next[4] = sigmas[8]
    return latents, velocity, sigma, sigma_next


@pytest.mark.parametrize(("sampler", "louder"), LOUDER, ids=lambda part: part.kind)
def test_a_scale_of_the_noise_rate_is_the_step_of_a_sampler_with_that_rate(sampler, louder):
    step = a_step()
    found, expected = sampler.transition(*step, torch.full((9,), 2.0)), louder.transition(*step)
    torch.testing.assert_close(found.mean, expected.mean, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found.std, expected.std, atol=1e-6, rtol=1e-5)
    mixed = sampler.transition(*step, torch.tensor([1.0, 2.0] * 4 + [1.0]))
    torch.testing.assert_close(mixed.std[0::2], sampler.transition(*step).std[0::2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed.mean[1::2], expected.mean[1::2], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("sampler", [part for pair in LOUDER for part in pair], ids=repr)
def test_the_table_of_scaled_steps_is_what_transitions_do(sampler):
    sigmas = np.array(sd3_sigmas())
    scale = np.linspace(0.3, 1.0, 9)
    between = sigmas[:9], sigmas[1:10], scale
    table, tried = sampler.table_between(*between), SamplerSpec.table_between(sampler, *between)
    for name in ("latents", "velocity", "std"):
        np.testing.assert_allclose(getattr(table, name), getattr(tried, name), atol=2e-6)


@pytest.mark.parametrize("sampler", [part for part, _ in LOUDER], ids=lambda part: part.kind)
def test_std_only_widens_the_noise_and_leaves_the_drift(sampler):
    step, four = a_step(), torch.full((9,), 4.0)
    plain = sampler.transition(*step)
    found = sampler.model_copy(update={"std_only": True}).transition(*step, four)
    assert torch.equal(found.mean, plain.mean)
    assert torch.equal(found.std, 4 * plain.std)


def test_scaled_noise_keeps_the_marginals_and_std_only_adds_the_rest_of_its_variance():
    """From N(0, sigma^2) of an image at 0 with v = x / sigma: the next variance, against sigma'^2."""
    sigma, sigma_next, scale = np.array([0.6]), np.array([0.599]), np.array([4.0])
    off = {}
    for std_only in (False, True):
        table = DanceSde(eta=0.3, std_only=std_only).table_between(sigma, sigma_next, scale)
        variance = (table.latents + table.velocity / sigma) ** 2 * sigma**2 + table.std**2
        off[std_only] = float((variance - sigma_next**2)[0])
    assert abs(off[False]) < 2e-5  # of the order of the step squared
    assert off[True] == pytest.approx((4**2 - 1) * 0.3**2 * 0.001, rel=0.02)


def test_no_scale_takes_exactly_the_step_of_before_and_a_scale_of_1_the_same_up_to_rounding():
    for sampler in (FlowSde(), DanceSde(), CpsSampler(), DdimSampler()):
        step = a_step()
        plain, none, one = sampler.transition(*step), sampler.transition(*step, None), sampler.transition(*step, ONES)
        assert torch.equal(plain.mean, none.mean)
        torch.testing.assert_close(one.mean, plain.mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.std, plain.std, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "most", "why"),
    [
        (CpsSampler(noise_level=0.8), 1.25, "'noise_level' is 0.8, and at 1 all the noise of a step is new"),
        (DdimSampler(eta=0.3), 1 / 0.3, "'eta' is 0.3, and 1 is ancestral sampling, which has the most"),
    ],
)
def test_more_noise_than_there_is_is_refused(sampler, most, why):
    sigmas = np.array(sd3_sigmas())
    between = sigmas[:9], sigmas[1:10]
    table = sampler.table_between(*between, np.full(9, most))
    np.testing.assert_allclose(table.std[0], sigmas[1], rtol=1e-6)  # from pure noise, all of it is new
    assert all(np.isfinite(values).all() for values in vars(table).values())
    assert bool(sampler.transition(*a_step(), torch.full((9,), most)).mean.isfinite().all())
    with pytest.raises(ContractError) as caught:
        sampler.table_between(*between, np.array([1.0] * 8 + [4.0]))
    assert str(caught.value) == (
        f"sampler {sampler.kind!r} can have at most {most:.4g} times its noise, not 4 times: {why}; lower it, scale "
        "less, or set 'std_only: true'"
    )
    sampler.model_copy(update={"std_only": True}).table_between(*between, np.full(9, 4.0))


# --- wider splits ----------------------------------------------------------------------------------------------------


def test_branchgrpos_children_have_four_times_the_noise_and_nobody_else_has():
    tree = BranchingTree(splits=(0, 3, 6, 9), noise="all", start="batch", split_noise=4)
    plan = plan_of(tree, [16, 16], [[1] * 20] * 2)
    for level, scale in enumerate(plan.scale):
        assert set(scale) == ({4.0} if level in (0, 3, 6, 9) else {1.0})
    same = plan_of(BranchingTree(splits=(0, 3, 6, 9), noise="all", start="batch"), [16, 16], [[1] * 20] * 2)
    assert same.scale is None
    assert plan.forwards == same.forwards
    assert all(np.array_equal(one, other) for one, other in zip(plan.noisy, same.noisy, strict=True))


def test_only_siblings_are_wider_where_a_split_is_partial():
    plan = plan_of(BranchingTree(split_noise=2), [3, 2], [[1, 1, 1, 0]] * 2)
    assert [scale.tolist() for scale in plan.scale] == [[2] * 4, [2, 2, 1, 1, 1], [1] * 5, [1] * 5]


def test_wider_splits_leave_the_noise_that_check_foretells():
    rollouts = RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=6)
    left = {}
    for std_only, factor in ((False, 1.0), (False, 2.0), (True, 2.0)):
        sampler = DanceSde(eta=0.3, std_only=std_only)
        tree = BranchingTree(noise="all", splits=(0, 3), split_noise=factor)
        chosen = {"tree": tree, "sampler": sampler, "selector": UniformSelector(last=True)}
        experiment = small_experiment(GaussianSpec(), rollouts=rollouts, **chosen)
        plan = plan_step(experiment, next(iter(made_up_signals(experiment))))
        expected = residual_noise(plan, table_of(experiment, plan), experiment.sigmas)
        left[std_only, factor] = Engine.build(experiment).step(1).metrics["residual_noise"]
        assert left[std_only, factor] == pytest.approx(expected, rel=1e-12)
    assert left[False, 1.0] < left[False, 2.0] < left[True, 2.0]


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_a_split_without_noise_of_its_own_is_refused(factor):
    with pytest.raises(ValidationError, match="split_noise"):
        BranchingTree(split_noise=factor)


def test_splits_wider_than_the_sampler_can_are_refused_at_load_and_std_only_is_not():
    tree = BranchingTree(split_noise=4)
    (problem,) = plan_problems(small_experiment(GaussianSpec(), tree=tree, sampler=CpsSampler()))
    assert problem.location == ("sampler",)
    assert problem.message.startswith("sampler 'cps' can have at most 1.25 times its noise, not 4 times: 'noise_level'")
    wide = small_experiment(GaussianSpec(), tree=tree, sampler=CpsSampler(std_only=True))
    assert list(plan_problems(wide)) == []


def test_std_only_is_said_to_change_nothing_where_no_noise_is_scaled():
    (problem,) = plan_problems(small_experiment(GaussianSpec(), sampler=FlowSde(std_only=True)))
    assert (problem.location, problem.warning) == (("sampler",), True)
    assert problem.message == (
        "'std_only' changes nothing: tree 'independent' as it is set scales no step's noise; leave it out, or use "
        "'tree: {kind: branching, split_noise: 4}'"
    )
