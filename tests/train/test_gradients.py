"""Gradients that are asked for and not learned from."""

from __future__ import annotations

import pytest
import torch
from test_learning import NO_CHANGE, assert_all_close, gradients, sampled
from worlds import GaussianSpec, execution, learner

from aegpo.errors import AegpoError
from aegpo.train.noise import StepNoise


@pytest.fixture
def how():
    return execution(GaussianSpec().build(torch.device("cpu")), 4)


def test_they_are_those_of_an_optimizer_step_on_all_rollouts_before_it_clips(how):
    batch = sampled(how)
    (expected,) = gradients(how, batch)
    asked = learner(how, **(NO_CHANGE | {"max_grad_norm": 1e-3, "rollouts_per_update": 2, "inner_epochs": 3}))
    before = asked.state_dict()
    assert_all_close(asked.gradients(*batch, StepNoise(0)), expected)
    assert_all_close(asked.state_dict().values(), before.values(), rtol=0, atol=0)
    assert asked.updates == 0
    assert all(weight.grad is None for weight in asked.weights.trained.values())


def test_they_are_zero_where_nothing_is_learned(how):
    rollouts, credit, cond = sampled(how)
    found = learner(how, drop_zero_credit=True).gradients(rollouts, torch.zeros_like(credit), cond, StepNoise(0))
    assert [tuple(each.shape) for each in found] == [tuple(w.shape) for w in learner(how).weights.trained.values()]
    assert not any(each.any() for each in found)


def test_those_of_float16_are_scaled_up_and_back_and_less_where_they_do_not_fit(how):
    rollouts, credit, cond = sampled(how)
    expected = learner(how).gradients(rollouts, credit, cond, StepNoise(0))
    asked = learner(how)
    scaler = asked._precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert_all_close(asked.gradients(rollouts, credit, cond, StepNoise(0)), expected)
    assert scaler.get_scale() == 1024
    scaler.update(2.0**126)
    huge = asked.gradients(rollouts, credit * 1e6, cond, StepNoise(0))
    assert_all_close([each / 1e6 for each in huge], expected)
    assert 1 < scaler.get_scale() < 2.0**126


def test_gradients_that_are_not_finite_are_called_diverged(how):
    rollouts, credit, cond = sampled(how)
    how.model.policy.mean.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(AegpoError, match="training diverged"):
        learner(how).gradients(rollouts, credit, cond, StepNoise(0))
