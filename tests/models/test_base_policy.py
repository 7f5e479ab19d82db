"""The frozen base beside the policy: it is the same network however often it is asked for, inside itself too."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Literal

import pytest
import torch
from worlds import CPU, GaussianModel, GaussianSpec, asked, small_experiment

from aegpo.core.parts import ModelSpec
from aegpo.core.sections import PolicySpec
from aegpo.errors import AegpoError, ContractError
from aegpo.models.base_policy import BasePolicy
from aegpo.models.sd import SdSpec
from aegpo.testing import check_model
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
    prompts = asked(["one red circle", "two blue squares"])
    noise = policy.evaluation_noise(prompts)
    before = policy.images(prompts, noise)
    moved(policy.model.policy)
    trained = policy.images(prompts, noise)
    assert not torch.equal(trained, before)
    with policy.base():
        with policy.base():
            assert torch.equal(policy.images(prompts, noise), before)
        assert torch.equal(policy.images(prompts, noise), before)
    assert torch.equal(policy.images(prompts, noise), trained)


def test_an_error_inside_leaves_the_policy_as_it_was(tiny_spec):
    policy = Policy(small_experiment(tiny_spec, policy=PolicySpec(train="lora", rank=2, alpha=4)))
    noise = policy.evaluation_noise(asked(["one red circle"]))
    moved(policy.model.policy)
    trained = policy.images(asked(["one red circle"]), noise)

    def fail() -> None:
        with policy.base(), policy.base():
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(policy.images(asked(["one red circle"]), noise), trained)


def test_a_copy_that_waits_elsewhere_waits_there_again_only_after_the_outermost():
    network = torch.nn.Linear(2, 2)
    base = BasePolicy(network, waits_on=torch.device("meta"))
    with pytest.raises(NotImplementedError):  # a copy on the meta device has no values to come back with
        base.active().__enter__()
    base = BasePolicy(network, waits_on=CPU)
    with base.active() as outer, base.active() as inner:
        assert inner is outer


def test_the_copy_is_made_in_the_dtypes_it_keeps_and_never_larger():
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64)).to(torch.bfloat16)
    network[1].float()  # as loaders keep some modules
    network.add_module("tied", network[0])
    base = BasePolicy(network)
    network.float().requires_grad_(True)
    with base.active() as copied:
        kept = {name: tensor.dtype for name, tensor in copied.state_dict().items()}
        assert kept["0.weight"] == kept["tied.bias"] == torch.bfloat16
        assert kept["1.weight"] == kept["1.running_mean"] == torch.float32
        assert copied.tied is copied[0]
        for name, tensor in copied.state_dict().items():
            assert tensor.equal(network.state_dict()[name].to(tensor.dtype))
            assert tensor.data_ptr() != network.state_dict()[name].data_ptr()
        assert not any(weight.requires_grad for weight in copied.parameters())


# --- frozen networks by name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shapes", "sd"])
def test_a_frozen_network_that_a_model_does_not_have_is_refused_with_those_it_has(kind, tiny_spec, pipeline_folders):
    spec = tiny_spec if kind == "shapes" else SdSpec(path=str(pipeline_folders["sd"]), height=16, width=16)
    model = spec.build(CPU)
    with pytest.raises(AegpoError) as error, model.frozen("teacher"):
        pass
    assert str(error.value) == f"model {kind!r} has no frozen network 'teacher'; it has 'base'"


class FirstEdition:
    """A model as they were: its base policy has a method of its own."""

    latent_shape = (1, 4, 4)

    def __init__(self, spec: GaussianSpec) -> None:
        model = GaussianModel(spec)
        self.policy, self.encode, self.sigmas = model.policy, model.encode, model.sigmas
        self.velocity, self.decode, self.tap_attention = model.velocity, model.decode, model.tap_attention
        self.base = lambda: model.frozen("base")


def spec_of(model):
    """A spec that conforms, whatever it builds."""

    class Spec(ModelSpec):
        """Numbers for prompts."""

        kind: Literal["numbers"] = "numbers"

        def sigmas(self, steps):
            return GaussianSpec().sigmas(steps)

        def build(self, device):
            return model(GaussianSpec())

    return Spec()


@pytest.mark.parametrize("use", [lambda spec: Policy(small_experiment(spec)), check_model])
def test_a_model_of_the_first_edition_is_told_what_replaces_its_base(use):
    with pytest.raises(ContractError) as error:
        use(spec_of(FirstEdition))
    assert str(error.value).removeprefix("model: ") == (
        "model 'numbers' was built as 'FirstEdition', which has no 'frozen'; asked is  frozen(name: str) -> "
        "AbstractContextManager[None]; it was 'base' in aegpo 0.1"
    )


def test_a_model_that_takes_any_name_for_its_base_does_not_conform():
    class Careless(GaussianModel):
        @contextmanager
        def frozen(self, name):
            with super().frozen("base"):
                yield

    check_model(spec_of(GaussianModel), ["0.1", "0.2"])
    with pytest.raises(ContractError, match="has a frozen network 'no-such-network'; refuse names it does not know"):
        check_model(spec_of(Careless), ["0.1", "0.2"])
