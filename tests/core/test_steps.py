"""Scales and ends of a plan's steps that cannot be, and samplers of before there were any: who is blamed, and how."""

from __future__ import annotations

from dataclasses import replace

import nonconforming as bad
import numpy as np
import pytest
from worlds import GaussianSpec, plan_of, small_experiment

from aegpo import testing
from aegpo.core import contracts
from aegpo.errors import ContractError
from aegpo.method.planning import problems as plan_problems
from aegpo.method.samplers import FlowSde
from aegpo.method.selectors import MergedSelector
from aegpo.method.trees import BranchingTree, IndependentTree
from aegpo.train.engine import Engine

FIRST = [[1, 0, 0, 0]] * 2  # noise and learning in the first step only
COUNTS = np.array([2, 2])


def check(tree=None, steps=FIRST, **changes) -> None:
    """A plan of 2 x 2 rollouts and 4 steps with other scales or ends, as a tree's."""
    plan = replace(plan_of(tree or IndependentTree(), COUNTS, steps), **changes)
    contracts.check_plan("t", plan, COUNTS, np.array(steps, dtype=bool))


def scaled(level: int, value: float) -> tuple[np.ndarray, ...]:
    """Scales of 1, but for one edge."""
    arrays = [np.ones(4) for _ in range(4)]
    arrays[level][2] = value
    return tuple(arrays)


def ending(*levels: int) -> tuple[np.ndarray, ...]:
    """Ends of each level's steps, the same for all nodes."""
    return tuple(np.full(4, level) for level in levels)


CASES = [
    (
        lambda: check(scale=scaled(1, 0.0)),
        "tree 't' scales the noise of denoising step 1 by 0; a scale is finite and above 0, and a step without noise "
        "is one that is not 'noisy'",
    ),
    (
        lambda: check(scale=scaled(3, np.inf)),
        "tree 't' scales the noise of denoising step 3 by inf; a scale is finite and above 0, and a step without noise "
        "is one that is not 'noisy'",
    ),
    (lambda: check(scale=scaled(0, 1.0)[:3]), "tree 't' planned 3 denoising steps in 'scale'; 4 were asked"),
    (
        lambda: check(scale=(*scaled(0, 1.0)[:3], np.ones(5))),
        "tree 't' returned 'scale' of step 3 of shape (5,), float64; a numpy array of (4,), float64 was asked",
    ),
    (
        lambda: check(until=tuple(level.astype(float) for level in ending(1, 2, 3, 4))),
        "tree 't' returned 'until' of step 0 of shape (4,), float64; a numpy array of (4,), int64 was asked",
    ),
    (
        lambda: check(until=ending(1, 1, 3, 4)),
        "tree 't' ends denoising step 1 at level 1; a step ends at level 2 to 4",
    ),
    (
        lambda: check(until=ending(1, 2, 3, 5)),
        "tree 't' ends denoising step 3 at level 5; a step ends at level 4 to 4",
    ),
    (
        lambda: check(until=ending(1, 3, 4, 4)),
        "tree 't' planned a step until level 3 that ends at 4 at level 2, inside a longer step; all edges of a longer "
        "step name the same end",
    ),
    (
        lambda: check(steps=[[1, 1, 0, 0]] * 2, until=ending(2, 2, 3, 4)),
        "tree 't' planned noise at level 1, inside a longer step; it belongs to the edge where the step begins",
    ),
    (
        lambda: check(IndependentTree(noise="none"), [[1, 1, 0, 0]] * 2, until=ending(2, 2, 3, 4)),
        "tree 't' planned learning at level 1, inside a longer step; it belongs to the edge where the step begins",
    ),
    (
        lambda: check(
            BranchingTree(), [[0, 1, 0, 0]] * 2, until=(np.full(2, 2), np.full(4, 2), np.full(4, 3), np.full(4, 4))
        ),
        "tree 't' planned a split at level 1, inside a longer step; split where the step begins",
    ),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message for _, message in CASES])
def test_a_plan_whose_steps_cannot_be_taken_is_blamed_on_its_tree(call, message):
    with pytest.raises(ContractError) as caught:
        call()
    assert str(caught.value) == message


def test_scales_and_ends_that_can_be_pass():
    check(scale=scaled(0, 4.0), until=ending(1, 4, 4, 4))
    check(until=ending(4, 4, 4, 4))
    check(until=ending(1, 3, 3, 4))


# --- parts of others -------------------------------------------------------------------------------------------------

OLD = (
    "sampler 'bygone' has transition(latents, velocity, sigma, sigma_next), as in aegpo 0.1, and cannot scale its "
    "noise; let it take 'scale: Tensor | None = None', (B,) factors of its noise rate, or choose a tree that scales "
    "none"
)


def test_a_sampler_of_the_first_signature_serves_plans_that_scale_nothing():
    experiment = small_experiment(GaussianSpec(), sampler=bad.Bygone(), selector=MergedSelector())
    assert list(plan_problems(experiment)) == []
    plain = Engine.build(small_experiment(GaussianSpec(), sampler=FlowSde(), selector=MergedSelector()))
    assert Engine.build(experiment).step(1).metrics == plain.step(1).metrics


def test_a_sampler_of_the_first_signature_is_told_what_to_take_before_any_noise_is_scaled():
    experiment = small_experiment(GaussianSpec(), sampler=bad.Bygone(), tree=BranchingTree(split_noise=2))
    (problem,) = plan_problems(experiment)
    assert (problem.location, problem.message) == (("sampler",), OLD)
    with pytest.raises(ContractError) as caught:
        Engine.build(experiment).step(1)
    assert str(caught.value) == OLD


@pytest.mark.parametrize(
    ("conforms", "spec", "message"),
    [
        (testing.check_sampler, bad.Bygone(), OLD),
        (testing.check_sampler, bad.Deaf(), "sampler 'deaf' adds no less noise at a 'scale' of 0.5 at step 0"),
        (testing.check_sampler, bad.Loud(), "sampler 'loud' takes another step at a 'scale' of 1 than without one"),
        (
            testing.check_selector,
            bad.Overlapping(),
            "selector 'overlapping' chose step 1, which it joins to an earlier one",
        ),
        (testing.check_tree, bad.Silencer(), "tree 'silencer' scales the noise of denoising step 0 by 0"),
    ],
)
def test_a_part_that_does_not_conform_is_found(conforms, spec, message):
    with pytest.raises(ContractError) as caught:
        conforms(spec)
    assert str(caught.value).startswith(message)
