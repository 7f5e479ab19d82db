"""The frozen base beside the policy: it is the same network however often it is asked for, inside itself too."""

from __future__ import annotations

import pytest
import torch
from worlds import CPU, small_experiment

from aegpo.core.sections import PolicySpec
from aegpo.models.base_policy import BasePolicy
from aegpo.train.policy import Policy


def moved(network) -> None:
    """Trains the network a little."""
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.add_(0.05)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_base_inside_base_is_the_base_and_so_is_what_follows_inside(tiny_spec, train):
    policy = Policy(small_experiment(tiny_spec, policy=PolicySpec(train=train, rank=2, alpha=4)))
    texts = ["one red circle", "two blue squares"]
    noise = policy.numbered_noise(0, 2, seed=0)
    before = policy.images(texts, noise)
    moved(policy.model.policy)
    trained = policy.images(texts, noise)
    assert not torch.equal(trained, before)
    with policy.base():
        with policy.base():
            assert torch.equal(policy.images(texts, noise), before)
        assert torch.equal(policy.images(texts, noise), before)
    assert torch.equal(policy.images(texts, noise), trained)


def test_an_error_inside_leaves_the_policy_as_it_was(tiny_spec):
    policy = Policy(small_experiment(tiny_spec, policy=PolicySpec(train="lora", rank=2, alpha=4)))
    noise = policy.numbered_noise(0, 1, seed=0)
    moved(policy.model.policy)
    trained = policy.images(["one red circle"], noise)

    def fail() -> None:
        with policy.base(), policy.base():
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(policy.images(["one red circle"], noise), trained)


def test_a_copy_that_waits_elsewhere_waits_there_again_only_after_the_outermost():
    network = torch.nn.Linear(2, 2)
    base = BasePolicy(network, waits_on=torch.device("meta"))
    with pytest.raises(NotImplementedError):  # a copy on the meta device has no values to come back with
        base.active().__enter__()
    base = BasePolicy(network, waits_on=CPU)
    with base.active() as outer, base.active() as inner:
        assert inner is outer
