"""Ends of trajectories: how many steps, on which noise levels, and the solver against diffusers'."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import GaussianSpec, asked, execution, plan_of, small_experiment

from aegpo.core.contracts import check_plan
from aegpo.core.records import Tail
from aegpo.core.sections import RolloutsSpec, TailSpec
from aegpo.method.costs import cost
from aegpo.method.selectors import FirstSelector
from aegpo.method.tails import with_tail
from aegpo.method.trees import BranchingTree, IndependentTree, TrunkTree
from aegpo.train.engine import Engine
from aegpo.train.noise import StepNoise
from aegpo.train.rollouts import roll_out


@pytest.mark.parametrize(
    ("total", "noisy", "ratio", "steps"),
    [
        (25, range(4), 0.4, 7),  # MixGRPO-Flash: int((25 - 3) 0.4) = 8 levels, from the window's end to the image
        (25, range(4), 0.2, 3),
        (25, range(18, 22), 0.4, 1),  # int(4 x 0.4) = 1 level in the published code, which then ends above sigma 0
        (10, range(5), 1.0, 5),
    ],
)
def test_the_tail_has_the_published_number_of_steps_and_ends_at_the_image(total, noisy, ratio, steps):
    sigmas = np.linspace(1, 0, total + 1)
    question = np.array([3, 2]), np.array([[step in noisy for step in range(total)]] * 2)
    plan = IndependentTree().plan(*question, np.random.default_rng(0))
    short = with_tail(plan, sigmas, TailSpec(ratio=ratio))
    start = noisy[-1] + 1
    assert short.num_steps == start + steps
    assert short.forwards == 5 * (start + steps)
    assert short.trained_edges == plan.trained_edges
    assert short.tail.start == start
    assert np.array_equal(short.tail.sigmas[: start + 1], sigmas[: start + 1])
    assert short.tail.sigmas[-1] == 0
    assert (np.diff(short.tail.sigmas) < 0).all()
    assert len(short.tail.sigmas) == short.num_steps + 1


@pytest.mark.parametrize("tree", [IndependentTree(start="shared"), BranchingTree(), TrunkTree()])
def test_a_shortened_forest_is_a_forest_with_the_same_leaves(tree):
    counts, steps = np.array([6, 8]), np.array([[1, 0, 1] + [0] * 9, [0, 1, 1] + [0] * 9], dtype=bool)
    plan = tree.plan(counts, steps, np.random.default_rng(0))
    short = with_tail(plan, np.linspace(1, 0, 13), TailSpec(ratio=0.5))
    check_plan(tree.kind, short, counts, steps[:, : short.num_steps])
    assert np.array_equal(short.group, plan.group)
    assert [level.tolist() for level in short.leaves[:4]] == [level.tolist() for level in plan.leaves[:4]]


def test_steps_that_are_trained_without_noise_are_kept():
    plan = plan_of(IndependentTree(noise="none"), [2], [[1] * 6])
    whole = with_tail(plan, np.linspace(1, 0, 7), TailSpec(ratio=0.2))
    assert whole.num_steps == 6  # only the solver changes (DiffusionNFT samples with DPM-Solver)
    assert whole.tail == Tail(0, whole.tail.sigmas, "dpm")


def test_an_euler_tail_of_all_steps_changes_nothing():
    model = GaussianSpec().build(torch.device("cpu"))
    plan = plan_of(IndependentTree(), [4], [[1, 1, 0, 0, 0]])
    how, cond = execution(model, 5), model.encode(asked(["0.5"]))
    same = with_tail(plan, GaussianSpec().sigmas(5), TailSpec(solver="euler", ratio=1))
    plain, tailed = (roll_out(how, each, cond, StepNoise(0)) for each in (plan, same))
    assert torch.equal(plain.latents, tailed.latents)


def test_the_solver_is_diffusers_multistep_of_order_2():
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        lower_order_final=True,
    )
    scheduler.set_timesteps(8)
    sigmas = scheduler.sigmas.double().numpy()
    model = GaussianSpec().build(torch.device("cpu"))
    cond = model.encode(asked(["0.5"]))
    plan = replace(plan_of(IndependentTree(noise="none"), [3], [[1] * 8]), tail=Tail(0, sigmas, "dpm"))
    found = roll_out(execution(model, 8), plan, cond, StepNoise(0))
    theirs = found.edges.latents[found.edges.level == 0]
    with torch.no_grad():
        for time, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            velocity = model.velocity(theirs, sigma.expand(3), cond.select(torch.zeros(3, dtype=torch.int64)))
            theirs = scheduler.step(velocity, time, theirs, return_dict=False)[0]
    torch.testing.assert_close(found.latents, theirs, atol=1e-5, rtol=1e-5)


def test_a_run_with_a_tail_costs_what_check_says():
    rollouts = RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=12, tail=TailSpec())
    experiment = small_experiment(GaussianSpec(), selector=FirstSelector(top_k=3), rollouts=rollouts)
    metrics = Engine.build(experiment).step(1).metrics
    assert metrics["forwards"] == cost(experiment).forwards.low == 8 * (3 + 3)  # int((12 - 2) 0.4) - 1
    assert metrics["residual_noise"] == pytest.approx(0, abs=1e-12)
    assert metrics["ratio_error"] < 1e-5
