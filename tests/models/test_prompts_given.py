"""What models are given to encode: prompts, not strings; those that take them for strings are told what to write."""

from __future__ import annotations

import pytest
import torch
from test_base_policy import spec_of
from worlds import GaussianModel, asked, small_experiment

from aegpo.core.records import Conditioning, Prompt
from aegpo.errors import ContractError
from aegpo.testing import check_model
from aegpo.train.policy import Policy

OLD = "; it was written for aegpo 0.1, whose prompts were strings: use prompt.text"


def model_of(read):
    """A model that reads each prompt its own way."""

    class Reader(GaussianModel):
        def encode(self, prompts):
            return Conditioning(torch.tensor([float(read(prompt)) for prompt in prompts]).view(-1, 1, 1))

        def prepare(self, prompts):
            self.encode(prompts)

    return spec_of(Reader)


READ_AS_STRINGS = [float, lambda prompt: prompt.strip(), lambda prompt: {"0.1": 1.0}[prompt], lambda prompt: prompt[0]]


@pytest.mark.parametrize("read", READ_AS_STRINGS, ids=["float", "strip", "key", "[]"])
def test_a_model_of_the_first_edition_is_told_what_to_write_now(read):
    policy, prompts = Policy(small_experiment(model_of(read))), asked(["0.1", "0.2"])
    for use in (
        lambda: policy.check(prompts[0]),
        lambda: policy.prepare(prompts),
        lambda: policy.images(prompts, policy.evaluation_noise(prompts)),
        lambda: check_model(policy.experiment.model, ["0.1", "0.2"]),
    ):
        with pytest.raises(ContractError) as error:
            use()
        assert error.value.message.startswith("model 'numbers' failed with ")
        assert error.value.message.endswith(OLD)
        assert error.value.location == ("model",)


def test_other_failures_of_a_model_are_not_put_down_to_its_edition():
    policy = Policy(small_experiment(model_of(lambda prompt: {}[prompt.text])))
    with pytest.raises(ContractError, match=r"model 'numbers' failed with KeyError: '0\.1'$"):
        policy.check(Prompt(0, "0.1"))


def test_a_model_is_given_the_prompts_of_a_list_themselves():
    seen = []

    def read(prompt):
        seen.append(prompt)
        return prompt.text

    policy = Policy(small_experiment(model_of(read)))
    prompts = [Prompt(4, "0.1", {"of": "a"}), Prompt(7, "0.1", {"of": "b"})]
    policy.encode(prompts)
    policy.prepare(prompts)
    policy.images(prompts, policy.evaluation_noise(prompts))
    assert seen == prompts * 3
    assert all(one is other for one, other in zip(seen, prompts * 3, strict=True))
