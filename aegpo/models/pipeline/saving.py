"""Writes a trained policy for others: a LoRA file, as diffusers or ComfyUI loads it, or a whole pipeline."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from aegpo.core.files import write_json
from aegpo.errors import AegpoError
from aegpo.models.base_policy import cast
from aegpo.models.pipeline.loading import load_component, load_pipeline
from aegpo.models.pipeline.options import PipelineOptions

# --- LoRA ------------------------------------------------------------------------------------------------------------


def save_adapters(spec: PipelineOptions, policy: nn.Module, folder: Path) -> None:
    """`pytorch_lora_weights.safetensors`, as `pipe.load_lora_weights(folder)` reads it.

    The adapter's scale, alpha / rank, is in the weights, and the header says alpha = rank: a loader that reads no
    header takes alpha for the rank, so that all apply one strength. Keys `.alpha` would not do: they make diffusers
    take the file for one of kohya's.

    Raises:
        AegpoError: if the policy has no adapters.
    """
    weights = _scaled_adapters(policy)
    metadata = _collate_lora_metadata({spec.network: policy})
    (config,) = metadata.values()
    config["lora_alpha"] = config["r"]
    cls: Any = getattr(diffusers, spec.pipeline_class)
    folder.mkdir(parents=True, exist_ok=True)
    cls.save_lora_weights(folder, **{f"{spec.network}_lora_layers": weights}, **metadata)


def save_for_comfyui(spec: PipelineOptions, policy: nn.Module, file: Path) -> None:
    """One safetensors file of the LoRA, by the names that ComfyUI knows the layers of diffusers' networks by.

    UNets: those of kohya's sd-scripts, `lora_unet_down_blocks_0_...to_q.lora_down.weight`, as diffusers' own converter
    writes them. Transformers: `transformer.transformer_blocks.0.attn.to_q.lora_down.weight`, which ComfyUI maps onto
    its own, fused layers, each part at its place (comfy/lora.py at ec93dca, model_lora_keys_unet: every linear layer of
    SD 3.5 and FLUX.1). The adapter's scale is in the weights and each `.alpha` is the rank, as that converter has it,
    so that a reader that knows no alpha applies the same strength.

    Raises:
        AegpoError: if the policy has no adapters, or ComfyUI's names for this kind of model are not known.
    """
    if spec.comfyui_prefix is None:
        raise AegpoError(
            f"model {spec.kind!r}: ComfyUI's names for its layers have not been verified; export the LoRA for "
            "diffusers (--layout diffusers), or the whole pipeline (--full)"
        )
    weights = {f"{spec.comfyui_prefix}.{name}": weight for name, weight in _scaled_adapters(policy).items()}
    named = convert_state_dict_to_kohya(weights) if spec.comfyui_prefix == "unet" else _dotted(weights)
    save_file({name: value.detach().cpu().contiguous() for name, value in named.items()}, file, {"format": "pt"})


def _dotted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by peft's names as kohya calls the two matrices, with an alpha for each pair; layers keep their names."""
    named: dict[str, Tensor] = {}
    for name, weight in weights.items():
        named[name.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.")] = weight
        if ".lora_A." in name:
            named[f"{name.partition('.lora_A.')[0]}.alpha"] = torch.tensor(len(weight))
    return named


def _scaled_adapters(policy: nn.Module) -> dict[str, Tensor]:
    """The adapters by peft's names, with their scale, alpha / rank, in the second matrix.

    Raises:
        AegpoError: if the policy has none.
    """
    if not has_adapters(policy):
        raise AegpoError(
            "the policy was fine-tuned in full, so it has no LoRA to write; write a whole pipeline instead"
        )
    configs: Any = policy.peft_config
    scale = configs["default"].lora_alpha / configs["default"].r
    return {
        name: weight * scale if "lora_B" in name else weight
        for name, weight in get_peft_model_state_dict(policy).items()
    }


# --- pipelines -------------------------------------------------------------------------------------------------------


def save_pipeline(
    spec: PipelineOptions, source: Path, policy: nn.Module, dtypes: Mapping[str, torch.dtype], folder: Path
) -> None:
    """The pipeline of `source` with the policy as its network; `from_pretrained(folder)` needs no arguments.

    Weights are in the dtypes the policy paints with, in files without a variant's suffix. They are loaded in float32
    where no dtype is asked for: diffusers does so by itself, and configs of text encoders say it, since transformers
    would load what the file has, and the two would not go together. The scheduler is the one that evaluation paints
    with. What nothing here reads and the source lacks, as a safety checker, is left out.
    """
    network = merged(policy)
    cast(network, dtypes)
    network.to("cpu")
    vae = load_component(spec, source, "vae", getattr(diffusers, spec.vae_class), spec.vae_dtype)
    given: dict[str, Any] = {spec.network: network, "vae": vae, **dict.fromkeys(_absent(spec, source))}
    scheduler = spec.saved_scheduler()
    pipeline = load_pipeline(spec, source, given if scheduler is None else given | {"scheduler": scheduler})
    pipeline.save_pretrained(folder)
    texts = {folder / name for name, part in pipeline.components.items() if isinstance(part, PreTrainedModel)}
    for file in folder.rglob("*.json"):
        told = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(told, dict) and ("_name_or_path" in told or file.parent in texts):
            told.pop("_name_or_path", None)  # where on this machine it was loaded from
            write_json(file, _in_float32(told) if file.parent in texts else told)


def _absent(spec: PipelineOptions, source: Path) -> set[str]:
    """Components that nothing here reads and the source has no folder of; a safety checker needs what it reads."""
    absent = {name for name in spec.unneeded if not (source / name).is_dir()}
    return absent | ({"safety_checker"} & set(spec.unneeded) if "feature_extractor" in absent else set())


def _in_float32(config: Any) -> Any:
    """A config of transformers that says with which dtype it is loaded where none is asked for."""
    if not isinstance(config, dict):
        return config
    said = ("dtype", "torch_dtype")  # the second before transformers 5
    return {name: "float32" if name in said else _in_float32(value) for name, value in config.items()}


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
