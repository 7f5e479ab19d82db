"""Models and samplers that say other shapes, or what is not finite, or write into what they are given."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from test_engine import build
from worlds import GaussianModel, GaussianSpec, small_experiment

from aegpo.errors import AegpoError, ContractError
from aegpo.method.advantages import GroupAdvantage
from aegpo.method.samplers import FlowSde

FROM_STEP = [2]  # the training step whose answers are faulty
NOW = [0]


class Late(GaussianSpec):
    """Says something else from a training step on."""

    kind: Literal["late"] = "late"  # type: ignore[assignment]
    member: str
    says: str

    def build(self, device):
        model = GaussianModel(self)
        inner = getattr(model, self.member)

        def faulty(*given):
            good = inner(*given)
            return SAID[self.says](good, *given) if NOW[0] >= FROM_STEP[0] else good

        setattr(model, self.member, faulty)
        return model


def one_nan(good, *_):
    good = good.clone()
    good.view(-1)[0] = float("nan")
    return good


def in_place(good, given, *_):
    given.mul_(0.5)
    return good


SAID = {
    "nan": one_nan,
    "one row": lambda good, *_: good[:1],
    "nothing": lambda good, *_: None,
    "in place": in_place,
}


class LateSde(FlowSde):
    """A sampler whose Gaussians are replaced."""

    kind: Literal["late"] = "late"  # type: ignore[assignment]
    says: str

    def transition(self, latents, velocity, sigma, sigma_next, scale=None):
        good = super().transition(latents, velocity, sigma, sigma_next, scale)
        return GAUSSIANS[self.says](good) if NOW[0] >= FROM_STEP[0] else good


GAUSSIANS = {
    "mean nan": lambda good: dataclasses.replace(good, mean=one_nan(good.mean)),
    "std below 0": lambda good: dataclasses.replace(good, std=-good.std),
    "one mean": lambda good: dataclasses.replace(good, mean=good.mean[:1]),
    "one std": lambda good: dataclasses.replace(good, std=good.std[:1]),
    "nothing": lambda good: None,
}


class Writing(GroupAdvantage):
    """Writes into the plan."""

    def estimate(self, scores, weights, rollouts):
        rollouts.plan.prompt[-1][:] = 0
        return super().estimate(scores, weights, rollouts)


def second_step(**changes):
    """The error of the second training step."""
    NOW[0] = 0
    engine = build(small_experiment(**({"model": GaussianSpec()} | changes)))[0]
    NOW[0] = 1
    engine.step(1)
    NOW[0] = 2
    with pytest.raises(AegpoError) as caught:
        engine.step(2)
    return caught.value


@pytest.mark.parametrize(
    ("member", "says", "message"),
    [
        ("velocity", "nan", "model 'late' returned a velocity that is not finite; finite numbers were asked"),
        ("velocity", "one row", "model 'late' returned a velocity of shape"),
        ("velocity", "nothing", "model 'late' returned a velocity"),
        ("velocity", "in place", "model 'late' changed what it was given in place, which others still need"),
        ("decode", "one row", "model 'late' decoded (1, 3, 4, 4) from"),
        ("decode", "nothing", "model 'late' decoded NoneType from"),
        ("decode", "nan", "model 'late' decoded"),
        ("encode", "nothing", "model 'late' encoded a NoneType; an aegpo.Conditioning was asked"),
    ],
)
def test_what_a_model_says_amid_a_run_is_checked_each_time(member, says, message):
    error = second_step(model=Late(member=member, says=says))
    assert isinstance(error, ContractError)
    assert message in str(error)
    assert error.part == ("model", "late")


@pytest.mark.parametrize("says", GAUSSIANS)
def test_what_a_sampler_says_amid_a_run_is_checked_each_time(says):
    """A mean or a std of one row would broadcast to all without a word."""
    error = second_step(sampler=LateSde(says=says))
    assert isinstance(error, ContractError)
    assert str(error).startswith("sampler 'late' returned ")
    assert error.part == ("sampler", "late")


def test_a_network_that_training_ruined_is_no_models_fault():
    engine = build(small_experiment(GaussianSpec()))[0]
    engine.step(1)
    with torch.no_grad():
        next(engine.policy.model.policy.parameters()).fill_(float("nan"))
    with pytest.raises(AegpoError, match="training diverged"):
        engine.step(2)


def test_an_advantage_may_not_write_into_the_plan():
    engine = build(small_experiment(GaussianSpec(), advantage=Writing()))[0]
    with pytest.raises(ContractError, match="advantage 'group' changed what it was given in place"):
        engine.step(1)
