"""Checkpoints of HPSv2, in the layout of open_clip: the architecture that shapes tell, and the CLIP of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aegpo.errors import AegpoError
from aegpo.rewards.weights import load_strictly

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPModel

VISION_HEAD, TEXT_HEAD = 80, 64  # width of a head in ViT-H-14 (open_clip's configuration); shapes do not show it

_BLOCK = re.compile(r"(?P<tower>visual\.)?transformer\.resblocks\.(?P<layer>\d+)\.(?P<rest>.+)")
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",  # transposed
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",  # transposed
}
_TRANSPOSED = ("visual.proj", "text_projection")


def to_clip(who: str, tensors: Mapping[str, Tensor]) -> CLIPModel:
    """transformers' CLIP with the weights of a checkpoint in open_clip's layout; sizes are read from its shapes.

    Raises:
        AegpoError: if a key is missing or unknown, or the shapes are not those of such a network.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(**architecture(who, tensors))
    with init_empty_weights():
        network = CLIPModel(config)
    load_strictly(who, network, renamed(who, tensors))
    return network


def architecture(who: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of CLIPConfig, read from the shapes of a checkpoint in open_clip's layout."""
    try:
        width, _, patch, _ = tensors["visual.conv1.weight"].shape
        positions, embed = len(tensors["visual.positional_embedding"]), tensors["visual.proj"].shape[1]
        vocabulary, text_width = tensors["token_embedding.weight"].shape
        context = len(tensors["positional_embedding"])
        inner = len(tensors["visual.transformer.resblocks.0.mlp.c_fc.bias"])
        text_inner = len(tensors["transformer.resblocks.0.mlp.c_fc.bias"])
    except (KeyError, ValueError, IndexError) as error:
        raise AegpoError(
            f"{who}: the checkpoint is not of HPSv2's layout (open_clip's CLIP with a vision transformer): {error}"
        ) from error
    side = round((positions - 1) ** 0.5)
    if side**2 != positions - 1 or width % VISION_HEAD or text_width % TEXT_HEAD:
        raise AegpoError(
            f"{who}: the checkpoint is not of HPSv2's architecture: {positions} positions, widths {width} and "
            f"{text_width}; a square grid and one, and heads of {VISION_HEAD} and {TEXT_HEAD}, were expected"
        )
    layers = {bool(match["tower"]): 0 for match in _blocks(tensors)}
    for match in _blocks(tensors):
        layers[bool(match["tower"])] = max(layers[bool(match["tower"])], int(match["layer"]) + 1)
    common = {"hidden_act": "gelu", "projection_dim": embed}
    vision = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers[True]}
    vision |= {"num_attention_heads": width // VISION_HEAD, "image_size": side * patch, "patch_size": patch}
    text = {"hidden_size": text_width, "intermediate_size": text_inner, "num_hidden_layers": layers[False]}
    text |= {"num_attention_heads": text_width // TEXT_HEAD, "vocab_size": vocabulary}
    text |= {"max_position_embeddings": context, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    return {"vision_config": vision | common, "text_config": text | common, "projection_dim": embed}


def renamed(who: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint in open_clip's layout under transformers' names; every key is consumed.

    Raises:
        AegpoError: for a key that has no place there.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        if name in _OUTSIDE:
            converted[_OUTSIDE[name]] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
        elif match is not None:
            converted |= _block(match, tensor, name, who)
        else:
            raise AegpoError(f"{who}: the checkpoint has an unknown key {name!r}; open_clip's CLIP has none such")
    return converted


def _block(match: re.Match[str], tensor: Tensor, name: str, who: str) -> dict[str, Tensor]:
    """One tensor of a transformer block; attention's joint projection becomes three."""
    tower = "vision_model" if match["tower"] else "text_model"
    where, (module, _, part) = f"{tower}.encoder.layers.{match['layer']}", match["rest"].rpartition(".")
    if match["rest"] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = match["rest"].removeprefix("attn.in_proj_")
        thirds = tensor.chunk(3)
        return {f"{where}.self_attn.{letter}_proj.{kind}": t for letter, t in zip("qkv", thirds, strict=True)}
    if module not in _IN_BLOCK:
        raise AegpoError(f"{who}: the checkpoint has an unknown key {name!r}; open_clip's CLIP has none such")
    return {f"{where}.{_IN_BLOCK[module]}.{part}": tensor}


def _blocks(tensors: Mapping[str, Tensor]) -> list[re.Match[str]]:
    return [match for name in tensors if (match := _BLOCK.fullmatch(name))]
