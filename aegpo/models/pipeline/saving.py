"""Writes a trained policy in diffusers' formats: a LoRA file, or a whole pipeline."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from aegpo.errors import AegpoError
from aegpo.models.base_policy import cast
from aegpo.models.pipeline.loading import load_pipeline
from aegpo.models.pipeline.options import PipelineOptions


def save_adapters(spec: PipelineOptions, policy: nn.Module, folder: Path) -> None:
    """`pytorch_lora_weights.safetensors`, as `pipe.load_lora_weights(folder)` reads it.

    The adapter's scale, alpha / rank, is in the weights, and the header says alpha = rank: a loader that reads no
    header takes alpha for the rank, so that all apply one strength. Keys `.alpha` would not do: they make diffusers
    take the file for one of kohya's.

    Raises:
        AegpoError: if the policy has no adapters.
    """
    if not has_adapters(policy):
        raise AegpoError(
            "the policy was fine-tuned in full, so it has no LoRA to write; write a whole pipeline instead"
        )
    metadata = _collate_lora_metadata({spec.network: policy})
    (config,) = metadata.values()
    scale = config["lora_alpha"] / config["r"]
    config["lora_alpha"] = config["r"]
    weights = {
        name: weight * scale if "lora_B" in name else weight
        for name, weight in get_peft_model_state_dict(policy).items()
    }
    cls: Any = getattr(diffusers, spec.pipeline_class)
    folder.mkdir(parents=True, exist_ok=True)
    cls.save_lora_weights(folder, **{f"{spec.network}_lora_layers": weights}, **metadata)


def save_pipeline(
    spec: PipelineOptions, source: Path, policy: nn.Module, dtypes: Mapping[str, torch.dtype], folder: Path
) -> None:
    """The pipeline of `source` with the policy as its network, in the dtypes it was loaded with."""
    network = merged(policy)
    cast(network, dtypes)
    network.to("cpu")
    pipeline = load_pipeline(spec, source, {spec.network: network})
    pipeline.save_pretrained(folder, variant=spec.variant)


def has_adapters(policy: nn.Module) -> bool:
    """True if LoRA adapters are in the policy."""
    return any(isinstance(module, BaseTunerLayer) for module in policy.modules())


def merged(policy: nn.Module) -> nn.Module:
    """A copy of the policy with its adapters added to the weights they adapt."""
    network = copy.deepcopy(policy)
    adapted = [(name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        network.set_submodule(name, module.get_base_layer())
    if adapted:
        del network.peft_config
    return network.requires_grad_(False)
