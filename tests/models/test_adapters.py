"""LoRA adapters: how they begin, and how many weights a published recipe trains."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FluxTransformer2DModel
from repository import ROOT
from torch import nn

from aegpo.config.loading import load_experiment_file
from aegpo.core.sections import PolicySpec
from aegpo.models.adapters import add_adapters
from aegpo.models.flux import ARCHITECTURE
from aegpo.plugin.manager import load_registries, plugin_manager

WIDTH, RANK = 400, 50


def matrices(**fields) -> tuple[torch.Tensor, torch.Tensor]:
    """The two matrices of an adapter of a square layer, as they begin."""
    torch.manual_seed(0)
    policy = nn.ModuleDict({"to_q": nn.Linear(WIDTH, WIDTH)})
    add_adapters(policy, PolicySpec(train="lora", rank=RANK, alpha=RANK, **fields))
    weights = dict(policy.named_parameters())
    return weights["to_q.lora_A.default.weight"].detach(), weights["to_q.lora_B.default.weight"].detach()


def test_gaussian_adapters_begin_normal_with_the_inverse_rank_and_are_what_nobody_asked_for():
    begun, second = matrices()
    assert float(begun.std()) == pytest.approx(1 / RANK, rel=0.02)
    assert float((begun.abs() > 2 / RANK).float().mean()) == pytest.approx(math.erfc(math.sqrt(2)), rel=0.1)
    assert not second.any()
    assert torch.equal(begun, matrices(init="gaussian")[0])


def test_default_adapters_begin_as_linear_layers_do():
    begun, second = matrices(init="default")
    bound = 1 / math.sqrt(WIDTH)  # Kaiming's uniform with a = sqrt(5)
    assert float(begun.abs().max()) == pytest.approx(bound, rel=0.001)
    assert float(begun.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not second.any()


def test_the_adapters_of_the_flux_files_are_those_of_dancegrpos_script():
    registries = load_registries(plugin_manager())
    files = [
        load_experiment_file(ROOT / "experiments" / f"flux_{name}.yaml", registries) for name in ("dance_grpo", "aegpo")
    ]
    one, other = (file.arms["lora"].policy for file in files)
    assert one == other
    assert (one.init, one.targets) == ("default", ("to_q", "to_k", "to_v", "to_out.0"))
    with torch.device("meta"):
        network = FluxTransformer2DModel.from_config(dict(ARCHITECTURE))
        add_adapters(network, one)
    projections = 19 * 4 + 38 * 3  # of 19 two-stream blocks, and of 38 of one stream, which have no to_out
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    assert trained == projections * one.rank * 2 * 3072 == 149_422_080
