"""What plugin authors' tests call beside the checks: installed plugins, arms of a file, images, adapters, entropies."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from worlds import CPU, asked, execution

from aegpo.attention.entropy import measure_call
from aegpo.errors import ContractError, SpecError
from aegpo.models.shapes import ShapesSpec
from aegpo.testing import adapt, attention_entropies, check_installed, load_arms, paint
from aegpo.train.rollouts import sample_deterministic

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle on a green background", "two blue squares on a red background"]
SOURCE = '''
from typing import Literal
import aegpo

class Constant(aegpo.RewardSpec):
    """The same score for everything."""
    kind: Literal["constant"] = "constant"

    def score(self, images, prompts):
        return images.new_zeros(len(images))

@aegpo.hookimpl
def aegpo_register_rewards(registry):
    registry.add(Constant)
'''


@pytest.fixture
def model(tiny_weights):
    return ShapesSpec(weights=tiny_weights).build(CPU)


@pytest.fixture
def constant(tmp_path, monkeypatch):
    """The spec of a distribution that is installed, `aegpo-constant`."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "aegpo_constant.py").write_text(SOURCE)
    info = tmp_path / "aegpo_constant-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aegpo-constant\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[aegpo]\nconstant = aegpo_constant\n")
    import aegpo_constant

    yield aegpo_constant.Constant
    sys.modules.pop("aegpo_constant")


def start(model) -> torch.Tensor:
    return torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(0))


def test_an_installed_spec_is_found(constant):
    check_installed(constant, "aegpo-constant")


def test_a_spec_that_another_distribution_brings_is_said_to_be_its(constant):
    with pytest.raises(ContractError, match="spec 'Constant' is registered by 'aegpo-constant', not by 'aegpo-other'"):
        check_installed(constant, "aegpo-other")


def test_a_spec_that_is_left_out_is_not_found(constant, monkeypatch):
    monkeypatch.setenv("AEGPO_BLOCK_PLUGINS", "aegpo-constant")
    with pytest.raises(
        ContractError, match="'Constant' is not registered; distribution 'aegpo-constant' needs an entr"
    ):
        check_installed(constant, "aegpo-constant")


def test_arms_are_those_of_the_file_with_what_is_set():
    arms = load_arms(ROOT / "experiments" / "smoke.yaml", ["training_steps=7"])
    assert arms
    assert {experiment.training_steps for experiment in arms.values()} == {7}
    with pytest.raises(SpecError, match="training_steps"):
        load_arms(ROOT / "experiments" / "smoke.yaml", ["training_steps=0"])


def test_images_are_those_of_the_deterministic_sampler(model):
    images = paint(model, PROMPTS, start(model), steps=4)
    assert images.shape == (2, 3, 24, 24)
    assert not images.requires_grad
    expected = sample_deterministic(execution(model, 4), start(model), model.encode(asked(PROMPTS)))
    assert torch.equal(images, expected)


def test_adapters_do_nothing_until_they_are_disturbed(model):
    plain = paint(model, PROMPTS, start(model), steps=2)
    targets = ShapesSpec().adapter_targets
    adapt(model, targets, disturbed=False)
    trained = {name for name, weight in model.policy.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert torch.equal(paint(model, PROMPTS, start(model), steps=2), plain)


def test_disturbed_adapters_do_something_the_same_every_time(tiny_weights):
    first, second = (ShapesSpec(weights=tiny_weights).build(CPU) for _ in range(2))
    plain = paint(first, PROMPTS, start(first), steps=2)
    for model in (first, second):
        adapt(model, ShapesSpec().adapter_targets)
    images = paint(first, PROMPTS, start(first), steps=2)
    assert float((images - plain).abs().max()) > 1e-3
    assert torch.equal(images, paint(second, PROMPTS, start(second), steps=2))


def test_entropies_are_means_over_layers_and_heads_of_what_the_tap_sees(model):
    sigma = torch.tensor([0.8, 0.5])
    found = attention_entropies(model, PROMPTS, start(model), sigma)
    assert set(found) == {"joint", "image-image", "image-text", "text-image", "text-text"}
    calls = []
    with torch.no_grad(), model.tap_attention(calls.append):
        model.velocity(start(model), sigma, model.encode(asked(PROMPTS)))
    each = torch.stack([measure_call(call, ("joint",))["joint"].entropy for call in calls])  # (layers, 2, heads)
    assert torch.allclose(found["joint"], each.mean(dim=(0, 2)), atol=1e-5)
    assert (found["joint"] > 0).all()
    assert (found["joint"] <= math.log(calls[0].key.shape[2])).all()
