"""What the groups of prompts bring: gradients of two halves that share nothing but the policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from worlds import small_experiment

from aegpo.method.advantages import GainAdvantage, RunningAdvantage
from aegpo.prompts.lists import numbered
from aegpo.report.profile import groups
from aegpo.report.profile.groups import group_values
from aegpo.train.engine import Engine
from aegpo.train.noise import StepNoise

PROMPTS = numbered(("a red circle", "two blue squares"))


@pytest.fixture
def engine(tiny_spec):
    return Engine.build(small_experiment(tiny_spec))


def silent(line: str) -> None:
    pass


def test_asking_for_gradients_leaves_the_policy_as_it_was(engine):
    before = {name: weight.clone() for name, weight in engine.learner.state_dict().items()}
    found = group_values(engine, PROMPTS, silent)
    assert found.rewards.shape == (groups.GROUP, 2)
    assert (np.abs(found.squared_norms) > 0).all()
    after = engine.learner.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())
    assert all(weight.grad is None for weight in engine.policy.weights.trained.values())
    assert engine.learner.updates == 0
    again = group_values(engine, PROMPTS, silent)
    np.testing.assert_allclose(again.squared_norms, found.squared_norms, rtol=1e-4)


def test_the_squared_norm_is_the_product_of_two_halves_that_share_no_noise(engine):
    halves = [groups._half(engine, PROMPTS[0], StepNoise(0, half)) for half in range(2)]
    (first, one), (second, other) = ((rewards, torch.cat([g.flatten() for g in found])) for rewards, found in halves)
    assert not np.isin(first, second).any()
    found = group_values(engine, PROMPTS[:1], silent)
    assert np.array_equal(found.rewards[:, 0], [*first, *second])
    assert found.squared_norms[0] == pytest.approx(float(one.double() @ other.double()), rel=1e-4)
    assert found.cosines[0] == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)), rel=1e-3)


def test_noise_raises_the_norm_of_one_gradient_and_not_the_product_of_two():
    """The identity the measurement rests on, for gradients that are a truth of length 1 and noise of length 10."""
    rng, truth, draws = np.random.default_rng(0), np.zeros(400), 4000
    truth[0] = 1.0
    halves = truth + rng.normal(scale=0.5, size=(2, draws, 400))
    products = [
        groups._product([torch.from_numpy(one)], [torch.from_numpy(two)]) for one, two in zip(*halves, strict=True)
    ]
    assert np.mean(products) == pytest.approx(1, abs=5 * np.std(products) / draws**0.5)
    assert (halves[0] ** 2).sum(axis=1).mean() == pytest.approx(101, rel=0.02)


def test_gradients_are_those_of_the_runs_own_advantage_whatever_it_has_scored(tiny_spec, engine):
    other = Engine.build(small_experiment(tiny_spec, advantage=GainAdvantage()))
    one, two = (group_values(each, PROMPTS, silent).squared_norms for each in (engine, other))
    assert (np.abs(two / one - 1) > 1e-3).any()  # another advantage, another gradient


def test_an_advantage_with_memory_is_asked_of_each_half_as_of_a_stranger_and_forgets_it(tiny_spec):
    engine = Engine.build(small_experiment(tiny_spec, advantage=RunningAdvantage(least=2)))
    found = group_values(engine, PROMPTS, silent)
    assert engine.advantage.report()["known_prompts"] == 0
    known = {"scores": {str(prompt.index): [0.9] * 32 for prompt in PROMPTS}}  # of training prompts with these numbers
    engine.advantage.load_state_dict(known)
    again = group_values(engine, PROMPTS, silent)
    assert engine.advantage.state_dict() == known
    np.testing.assert_allclose(again.squared_norms, found.squared_norms, rtol=1e-4)
